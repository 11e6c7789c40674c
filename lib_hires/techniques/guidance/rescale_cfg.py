"""RescaleCFG: give the guided prediction the contrast of the cond prediction.

In the space of velocities v the combined prediction is brought back to the deviation of the cond one, in part:

    v' = phi std(v_cond) / std(v_cfg) v_cfg + (1 - phi) v_cfg

v is proportional to anchor - x0, with the anchor x / (sigma^2 + 1), and the factor cancels in the quotient. So in x0

    x0' = anchor + k (x0_cfg - anchor),    k = phi std(x0_cond - anchor) / std(x0_cfg - anchor) + 1 - phi

which loses nothing at the noise levels of zero-terminal-SNR models, where going to v and back does. Models that predict
flow are rescaled in x0 itself (anchor 0), as ComfyUI does since 2026.

Reference: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), eqs. 15 and 16.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lib_hires.run import FLOW, Run
from lib_hires.settings import Settings, number, passes_choice, window_end, window_start
from lib_hires.sites import Predictions
from lib_hires.technique import Rest, Technique
from lib_hires.techniques.guidance.reductions import deviation, ratio, scaled_about, velocity_anchor
from lib_hires.techniques.guidance.windowed import WindowedGuidance
from lib_hires.window import Windowed


@dataclass(frozen=True)
class RescaleCFGSettings(Windowed, Settings):
    multiplier: float = number(
        0.7, 0.0, 1.0, 0.01,
        label="Multiplier",
        help="How much of the rescaled result is used. Higher: less burnt, flatter. 0 does nothing. "
        "0.7 suits v-prediction models at CFG 7.",
    )  # fmt: skip
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()


def rescaled(denoised: Tensor, cond: Tensor, multiplier: float, anchor: Tensor | float = 0.0) -> Tensor:
    """`denoised` with the deviation that `cond` has around the anchor, mixed in by `multiplier` (phi).

    Both [B, ...] in one space, x0 or any that is linear in it; deviations per picture over everything else. A
    prediction without deviation stays as it is.
    """
    quotient = ratio(deviation(cond - anchor), deviation(denoised - anchor))
    return scaled_about(denoised, anchor, multiplier * (quotient - 1))


class RescaleCFGPatch(WindowedGuidance):
    def __init__(self, settings: RescaleCFGSettings, run: Run) -> None:
        super().__init__(settings, run)
        self._multiplier = settings.multiplier
        self._flow = run.model.prediction == FLOW

    def after_mix(self, denoised: Tensor, raw: Predictions) -> Tensor:
        if raw.uncond is None or not self.acts_in(raw.call):
            return denoised
        self.fired += 1
        anchor = 0.0 if self._flow else velocity_anchor(raw.x, raw.call.sigma)
        return rescaled(denoised, raw.cond, self._multiplier, anchor)

    def describe(self) -> str:
        return f"multiplier {self._multiplier:g}, {super().describe()}"


def begin(settings: RescaleCFGSettings, run: Run) -> RescaleCFGPatch:
    """The patch for one run. Raises `Rest` at multiplier 0."""
    if settings.multiplier == 0:
        raise Rest("multiplier 0 changes nothing")
    return RescaleCFGPatch(settings, run)


TECHNIQUE = Technique(
    name="rescale_cfg",
    title="RescaleCFG",
    family="Guidance",
    summary="Takes the burn out of a high CFG scale: colours and contrast stay those of the prompt alone. Made for "
    "v-prediction models. Does nothing at CFG 1.",
    source="Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al. 2023)",
    twins=("RescaleCFG", "CFG Rescale"),
    settings=RescaleCFGSettings,
    begin=begin,
    presets={
        "As published": RescaleCFGSettings(),
        "Gentle": RescaleCFGSettings(multiplier=0.35),
        "Full": RescaleCFGSettings(multiplier=1.0),
    },
)
