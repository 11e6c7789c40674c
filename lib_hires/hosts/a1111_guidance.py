"""The guidance site in A1111: one call of its CFG denoiser.

The denoiser evaluates a batch of rows (all cond rows, grouped by picture, then the uncond rows) in one or several
UNet calls, always in this order, and hands the results to `combine_denoised`. While a call is open, an instance
attribute replaces that method; rows for the perturbed prediction stand between cond and uncond, where every branch of
the host's code carries them along. What was evaluated is told from the rows that really reached the UNet, because
the host may leave uncond out after the callback (NGMS, "ignore negative prompt during early sampling").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lib_hires.guidance import GuidancePipeline, composed
from lib_hires.hosts.a1111_rows import UnetRows, pictures_of_conds
from lib_hires.hosts.instance import instance_attribute
from lib_hires.run import COND, PERTURBED, UNCOND, Call, Row
from lib_hires.sites import Predictions

Weights = Sequence[Sequence[tuple[int, float]]]  # per picture: its cond rows and their weights


class DenoisedSpace:
    """k-diffusion samplers: the model takes x0 + sigma noise (VE) and returns x0. Flow models alike."""

    def noisy(self, x: Tensor) -> Tensor:
        """The host's noisy latent in our scaling."""
        return x.float()

    def model_input(self, x: Tensor) -> Tensor:
        return x

    def denoised(self, x: Tensor, out: Tensor) -> Tensor:
        """What the model returned for the noisy latent x (our scaling), as x0."""
        return out.float()

    def output(self, x: Tensor, denoised: Tensor) -> Tensor:
        """x0 as the host wants it."""
        return denoised


class EpsSpace(DenoisedSpace):
    """DDIM, PLMS and UniPC: the model takes x_vp = x / sqrt(1 + sigma^2) (VP) and returns eps = (x - x0) / sigma."""

    def __init__(self, sigma: float) -> None:
        self._sigma = sigma
        self._to_ve = (1 + sigma**2) ** 0.5

    def noisy(self, x: Tensor) -> Tensor:
        return x.float() * self._to_ve

    def model_input(self, x: Tensor) -> Tensor:
        return x / self._to_ve

    def denoised(self, x: Tensor, out: Tensor) -> Tensor:
        return x - self._sigma * out.float()

    def output(self, x: Tensor, denoised: Tensor) -> Tensor:
        return (x - denoised) / self._sigma


class GuidedCall:
    """One denoiser call: takes the rows of the host's callback, and combines what the model made of them."""

    def __init__(
        self, pipeline: GuidancePipeline, params: Any, call: Call, space: DenoisedSpace, may_skip_uncond: bool
    ) -> None:
        self._pipeline = pipeline
        self._call = call
        self._space = space
        self._denoiser = params.denoiser
        self._cond, self._uncond = params.text_cond, params.text_uncond
        self._images, self._sigmas = params.image_cond, params.sigma
        self._conds = int(params.text_cond.shape[0])
        self._batch = int(params.x.shape[0]) - self._conds
        self._dtype = params.x.dtype
        self._x = space.noisy(params.x[self._conds :])
        self._perturbed = pipeline.wants_perturbed(call)
        self._skipped = may_skip_uncond and pipeline.skips_uncond(call)
        self._rows = UnetRows(call)
        self._set_rows(params)

    def _set_rows(self, params: Any) -> None:
        pictures = [*pictures_of_conds(self._denoiser, self._conds, self._batch), *range(self._batch)]
        kinds = [COND] * self._conds + [UNCOND] * self._batch
        rows = list(range(len(kinds)))
        if self._perturbed:
            rows[self._conds : self._conds] = rows[: self._conds]
            kinds[self._conds : self._conds] = [PERTURBED] * self._conds
            params.text_cond = _rows_of_text(self._cond, rows[: 2 * self._conds])
        if self._skipped:
            rows, kinds = rows[: -self._batch], kinds[: -self._batch]
            # no rows, but as many tokens as cond: the host then takes its branch for equal lengths
            params.text_uncond = _rows_of_text(self._cond, [])
        if self._perturbed or self._skipped:
            params.x, params.sigma, params.image_cond = (t[rows] for t in (params.x, params.sigma, params.image_cond))
        self._rows.expect([Row(kind, pictures[row]) for kind, row in zip(kinds, rows, strict=True)])

    @contextmanager
    def open(self, network: nn.Module) -> Iterator[None]:
        with self._rows.open(network):
            host_combine = self._denoiser.combine_denoised

            def combine(x_out: Tensor, conds_list: Weights, uncond: Any, cond_scale: float) -> Tensor:
                return self._combine(host_combine, x_out, conds_list, cond_scale)

            with instance_attribute(self._denoiser, "combine_denoised", combine):
                yield

    def _combine(self, host_combine: Callable[..., Tensor], x_out: Tensor, weights: Weights, scale: float) -> Tensor:
        uncond = self._space.denoised(self._x, x_out[-self._batch :]) if UNCOND in self._rows.seen else None
        cond, strengths = self._composed_rows(x_out[: self._conds], weights, uncond)
        perturbed = x_out[self._conds : 2 * self._conds] if self._perturbed else None
        raw = Predictions(
            x=self._x,
            cond=cond,
            uncond=uncond,
            scale=scale * _common(strengths, cond),
            call=self._call,
            perturbed=None if perturbed is None else self._composed_rows(perturbed, weights, uncond)[0],
            predict=lambda x, kind: self._predict(x, kind, weights),
        )

        def mix(cond: Tensor, uncond: Tensor) -> Tensor:
            out = self._space.output(torch.cat([self._x] * 2), torch.cat([cond, uncond])).to(x_out.dtype)
            one_each = [[(picture, strength)] for picture, strength in enumerate(strengths)]
            mixed = host_combine(out, one_each, self._uncond, scale)
            return self._space.denoised(self._x, mixed)

        if self._skipped:
            host = self._space.output(self._x, cond).to(x_out.dtype)
        else:
            host = host_combine(x_out, weights, self._uncond, scale)
        mixed = self._space.denoised(self._x, host)
        guided = self._pipeline.guide(raw, mixed, mix)
        return host if guided is mixed else self._space.output(self._x, guided).to(x_out.dtype)

    def _composed_rows(self, out: Tensor, weights: Weights, uncond: Tensor | None) -> tuple[Tensor, list[float]]:
        """x0 [B, C, h, w] and a strength for every picture, from the rows of its composed prompts."""
        pictures, strengths = [], []
        for picture, members in enumerate(weights):
            x = self._x[picture : picture + 1]
            parts = [(self._space.denoised(x, out[row : row + 1]), weight) for row, weight in members]
            one, strength = composed(parts, None if uncond is None else uncond[picture : picture + 1])
            pictures.append(one)
            strengths.append(strength)
        return torch.cat(pictures), strengths

    def _predict(self, x: Tensor, kind: str, weights: Weights) -> Tensor:
        """One more evaluation at x [B, C, h, w] (our scaling), with the prompts of `kind`."""
        if kind == UNCOND:
            self._rows.expect([Row(kind, picture) for picture in range(self._batch)])
            return self._space.denoised(x, self._evaluate(x, self._uncond, slice(self._conds, None)))
        pictures = [picture for picture, members in enumerate(weights) for _ in members]
        self._rows.expect([Row(kind, picture) for picture in pictures])
        rows = x[pictures]
        out = self._space.denoised(rows, self._evaluate(rows, self._cond, slice(self._conds)))
        parts = [[(out[row : row + 1], weight) for row, weight in members] for members in weights]
        return torch.cat([composed(members, None)[0] for members in parts])

    def _evaluate(self, x: Tensor, text: Any, rows: slice) -> Tensor:
        condition = _condition(text, self._images[rows], self._denoiser)
        model_input = self._space.model_input(x).to(self._dtype)
        return self._denoiser.inner_model(model_input, self._sigmas[rows], cond=condition)


def _common(strengths: Sequence[float], like: Tensor) -> float | Tensor:
    """One number where all pictures agree, else [B, 1, 1, 1]."""
    if len(set(strengths)) == 1:
        return strengths[0]
    return torch.tensor(strengths, dtype=torch.float32, device=like.device)[:, None, None, None]


def _rows_of_text(text: Any, rows: Sequence[int]) -> Any:
    """Rows of a text condition: a tensor, or SDXL's dictionary of tensors with a shape."""
    if isinstance(text, dict):
        return type(text)({key: value[list(rows)] for key, value in text.items()})
    return text[list(rows)]


def _condition(text: Any, image: Tensor, denoiser: Any) -> dict[str, Any]:
    """The dictionary that A1111's model wrappers expect."""
    from modules import shared

    if shared.sd_model.model.conditioning_key == "crossattn-adm":
        return {"c_crossattn": [text], "c_adm": image}
    if isinstance(text, dict):
        return {**text, "c_concat": [image]}
    return {"c_crossattn": [text], "c_concat": [image]}
