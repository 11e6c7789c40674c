"""TCFG: tangential damping of the uncond prediction.

Both predictions lead away from the noisy latent: a = x - uncond, b = x - cond. What they share is their dominant right
singular direction v1; TCFG keeps of `a` only its part along v1, so that moving away from the uncond prediction does not
move away from what both agree on. A singular value decomposition of two rows has a closed form. With

    p = <a, a> - <b, b>,    gamma = <a, b>,    r = sqrt(p^2 + 4 gamma^2)

the projection is a' = <a, v1> v1 = (1 + p / r) / 2 a + gamma / r b, and the new uncond is x - a'. Three sums replace
the decomposition. They are taken of a and d = a - b = cond - uncond, as p = 2 <a, d> - <d, d> and gamma = <a, a> -
<a, d>: where the noise dwarfs both predictions, <a, a> - <b, b> would cancel.

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
from lib_hires.techniques.guidance.reductions import wide
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
    a, d = x - uncond, cond - uncond
    of_a, of_b = _projection(_products(a, d))
    # x - a' = uncond + (1 - of_a - of_b) a + of_b d. The share of a is nearly 0 where a is nearly noise, and is
    # computed wide, so that the picture is not lost in the noise.
    shares = strength * torch.stack((1 - of_a - of_b, of_b))
    more_a, more_d = shares.to(x.dtype).view(2, -1, *[1] * (x.ndim - 1))
    return d.mul_(more_d).addcmul_(a, more_a).add_(uncond)


def _products(a: Tensor, d: Tensor) -> Tensor:
    """<a, a>, <a, d> and <d, d> of each picture, wide [B, 3].

    Summed in float32: where the noise dwarfs both predictions the angle that they give is small, and so is its error.
    """
    pictures = zip(a.flatten(1), d.flatten(1), strict=True)
    return wide(torch.stack([torch.stack((a @ a, a @ d, d @ d)) for a, d in pictures]))


def _projection(products: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients [B] of a and b in a', the projection of a on their dominant direction, from `_products` [B, 3]."""
    aa, ad, dd = products.unbind(1)
    p, gamma = 2 * ad - dd, aa - ad
    r = torch.hypot(p, 2 * gamma)
    undecided = r == 0
    return torch.where(undecided, 1.0, (1 + p / r) / 2), torch.where(undecided, 0.0, gamma / r)


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
