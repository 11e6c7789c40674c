"""The batch rows of A1111's UNet evaluations: what each predicts, and for which picture.

The CFG denoiser evaluates all cond rows, grouped by picture, then the uncond rows, in one or several UNet calls, always
in this order. Its callback tells none of it, so rows are noted as they reach the UNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lib_hires.run import COND, UNCOND, Call, Row


class UnetRows:
    """Tells a call the rows of each UNet evaluation, in the order in which they are expected."""

    def __init__(self, call: Call, expected: Sequence[Row] = ()) -> None:
        self._call = call
        self._pending = list(expected)
        self.seen: set[str] = set()  # what was evaluated so far

    def expect(self, rows: Sequence[Row]) -> None:
        self._pending = list(rows)

    @contextmanager
    def open(self, network: nn.Module) -> Iterator[None]:
        handle = network.register_forward_pre_hook(self.note)
        try:
            yield
        finally:
            handle.remove()

    def note(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        count = len(args[0])
        self._call.rows = tuple(self._pending[:count])
        self.seen.update(row.predicts for row in self._call.rows)
        del self._pending[:count]


def rows_of_callback(params: Any) -> list[Row]:
    """The rows that the host's callback shows. InstructPix2Pix has uncond rows twice, once without its picture."""
    conds, batch = int(params.text_cond.shape[0]), int(params.text_uncond.shape[0])
    cond = [Row(COND, picture) for picture in pictures_of_conds(params.denoiser, conds, batch)]
    return cond + [Row(UNCOND, row % batch) for row in range(int(params.x.shape[0]) - conds)]


def pictures_of_conds(denoiser: Any, conds: int, batch: int) -> Sequence[int | None]:
    """The picture that each cond row belongs to, as the prompts tell that the host makes the rows from; None for all
    where these are not its prompts, because another extension changed the rows."""
    given = getattr(getattr(denoiser, "sampler", None), "sampler_extra_args", None) or {}
    prompts = getattr(given.get("cond"), "batch", ())
    pictures = [picture for picture, parts in enumerate(prompts) for _ in parts]
    if len(prompts) == batch and len(pictures) == conds:
        return pictures
    return range(batch) if conds == batch else [None] * conds
