"""What a technique is: a declaration, and a function that makes its patch for one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib_hires.run import Run
from lib_hires.settings import Settings
from lib_hires.topology import UNetTopology


class Refusal(Exception):
    """The technique cannot act on this model or with these values. The text says why and what to change."""


class Rest(Exception):
    """Nothing to do in this run (a pass not chosen, a size at or below native). Told in the log, no warning."""


def unet_of(run: Run, need: str) -> UNetTopology:
    """The run's UNet. Raises `Refusal` where there is none; `need` says who needs it: "FreeU changes UNet blocks"."""
    if run.model.unet is None:
        raise Refusal(f"{run.model.no_unet_reason}, and {need}: switch it off for this model")
    return run.model.unet


def check_above_native(run: Run) -> None:
    """Raises `Rest` where the picture has no more cells than the model was trained for."""
    (height, width), (native_height, native_width) = run.latent, run.model.native
    if height * width <= native_height * native_width:
        raise Rest(f"latent {width}x{height} is not above the native {native_width}x{native_height}")


class Patch:
    """A technique at work in one run. Holds the run's state and dies with it. Derive also from the sites it uses."""

    def __init__(self) -> None:
        self.fired = 0  # how often it changed something; 0 at the end of a run is told as a warning

    def describe(self) -> str:
        """What was resolved, for the log line: blocks and noise levels."""
        return ""

    def warning(self) -> str:
        """What may spoil the picture though it was done as asked; empty where nothing may."""
        return ""


@dataclass(frozen=True)
class Curve:
    """Data for the small live plot: one value per step, and the name of the phase that each step belongs to.

    Its tuples are made from lists. While reForge builds the page, another thread of it loads the model and holds
    `gc.get_objects()` meanwhile; a tuple that grows from a generator then fails with a SystemError (CPython resizes
    only a tuple that nobody else knows), and with it the page.
    """

    values: tuple[float, ...]
    phases: tuple[str, ...]
    low: float
    high: float
    caption: str


@dataclass(frozen=True)
class Picture:
    """One of a row of small pictures in the panel: grey values [h, w] in 0..1, 1 = white."""

    caption: str
    grey: np.ndarray


@dataclass(frozen=True)
class Technique:
    """One named system. `begin` raises `Refusal` or `Rest` where the technique does not act."""

    name: str  # key in the API and in presets
    title: str  # what people call it; prefix of its infotext keys
    family: str  # heading under which the panel shows it
    summary: str  # one sentence for a new user: what it does for the picture and when to use it
    source: str  # paper or reference
    settings: type[Settings]
    begin: Callable[[Any, Run], Patch] | None = None  # None: it does nothing inside a run
    presets: Mapping[str, Settings] = field(default_factory=dict)
    curve: Callable[[Any, Run], Curve] | None = None
    # (settings, stages.HiresPass, stages.Stage list) -> such a list: divides a hires pass; raises `Rest`, `Refusal`
    stages: Callable[[Any, Any, list[Any]], list[Any]] | None = None
    schedules: bool = False  # its patch is a `Schedule`: it begins before the sampler has its noise levels
    preview: Callable[[Any, Run], tuple[Picture, ...]] | None = None
    grey_mask: bool = False  # it reads an inpainting mask's grey values, which hosts round to black and white
    twins: tuple[str, ...] = ()  # how titles of other scripts begin that do the same: both at once would do it twice
    cost: str = ""  # shown in the label where the technique makes sampling slower, e.g. "+50 % time"
