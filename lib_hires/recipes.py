"""Recipes: presets over several techniques, by purpose. All need Hires. fix, or img2img at a larger size.

The denoising strength is part of a recipe where it matters: the cascade sets it for the host's hires pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lib_hires.registry import BY_NAME
from lib_hires.settings import HIRES, Settings
from lib_hires.techniques.attention.scale_fusion import ScaleFusionSettings
from lib_hires.techniques.hires.cascade import CascadeSettings
from lib_hires.techniques.hires.iterative_mixing import IterativeMixingSettings
from lib_hires.techniques.hires.low_band_lock import LowBandLockSettings
from lib_hires.techniques.hires.relay import RelaySettings
from lib_hires.techniques.unet.dilation import DilationSettings
from lib_hires.techniques.unet.freeu import V1, FreeUSettings


@dataclass(frozen=True)
class Recipe:
    """What is switched on, with its settings; `summary` is one sentence for a new user."""

    name: str
    summary: str
    selection: Mapping[str, Settings]


_LOCK = {"low_band_lock": LowBandLockSettings()}
_FREESCALE: Mapping[str, Settings] = {
    "iterative_mixing": IterativeMixingSettings(),
    "dilation": DilationSettings(passes=HIRES),
    # the paper fuses to the end; without the last quarter there is less grain than in plain Hires. fix (README)
    "scale_fusion": ScaleFusionSettings(passes=HIRES, end=0.75),
    "freeu": FreeUSettings(version=V1, b1=1.1, b2=1.2, s1=0.6, s2=0.4),
}

RECIPES = (
    Recipe(
        "2x faithful",
        "Twice as large and as close to the small picture as it gets: mixed with it throughout.",
        {"iterative_mixing": IterativeMixingSettings(alpha=0.5), "cascade": CascadeSettings(denoise="0.9")},
    ),
    Recipe(
        "2x more detail",
        "Twice as large; the composition is held while it forms, and the model draws new detail.",
        {**_LOCK, "cascade": CascadeSettings(denoise="0.7")},
    ),
    Recipe(
        "4x cascade",
        "Four times as large in two stages, each held to the picture before. Set Hires. fix to 4.",
        {**_LOCK, "cascade": CascadeSettings(denoise="0.7, 0.5")},
    ),
    Recipe(
        "FreeScale 2x",
        "Everything that the paper has: restart at 30 %, detail level, dilation, scale fusion and FreeU. For SDXL. "
        "Scale fusion stops at three quarters, as its last steps add grain.",
        {**_FREESCALE, "cascade": CascadeSettings(denoise="0.7")},
    ),
    Recipe(
        "FreeScale 4x",
        "The same in stages of twice the size. Set Hires. fix to 4. Slow.",
        {**_FREESCALE, "cascade": CascadeSettings(denoise="0.7, 0.7")},
    ),
    Recipe(
        "Fast 2x (relay)",
        "The small picture stops early and the large one takes over: the fewest evaluations.",
        {**_LOCK, "relay": RelaySettings()},
    ),
)
# every recipe switches all of these on or off
MANAGED = tuple(name for name in BY_NAME if any(name in recipe.selection for recipe in RECIPES))


def find_recipe(name: object) -> Recipe | None:
    """The recipe of this name, in any case."""
    wanted = str(name).strip().lower()
    return next((recipe for recipe in RECIPES if recipe.name.lower() == wanted), None)
