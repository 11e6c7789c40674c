"""Low-band lock: early in the pass, the coarse structure of what the model predicts is that of the upscaled picture.

With z the reference (the clean latent that the pass begins from) and L a low-pass filter, every call in the window does

    x0 <- x0 + strength (L(z) - L(x0))

so the model's fine structure stands on the reference's coarse one. L keeps what a picture of the model's native size
can hold (times coarseness): Haar blocks, the low band of a wavelet as in DiffuseHigh, or a Gaussian, which has none.

References: DiffuseHigh (Kim et al. 2025, DWT-based structure guidance), FAM Diffusion (Yang et al. 2025, frequency
modulation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_hires.low_band import gaussian_low, haar_level, haar_low
from lib_hires.run import Run, Start
from lib_hires.settings import Settings, choice, number, passes_choice, window_start
from lib_hires.sites import Predictions
from lib_hires.stages import HIRES_FAMILY
from lib_hires.technique import Rest, Technique
from lib_hires.techniques.guidance.windowed import WindowedGuidance
from lib_hires.window import Windowed

HAAR, GAUSSIAN = "Haar", "Gaussian"


@dataclass(frozen=True)
class LowBandLockSettings(Windowed, Settings):
    strength: float = number(
        1.0, 0.0, 1.0, 0.01,
        label="Strength",
        help="How firmly coarse structure is held. 1 holds it fully, 0 switches it off.",
    )  # fmt: skip
    filter: str = choice(
        HAAR, (HAAR, GAUSSIAN),
        label="Filter",
        help=f"What counts as coarse. {HAAR}: the mean of square blocks, as wavelets have it; at most a step of two. "
        f"{GAUSSIAN}: a soft blur of any width.",
    )  # fmt: skip
    coarseness: float = number(
        1.0, 0.5, 8.0, 0.1,
        label="Coarseness",
        help="The finest structure that is held: 1 is what a picture of the model's native size can hold; 2 is twice "
        "as coarse, which leaves more to the model.",
    )  # fmt: skip
    start: float = window_start()
    end: float = number(
        0.35, 0.0, 1.0, 0.01,
        label="End",
        help="Fraction of the pass at which it stops. Later keeps more of the picture, earlier lets more change.",
    )  # fmt: skip
    passes: str = passes_choice()

    def cells(self, run: Run) -> float:
        """Side of the finest structure that is held, in latent cells: the upscale over native times coarseness."""
        upscale = math.sqrt(math.prod(run.latent) / math.prod(run.model.native))
        return max(upscale, 1.0) * self.coarseness


class LowBandLockPatch(WindowedGuidance):
    def __init__(self, settings: LowBandLockSettings, run: Run, start: Start) -> None:
        super().__init__(settings, run)
        self._settings = settings
        self._cells = settings.cells(run)
        self._reference = start.latent.float()

    def after_mix(self, denoised: Tensor, raw: Predictions) -> Tensor:
        if not self.acts_in(raw.call):
            return denoised
        self.fired += 1
        difference = self._reference.to(denoised) - denoised
        return torch.add(denoised, self._low(difference), alpha=self._settings.strength)  # L is linear: one filter

    def _low(self, x: Tensor) -> Tensor:
        if self._settings.filter == HAAR:
            return haar_low(x, haar_level(self._cells))
        return gaussian_low(x, self._cells)

    def describe(self) -> str:
        s = self._settings
        size = 2 ** haar_level(self._cells) if s.filter == HAAR else self._cells
        return f"{s.filter}, structure of {size:.3g} cells and more held by {s.strength:g}, {super().describe()}"


def begin(settings: LowBandLockSettings, run: Run) -> LowBandLockPatch:
    """The patch for one run. Raises `Rest` in a pass without a reference, and at strength 0."""
    if run.start is None:
        raise Rest("only in hires or img2img passes: this one begins from noise alone, with no picture to hold on to")
    if settings.strength == 0:
        raise Rest("strength 0 changes nothing")
    return LowBandLockPatch(settings, run, run.start)


TECHNIQUE = Technique(
    name="low_band_lock",
    title="Low-band lock",
    family=HIRES_FAMILY,
    summary="Holds the coarse structure of the small picture for the first part of Hires. fix or img2img, so that a "
    "high denoising strength changes detail and not composition.",
    source="DiffuseHigh (Kim et al. 2025), FAM Diffusion (Yang et al. 2025)",
    settings=LowBandLockSettings,
    begin=begin,
    presets={
        "Default": LowBandLockSettings(),
        "Gaussian": LowBandLockSettings(filter=GAUSSIAN),
        "Composition only": LowBandLockSettings(coarseness=4.0),
        "Faithful": LowBandLockSettings(end=0.7),
    },
)
