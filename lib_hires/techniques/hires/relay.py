"""Relay: most steps at the small size, the rest at the large one.

The first pass ends early with what it predicts (x0), and the hires pass takes over at the noise level that fits. The
same noise hides less of a picture that is s times larger, since s^2 cells show what one cell showed: the signal to
noise ratio is equal where

    sigma_large = s sigma_small,    or abar' = abar / (gamma - (gamma - 1) abar) with gamma = s^2

Reference: MegaFusion (Wu et al. 2024), truncate and relay (section 3.2) and noise re-scheduling (section 3.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from lib_hires.run import FIRST_PASS, Call, Run
from lib_hires.settings import Settings, number, toggle
from lib_hires.sites import Ending
from lib_hires.stages import HIRES_FAMILY, HiresPass, Stage, with_first
from lib_hires.technique import Patch, Refusal, Rest, Technique


@dataclass(frozen=True)
class RelaySettings(Settings):
    share: float = number(
        0.3, 0.05, 0.9, 0.05,
        label="Large share",
        help="Part of the steps that is left to the large size. The first pass ends after the others.",
    )  # fmt: skip
    matched: bool = toggle(
        True,
        label="Match noise to size",
        help="Begin the large size at more noise, in the measure of its size: as much of the picture is hidden there "
        "as was at the small size. Off: at the noise level where the small size ended.",
    )


def handover(sigmas: tuple[float, ...], share: float) -> float:
    """The noise level after whose evaluation the small size ends, of a list that falls to 0."""
    steps = len(sigmas) - 1
    return sigmas[min(max(round(steps * (1 - share)), 0), steps - 1)]


def denoise_from(sigmas: tuple[float, ...], sigma: float) -> float:
    """The part of the steps (denoising strength) that lies behind a noise level, between steps by log sigma."""
    steps = len(sigmas) - 1
    if sigma >= sigmas[0]:
        return 1.0
    for step, (high, low) in enumerate(pairwise(sigmas)):
        if low <= sigma <= high and low > 0:
            return 1 - (step + math.log(high / sigma) / math.log(high / low)) / steps
    return 1 / steps


def _listed(run: Run) -> tuple[float, ...]:
    """The run's noise levels, step by step. Raises `Refusal` where the sampler does not tell them."""
    if not run.lists_steps:
        raise Refusal("this sampler chooses its own steps, so nobody knows where to hand over: choose another sampler")
    ends = run.sigmas if run.sigmas[-1] == 0 else (*run.sigmas, 0.0)
    return tuple(ends)


class RelayPatch(Patch, Ending):
    def __init__(self, settings: RelaySettings, run: Run) -> None:
        super().__init__()
        self._sigma = handover(_listed(run), settings.share)

    def ends_after(self, call: Call) -> bool:
        if call.sigma > self._sigma * (1 + 1e-4):  # hosts keep noise levels in float32
            return False
        self.fired += 1
        return True

    def describe(self) -> str:
        return f"the small size ends at sigma {self._sigma:.3g}"


def begin(settings: RelaySettings, run: Run) -> RelayPatch:
    """Ends the first pass. Raises `Rest` in others, and where no hires pass takes over."""
    if run.pass_name != FIRST_PASS:
        raise Rest("it ends the first pass only")
    if not run.hires_follows:
        raise Rest("Hires. fix is off, so nothing takes over")
    return RelayPatch(settings, run)


def divide(settings: RelaySettings, hires: HiresPass, stages: list[Stage]) -> list[Stage]:
    """The first stage takes over: its denoise, and as many steps as are left."""
    if hires.first is None:
        raise Rest("there was no first pass to take over from")
    sigmas = _listed(hires.first)
    sigma = handover(sigmas, settings.share)
    if settings.matched:
        sigma *= math.sqrt(math.prod(stages[0].size) / math.prod(hires.base))
    denoise = denoise_from(sigmas, sigma)
    steps = hires.steps or max(1, round(denoise * (len(sigmas) - 1)))
    return with_first(stages, denoise=denoise, steps=steps)


TECHNIQUE = Technique(
    name="relay",
    title="Relay",
    family=HIRES_FAMILY,
    summary="The fast way to a large picture: the first pass stops early and the hires pass does the remaining steps "
    "instead of starting over. Sets the denoising strength and steps of Hires. fix by itself.",
    source="MegaFusion (Wu et al. 2024)",
    settings=RelaySettings,
    begin=begin,
    stages=divide,
    presets={
        "Fast 2x": RelaySettings(),
        "More at the large size": RelaySettings(share=0.5),
        "As ended (no matching)": RelaySettings(matched=False),
    },
)
