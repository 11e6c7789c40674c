"""Mahiro: follow the positive prompt where guidance would only repeat the negative one.

With the leaps L = w cond and U = w uncond, r the combined prediction, m = (L + r) / 2 and q(z) = sign(z) sqrt|z|,

    similarity = mean over cells of the cosine between q(U) and q(m), over channels
    r' = (1 + similarity) / 2 r + (1 - similarity) / 2 L

The mean is taken per picture; in the reference it goes over the whole batch, and a picture depends on its neighbours.

Reference: yoinked, "Mahiro" (blue-arxiv 2024-1208.1); ComfyUI's Mahiro.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lib_hires.run import Run
from lib_hires.settings import Settings, passes_choice, window_end, window_start
from lib_hires.sites import Predictions
from lib_hires.technique import Technique
from lib_hires.techniques.guidance.reductions import times, wide
from lib_hires.techniques.guidance.windowed import WindowedGuidance
from lib_hires.window import Windowed


@dataclass(frozen=True)
class MahiroSettings(Windowed, Settings):
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()


def similarity(negative_leap: Tensor, merged: Tensor) -> Tensor:
    """How alike two x0 latents [B, C, h, w] are, wide [B, 1, 1, 1] in -1 to 1.

    q(a) q(b) = q(a b) and q(a)^2 = |a|, so the cosine needs one root for each channel and one for each length.
    """
    product = negative_leap * merged
    along = (product.abs().sqrt() * product.sign()).sum(dim=1, keepdim=True)
    cosine = along / (_length(negative_leap) * _length(merged))
    return wide(cosine).mean(dim=(1, 2, 3), keepdim=True)


def _length(z: Tensor) -> Tensor:
    """|q(z)| over channels."""
    return z.abs().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-8)


def merged_leap(denoised: Tensor, cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Mahiro's combination of x0 predictions [B, C, h, w]; `scale` is w, a number or [B, 1, 1, 1]."""
    leap = scale * cond
    alike = similarity(scale * uncond, (leap + denoised) / 2)
    return denoised + times(leap - denoised, (1 - alike) / 2)


class MahiroPatch(WindowedGuidance):
    def after_mix(self, denoised: Tensor, raw: Predictions) -> Tensor:
        if raw.uncond is None or not self.acts_in(raw.call):
            return denoised
        self.fired += 1
        return merged_leap(denoised, raw.cond, raw.uncond, raw.scale)


def begin(settings: MahiroSettings, run: Run) -> MahiroPatch:
    """The patch for one run. There is nothing to set, so there is no neutral setting."""
    return MahiroPatch(settings, run)


TECHNIQUE = Technique(
    name="mahiro",
    title="Mahiro",
    family="Guidance",
    summary="Leans towards the positive prompt where the negative one says little, so that a picture follows what was "
    "asked for rather than the opposite of what was not. Stronger colours; try a lower CFG scale.",
    source="yoinked, blue-arxiv 2024-1208.1",
    twins=("Mahiro CFG",),
    settings=MahiroSettings,
    begin=begin,
    presets={
        "Whole pass": MahiroSettings(),
        "Composition only": MahiroSettings(end=0.5),
    },
)
