"""The guidance site, as every host serves it: one fixed order, and raw predictions for everybody who needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from lib_hires.plan import Plan
from lib_hires.run import Call
from lib_hires.sites import Guidance, PerturbedAttention, Predictions

Mix = Callable[[Tensor, Tensor], Tensor]  # (cond, uncond) -> the host's own combination of them
Parts = Sequence[tuple[Tensor, float]]  # predictions of the composed prompts of one picture, with their weights

_SMALLEST_SUM = 1e-3  # below it a weighted mean of composed prompts says nothing


class GuidancePipeline:
    """The guidance patches of a plan at work."""

    def __init__(self, plan: Plan) -> None:
        self._patches = plan.at(Guidance)
        self._perturbing = plan.at(PerturbedAttention)

    def __bool__(self) -> bool:
        return bool(self._patches)

    def skips_uncond(self, call: Call) -> bool:
        return any(patch.skips_uncond(call) for patch in self._patches)

    def wants_perturbed(self, call: Call) -> bool:
        return any(patch.perturbs(call) for patch in self._perturbing)

    def guide(self, raw: Predictions, mixed: Tensor, mix: Mix) -> Tensor:
        """The denoised result. `mixed` is what the host made of the raw predictions; it comes back as it is, the very
        tensor, where no patch acts."""
        if raw.uncond is not None and self.skips_uncond(raw.call):  # the host could not leave it out
            raw, mixed = replace(raw, uncond=None), raw.cond
        cond, uncond = raw.cond, raw.uncond
        if uncond is not None:
            for patch in self._patches:
                cond, uncond = patch.before_mix(cond, uncond, raw)
            if cond is not raw.cond or uncond is not raw.uncond:
                mixed = mix(cond, uncond)
        start = denoised = mixed.float()
        for patch in self._patches:
            denoised = patch.after_mix(denoised, raw)
        return mixed if denoised is start else denoised.to(mixed.dtype)


def composed(parts: Parts, uncond: Tensor | None) -> tuple[Tensor, float]:
    """One prediction and one strength for prompts joined by AND: strength * (result - uncond) is the sum of
    weight * (part - uncond). The result is the weighted mean, except where the weights cancel each other."""
    strength = sum(weight for _, weight in parts)
    if len(parts) == 1:
        return parts[0][0], strength
    if uncond is None or strength > _SMALLEST_SUM:
        total = strength if strength > _SMALLEST_SUM else 1.0
        return sum(part * (weight / total) for part, weight in parts), strength  # type: ignore[return-value]
    return uncond + sum(weight * (part - uncond) for part, weight in parts), 1.0
