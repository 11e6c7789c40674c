"""CFGNorm: bound every cell of the guided prediction by the same cell of the cond prediction.

With |.|_c the length over channels of one cell, r the combined prediction and n = x - x0 its noise,

    after mixing     s = min(1, |cond|_c / (|r|_c + 1e-8)),                   r' = r + strength (s - 1) r
    before mixing    s = |x - cond|_c / |x - r|_c, also above 1,              n' = n + strength (s - 1) n
    ComfyUI's form   s as after mixing,                                       r' = strength s r

"Before mixing" replaces the mix of noise predictions; since a mix is linear it can be done on its result. ComfyUI's
form makes the whole picture brighter or darker at each step where strength is not 1.

Reference: HiDream-E1's guidance (2025); ComfyUI's CFGNorm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_hires.run import Run
from lib_hires.settings import Settings, choice, number, passes_choice, window_end, window_start
from lib_hires.sites import Predictions
from lib_hires.technique import Rest, Technique
from lib_hires.techniques.guidance.reductions import channel_norm, scaled_about, times, wide
from lib_hires.techniques.guidance.windowed import WindowedGuidance
from lib_hires.window import Windowed

AFTER, BEFORE, MULTIPLIER = "After mixing", "Before mixing (noise)", "Plain multiplier (ComfyUI)"


@dataclass(frozen=True)
class CFGNormSettings(Windowed, Settings):
    strength: float = number(
        1.0, 0.0, 100.0, 0.01,
        label="Strength",
        help="How much of the normalised result is used: 0 is plain CFG, 1 all of it. "
        f"With Mode {MULTIPLIER} it is a factor on the whole picture instead, and may be above 1.",
    )  # fmt: skip
    mode: str = choice(
        AFTER, (AFTER, BEFORE, MULTIPLIER),
        label="Mode",
        help=f"{AFTER}: no cell becomes stronger than with the prompt alone. {BEFORE}: the predicted noise of a cell "
        f"becomes as strong as with the prompt alone. {MULTIPLIER}: the node's meaning of Strength.",
    )  # fmt: skip
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()

    def problem(self) -> str | None:
        if self.strength > 1 and self.mode != MULTIPLIER:
            return f"strength {self.strength:g} is above 1: lower Strength to 1, or set Mode to {MULTIPLIER}"
        return super().problem()


def bound(denoised: Tensor, cond: Tensor) -> Tensor:
    """s after mixing, of x0 predictions [B, C, h, w]: wide [B, 1, h, w], in 0 to 1."""
    return (channel_norm(cond) / (channel_norm(denoised) + 1e-8)).clamp(max=1.0)


def noise_quotient(denoised: Tensor, cond: Tensor, x: Tensor) -> Tensor:
    """s before mixing, of x0 predictions and the noisy latent [B, C, h, w]: wide [B, 1, h, w], 1 where there is no
    noise. Differences are taken wide: at high noise they are the predictions' last digits."""
    x, cond, denoised = wide(x), wide(cond), wide(denoised)
    own = channel_norm(x - denoised)
    return torch.where(own == 0, 1.0, channel_norm(x - cond) / own.clamp(min=1e-12))


class CFGNormPatch(WindowedGuidance):
    def __init__(self, settings: CFGNormSettings, run: Run) -> None:
        super().__init__(settings, run)
        self._mode, self._strength = settings.mode, settings.strength

    def after_mix(self, denoised: Tensor, raw: Predictions) -> Tensor:
        # as in ComfyUI, the plain factor also acts where there is no guidance to normalise
        if not self.acts_in(raw.call) or (raw.uncond is None and self._mode != MULTIPLIER):
            return denoised
        self.fired += 1
        if self._mode == MULTIPLIER:
            return times(denoised, self._strength * bound(denoised, raw.cond))
        if self._mode == AFTER:
            return scaled_about(denoised, 0.0, self._strength * (bound(denoised, raw.cond) - 1))
        return scaled_about(denoised, raw.x, self._strength * (noise_quotient(denoised, raw.cond, raw.x) - 1))

    def describe(self) -> str:
        return f"{self._mode.lower()}, strength {self._strength:g}, {super().describe()}"


def begin(settings: CFGNormSettings, run: Run) -> CFGNormPatch:
    """The patch for one run. Raises `Rest` at strength 0, except where strength is a factor."""
    if settings.strength == 0 and settings.mode != MULTIPLIER:
        raise Rest("strength 0 changes nothing")
    return CFGNormPatch(settings, run)


TECHNIQUE = Technique(
    name="cfg_norm",
    title="CFGNorm",
    family="Guidance",
    summary="Keeps a high CFG scale from burning the picture, place by place: where guidance makes it stronger "
    "than the prompt alone would, it is held back.",
    source="HiDream-E1 (2025); ComfyUI CFGNorm",
    settings=CFGNormSettings,
    begin=begin,
    presets={
        "Full": CFGNormSettings(),
        "Half": CFGNormSettings(strength=0.5),
        "Noise": CFGNormSettings(mode=BEFORE),
        "As ComfyUI": CFGNormSettings(mode=MULTIPLIER),
    },
)
