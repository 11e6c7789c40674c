"""The batch rows of a UNet patcher's evaluations, and rows for the perturbed prediction beside them.

The host evaluates chunks of rows, each a cond (0) or an uncond (1) as `cond_or_uncond` says, in one or several UNet
calls. A chunk has one row for every picture of the batch, in their order; prompts joined by AND are chunks beside each
other. Where a call holds the only cond chunk, and the larger batch fits into memory, a perturbed copy of it rides along
at the end; else the perturbed prediction takes a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lib_hires.run import COND, PERTURBED, UNCOND, Row

_COND = 0  # in the host's cond_or_uncond
Fits = Callable[
    [Any, Sequence[int], Any], bool
]  # (model, shape of the input, device) -> whether there is memory for it


class Rows:
    """What the rows of one denoiser call's evaluations predict, and for which picture."""

    def __init__(self, wants_perturbed: bool, fits: Fits) -> None:
        self.perturbed: Tensor | None = None  # x0 of the perturbed rows, once they were evaluated
        self.evaluated: set[str] = set()
        self.single_cond = False  # whether one condition makes the cond prediction: no AND, no areas
        self._wants_perturbed = wants_perturbed
        self._fits = fits
        self._own: str | None = None
        self._marks: list[int] = []  # of the host's own chunks
        self._chunk_marks: list[int] = []  # of the chunks that are evaluated, ours behind them
        self._chunk_rows = 1

    @contextmanager
    def own(self, kind: str) -> Iterator[None]:
        """An evaluation that we ask for: all its rows predict `kind`."""
        self._own = kind
        try:
            yield
        finally:
            self._own = None

    def extended(self, apply_model: Any, args: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a model function wrapper, with perturbed rows where they are wanted and fit."""
        self._marks = list(args["cond_or_uncond"])
        if self._own or not self._wants_perturbed or not self.single_cond or self._marks.count(_COND) != 1:
            return args
        x = args["input"]
        rows = len(x) // len(self._marks)
        if not self._fits(getattr(apply_model, "__self__", None), [len(x) + rows, *x.shape[1:]], x.device):
            return args
        return _with_copy(args, self._marks.index(_COND) * rows, rows)

    def told(self, args: dict[str, Any]) -> tuple[Row, ...]:
        """The rows of an evaluation with these arguments."""
        self._chunk_marks = list(args["cond_or_uncond"])
        chunks = len(self._chunk_marks)
        self._chunk_rows = len(args["input"]) // chunks
        kinds = [self._own] * chunks if self._own else self._kinds(chunks)
        return tuple(Row(kind, picture) for kind in kinds for picture in range(self._chunk_rows))

    def _kinds(self, chunks: int) -> list[str]:
        """What the chunks of the host's own evaluation predict; those beyond its own are ours."""
        kinds = [COND if mark == _COND else UNCOND for mark in self._marks]
        kinds += [PERTURBED] * (chunks - len(kinds))
        self.evaluated.update(kinds)
        return kinds

    def host_rows(self, out: Tensor, rows: int) -> Tensor:
        """The rows that the host asked for; what follows them is kept as the perturbed prediction."""
        if len(out) > rows:
            self.perturbed = out[rows:]
        return out[:rows]

    def options_of(self, rows: Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
        """Options for another extension's attention that gets some rows only: the same pictures of some chunks."""
        chunks = sorted({row // self._chunk_rows for row in rows})
        some = {**options, "cond_or_uncond": [self._chunk_marks[chunk] for chunk in chunks]}
        if "cond_mark" in options:
            some["cond_mark"] = options["cond_mark"][list(rows)]
        return some


def _with_copy(args: dict[str, Any], first: int, rows: int) -> dict[str, Any]:
    """The arguments with rows first .. first + rows - 1 once more at the end, wherever there is one entry per row."""
    total = len(args["input"])
    copied = slice(first, first + rows)

    def more(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == total:
            return torch.cat([value, value[copied]])
        if isinstance(value, dict):
            return {key: more(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [more(inner) for inner in value]
        return value

    conditions = {key: value if key == "transformer_options" else more(value) for key, value in args["c"].items()}
    options = conditions.get("transformer_options")
    if options is not None:
        conditions["transformer_options"] = _options_with_copy(options, total, rows)
    marks = [*args["cond_or_uncond"], _COND]
    return {**args, "input": more(args["input"]), "timestep": more(args["timestep"]), "c": conditions,
            "cond_or_uncond": marks}  # fmt: skip


def _options_with_copy(options: dict[str, Any], total: int, rows: int) -> dict[str, Any]:
    changed = dict(options)
    changed["cond_or_uncond"] = [*options["cond_or_uncond"], _COND]
    if "cond_mark" in options:
        changed["cond_mark"] = torch.cat([options["cond_mark"], torch.zeros_like(options["cond_mark"][:rows])])
    if "cond_indices" in options:
        changed["cond_indices"] = [*options["cond_indices"], *range(total, total + rows)]
    return changed
