"""Differential Diffusion: the grey value of an inpainting mask says how much each pixel may change.

Let r be the fraction of the pass that still lies ahead, 1 at its first evaluation and 0 at its end. A cell whose mask
value is m (1 = repaint) is active, that is repainted, while r <= m, and held at the picture that the pass began from
before that. So white cells are painted through the whole pass, grey ones in its last part, and black ones never:

    B = [m >= r] and [m > 0],    mask in force = s B + (1 - s) m

with strength s: 1 is the published threshold, 0 the host's plain soft mask. The reference takes s = 0 for 1, and wakes
black cells in an evaluation at the model's lowest noise level; both are mended here.

    r = (t(sigma) - t(sigma_end)) / (t(sigma_first) - t(sigma_end)),    sigma_end = max(sigma_min, the run's last)

where t is the training timestep; for a flow model that is sigma itself.

Reference: Levin and Fried, "Differential Diffusion: Giving Each Pixel Its Strength" (2023), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lib_hires.run import FLOW, Call, Run
from lib_hires.settings import Settings, choice, number
from lib_hires.sites import MaskBlend
from lib_hires.technique import Curve, Patch, Picture, Refusal, Rest, Technique

SOFT_INPAINTING = "Soft Inpainting"  # the hosts' own, by its title
TIMESTEP, SIGMA, STEP = "Training time", "Noise level", "Step"

# Hosts hand noise levels over in float32: white must not miss the first evaluation by rounding.
_ROUNDING = 1e-6
# Mask value from which the finished picture alone is shown, at the least: a short way from the original pixels to the
# decoded ones, which differ a little even where nothing was painted.
_LEAST_SHOWN, _MOST_SHOWN = 0.05, 0.5


@dataclass(frozen=True)
class DifferentialDiffusionSettings(Settings):
    strength: float = number(
        1.0, 0.0, 1.0, 0.01,
        label="Strength",
        help="1: a pixel is left alone until its moment has come, and is then painted freely. 0: the mask's grey "
        "values fade the change evenly through all steps. Between: a part of both.",
    )  # fmt: skip
    axis: str = choice(
        TIMESTEP,
        (TIMESTEP, SIGMA, STEP),
        label="Threshold over",
        help="What grey is measured in: mid-grey begins to change when half of this is left. "
        f"{TIMESTEP} is as published; {SIGMA} lets grey change more, as most noise goes in the first steps; "
        f"{STEP} follows the sampler's own spacing.",
    )


def mask_in_force(mask: Tensor, remaining: float, strength: float = 1.0) -> Tensor:
    """s B + (1 - s) m with B = [m >= r] and [m > 0], for a soft mask m in 0..1 of any shape, 1 = repaint.

    Compared in float32; in the mask's own dtype. Strength 0 gives the very tensor back.
    """
    if strength == 0:
        return mask
    wide = mask.float()
    active = ((wide >= remaining - _ROUNDING) & (wide > 0)).float()
    return (strength * active + (1 - strength) * wide).to(mask.dtype)


def remaining_fraction(run: Run, axis: str = TIMESTEP) -> Callable[[float], float]:
    """r(sigma) of a run: 1 at its first noise level and above, 0 at its end; measured along `axis`."""
    place = _steps_left(run) if axis == STEP else _level(run, axis)
    first, end = place(run.sigma_first), place(min(run.sigmas))

    def remaining(sigma: float) -> float:
        # a run of no length has one evaluation, which is its first
        return 1.0 if first <= end else min(max((place(sigma) - end) / (first - end), 0.0), 1.0)

    return remaining


def _level(run: Run, axis: str) -> Callable[[float], float]:
    """Training time or noise level, counted from the lowest that the model knows."""
    if axis == SIGMA or run.model.prediction == FLOW:
        lowest = float(run.model.schedule.sigmas[0])
        return lambda sigma: max(sigma, lowest)
    return run.model.schedule.timestep


def _steps_left(run: Run) -> Callable[[float], float]:
    """Steps from a noise level to the run's end, fractional between two of its levels. By the level and not by the
    host's counter, as samplers of higher order evaluate more than once a step."""
    levels = np.array(sorted(run.sigmas))
    return lambda sigma: float(np.interp(sigma, levels, np.arange(len(levels))))


class DifferentialDiffusionPatch(Patch, MaskBlend):
    def __init__(self, settings: DifferentialDiffusionSettings, run: Run) -> None:
        super().__init__()
        self._settings = settings
        self._remaining = remaining_fraction(run, settings.axis)
        self._least = 1.0  # the lowest threshold that was in force

    def in_force(self, mask: Tensor, call: Call) -> Tensor:
        self.fired += 1
        remaining = self._remaining(call.sigma)
        self._least = min(self._least, remaining)
        return mask_in_force(mask, remaining, self._settings.strength)

    def at_end(self, mask: Tensor) -> Tensor:
        return mask_in_force(mask, 0.0, self._settings.strength)

    def shown(self, mask: Tensor, usual: Tensor) -> Tensor:
        """s min(1, m / m0) + (1 - s) usual, m0 the mask value below which nothing was painted.

        The latent changed as much as the mask allows; fading it once more in pixels would show two pictures at once.
        """
        strength = self._settings.strength
        full = min(max(self._least, _LEAST_SHOWN), _MOST_SHOWN)
        return usual if strength == 0 else strength * (mask / full).clamp(max=1) + (1 - strength) * usual

    def describe(self) -> str:
        return f"strength {self._settings.strength:g}, threshold over {self._settings.axis.lower()}"


def begin(settings: DifferentialDiffusionSettings, run: Run) -> DifferentialDiffusionPatch:
    """The patch for one run. Raises `Rest` without a mask, `Refusal` where another extension uses it already."""
    if run.mask is None:
        raise Rest("there is no mask: it acts when you inpaint (Inpaint, Inpaint sketch or Inpaint upload in img2img)")
    if SOFT_INPAINTING in run.other_scripts:
        raise Refusal(
            f"{SOFT_INPAINTING} is on, and it decides too what the mask's grey values mean: switch one of the two off"
        )
    return DifferentialDiffusionPatch(settings, run)


def curve(settings: DifferentialDiffusionSettings, run: Run) -> Curve:
    """The lightest grey that still waits, at each step."""
    remaining = remaining_fraction(_to_the_end(run), settings.axis)
    thresholds = tuple([remaining(sigma) for sigma in run.sigmas])
    return Curve(
        thresholds, ("darker pixels are still kept",) * len(thresholds), 0.0, 1.0, "mask value from which pixels change"
    )


def preview(settings: DifferentialDiffusionSettings, run: Run) -> tuple[Picture, ...]:
    """A sample mask, and the masks in force at the first step, the last one, and three between."""
    mask = sample_mask()
    remaining = remaining_fraction(_to_the_end(run), settings.axis)
    last = len(run.sigmas) - 1
    steps = sorted({round(last * part / 4) for part in range(5)})
    masks = [mask_in_force(mask, remaining(run.sigmas[step]), settings.strength) for step in steps]
    captions = [f"step {step + 1}" for step in steps]
    return Picture("sample mask", mask.numpy()), *map(Picture, captions, [mask.numpy() for mask in masks])


def _to_the_end(run: Run) -> Run:
    """The panel's runs name the levels that are evaluated; samplers name the end as well."""
    return replace(run, sigmas=(*run.sigmas, 0.0))


def sample_mask(width: int = 48, height: int = 36) -> Tensor:
    """A ramp from black to white above, and a white disc with a soft edge on black below. [h, w] in 0..1."""
    top = height // 3
    ramp = torch.linspace(0, 1, width).expand(top, width)
    y, x = torch.meshgrid(torch.arange(height - top) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    distance = torch.hypot(x - width / 2, y - (height - top) / 2)
    return torch.cat([ramp, (0.95 - distance / (height - top) * 2).mul(1.6).clamp(0, 1)])


TECHNIQUE = Technique(
    name="differential_diffusion",
    title="Differential Diffusion",
    family="Inpainting",
    summary="For inpainting with soft masks: the grey value of the mask says how much each pixel may change. Black "
    "keeps the picture, white is painted freely, and grey changes details but keeps the shapes: the darker, the less. "
    "Grey comes from Mask blur, from a mask in Inpaint upload, or from Inpaint sketch: its mask transparency, in Forge "
    "the brush's opacity and softness. The brush of the Inpaint tab paints white.",
    source="Differential Diffusion: Giving Each Pixel Its Strength (Levin and Fried 2023)",
    settings=DifferentialDiffusionSettings,
    begin=begin,
    presets={
        "As published": DifferentialDiffusionSettings(),
        "Half soft": DifferentialDiffusionSettings(strength=0.5),
        "Plain soft mask": DifferentialDiffusionSettings(strength=0.0),
    },
    curve=curve,
    preview=preview,
    grey_mask=True,
)
