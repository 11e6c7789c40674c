"""TCFG: tangential damping of the uncond prediction.

Both predictions lead away from the noisy latent: a = x - uncond, b = x - cond. What they share is their dominant right
singular direction v1; TCFG keeps of `a` only its part along v1, so that moving away from the uncond prediction does not
move away from what both agree on. A singular value decomposition of two rows has a closed form. With

    alpha = <a, a>,  beta = <b, b>,  gamma = <a, b>,  p = alpha - beta = <a - b, a + b>,  r = sqrt(p^2 + 4 gamma^2)

the projection is a' = <a, v1> v1 = (1 + p / r) / 2 a + gamma / r b, and the new uncond is x - a'. Three sums replace
the decomposition; p in its second form does not cancel where the noise dwarfs both predictions.

Reference: Kwon et al., "TCFG: Tangential Damping Classifier-Free Guidance" (2025); ComfyUI's TCFG.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_hires.run import Run
from lib_hires.settings import Settings, number, passes_choice, window_end, window_start
from lib_hires.sites import Predictions
from lib_hires.technique import Rest, Technique
from lib_hires.techniques.guidance.reductions import inner, times, wide
from lib_hires.techniques.guidance.windowed import WindowedGuidance
from lib_hires.window import Windowed


@dataclass(frozen=True)
class TCFGSettings(Windowed, Settings):
    strength: float = number(
        1.0, 0.0, 1.0, 0.01,
        label="Strength",
        help="How much of the damping is used: 1 is TCFG as published, 0 is plain CFG.",
    )  # fmt: skip
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()


def damped_uncond(x: Tensor, cond: Tensor, uncond: Tensor, strength: float = 1.0) -> Tensor:
    """The uncond prediction without what cond does not share.

    All are [B, ...], float32, x0 predictions and the noisy latent (VE, or flow: x - x0 is then sigma times the
    velocity, and the projection does not depend on scale). Where no direction dominates, uncond stays as it is.
    """
    along_a, along_b = _projection(x, cond, uncond)
    # x - (along_a a + along_b b) around uncond, so that the large x meets only a coefficient that was summed wide
    change = times(cond - uncond, along_b) + times(x - uncond, 1 - along_a - along_b)
    return uncond + strength * change


def _projection(x: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of a = x - uncond and b = x - cond in the projection of a on their dominant direction."""
    x, cond, uncond = wide(x), wide(cond), wide(uncond)
    a, b = x - uncond, x - cond
    p = inner(cond - uncond, a + b)
    gamma = inner(a, b)
    r = torch.hypot(p, 2 * gamma)
    undecided = r == 0
    r = r.masked_fill(undecided, 1.0)
    along_a = torch.where(undecided, 1.0, (1 + p / r) / 2)
    return along_a, gamma / r  # gamma is 0 where r is


class TCFGPatch(WindowedGuidance):
    def __init__(self, settings: TCFGSettings, run: Run) -> None:
        super().__init__(settings, run)
        self._strength = settings.strength

    def before_mix(self, cond: Tensor, uncond: Tensor, raw: Predictions) -> tuple[Tensor, Tensor]:
        if not self.acts_in(raw.call):
            return cond, uncond
        self.fired += 1
        return cond, damped_uncond(raw.x, cond, uncond, self._strength)

    def describe(self) -> str:
        return f"strength {self._strength:g}, {super().describe()}"


def begin(settings: TCFGSettings, run: Run) -> TCFGPatch:
    """The patch for one run. Raises `Rest` at strength 0."""
    if settings.strength == 0:
        raise Rest("strength 0 changes nothing")
    return TCFGPatch(settings, run)


TECHNIQUE = Technique(
    name="tcfg",
    title="TCFG",
    family="Guidance",
    summary="Keeps the negative prompt from pushing the picture away from what both prompts agree on, against "
    "unnatural shapes and artifacts; sometimes with a little less contrast.",
    source="Tangential Damping Classifier-Free Guidance (Kwon et al. 2025)",
    settings=TCFGSettings,
    begin=begin,
    presets={
        "As published": TCFGSettings(),
        "Half strength": TCFGSettings(strength=0.5),
        "Composition only": TCFGSettings(end=0.5),
    },
)
