"""Scale fusion (FreeScale): coarse content from windows of the native size, fine content from the whole map.

With G a Gaussian blur over the map, and local the average of self-attention in half overlapping windows,

    out = global - G(global) + G(local) = global + G(local - global)

so one blur does (G is linear). It acts before the output projection: that is affine and per token, so it commutes with
a blur over positions, and its bias cancels in the difference, whatever the borders do. Borders repeat, so that they
are not dimmed. Windows have the size of the layer's map at the model's native size, and lie inside the map.

The released code blurs across channels as well, with empty borders: `released_blur`. There the two orders differ; the
released one blurs after the projection, which this site does not reach, so the switch is its kernel and not its
picture.

Neighbourhood (ScaleDiff) is one pass instead of two: disjoint windows of half the native size ask the native-sized
window around them, which stays inside the map.

Reference: Qiu et al., FreeScale (2024), eq. 7 to 9; ScaleDiff (2025) for the neighbourhood.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_hires.run import Call, Run, Size
from lib_hires.settings import Settings, choice, number, passes_choice, toggle, window_end, window_start
from lib_hires.sites import Attend, Place, SelfAttention
from lib_hires.technique import Patch, Technique
from lib_hires.techniques.attention.curves import Levels, area, check_run, only_above_native
from lib_hires.tiling import (
    Corners,
    Remembered,
    Windows,
    attend_in,
    averaged,
    corners,
    even_tiles,
    owned,
    seeded,
    shifted,
    strided_grids,
    tile_starts,
    tokens_in,
    window_starts,
)
from lib_hires.token_blur import blur, gaussian
from lib_hires.topology import AttentionLayer
from lib_hires.window import Windowed

FUSION, FAST, NEIGHBOURHOOD = "Fusion", "Fast fusion", "Neighbourhood"

Shift = Callable[[Corners], Corners]  # moves windows inside the map


@dataclass(frozen=True)
class ScaleFusionSettings(Windowed, Settings):
    mode: str = choice(
        FUSION, (FUSION, FAST, NEIGHBOURHOOD),
        label="Mode",
        help="Fusion: windows and the whole map. Fast fusion: the whole map in strided grids, cheaper from 3x on. "
        "Neighbourhood: only the surroundings of each place, cheaper than plain attention.",
    )  # fmt: skip
    window_size: float = number(
        1.0, 0.5, 2.0, 0.05,
        label="Window size",
        help="Side of the windows, in native sizes. Smaller brings more local detail and more repetition.",
    )  # fmt: skip
    blur_sigma: float = number(
        1.0, 0.2, 4.0, 0.1,
        label="Blur sigma",
        help="What counts as coarse, in cells of a map. Larger leaves less to the windows. Not used by Neighbourhood.",
    )  # fmt: skip
    jitter: bool = toggle(
        True,
        label="Jitter",
        help="Moves the windows a little from step to step, so that no border stays in one place. Repeatable by seed.",
    )
    released_blur: bool = toggle(
        False,
        label="Released blur",
        help="Blurs across feature channels too, with empty borders, as the released FreeScale code does.",
    )
    only_above_native: bool = only_above_native()
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()


def overlapping_windows(size: Size, side: Size, shift: Shift | None = None) -> Windows:
    """Half overlapping windows, each asking itself, averaged where they overlap."""
    rows, columns = (window_starts(length, most) for length, most in zip(size, side, strict=True))
    windows = corners(rows, columns)
    tokens = tokens_in(shift(windows) if shift else windows, side, size)
    return averaged(tokens, tokens)


def neighbourhoods(size: Size, side: Size, shift: Shift | None = None) -> Windows:
    """Disjoint windows of half the side, each asking the window of full side around it, clamped into the map."""
    asking, rows_and_columns, around = [], [], []
    for length, full in zip(size, side, strict=True):
        count, half = even_tiles(length, max(full // 2, 1))
        starts = tile_starts(length, count, half, (count * half - length) // 2)
        asking.append(half)
        rows_and_columns.append(starts)
        around.append([min(max(start - (full - half) // 2, 0), length - full) for start in starts])
    (rows, columns), half_side = rows_and_columns, (asking[0], asking[1])
    windows = corners(*around)
    keys = tokens_in(shift(windows) if shift else windows, side, size)
    queries = tokens_in(corners(rows, columns), half_side, size)
    return owned(queries, keys, rows, columns, half_side, size)


def fused(whole: Tensor, local: Tensor, size: Size, weights: list[float], released: bool) -> Tensor:
    """global + G(local - global), FreeScale eq. 9 with one blur."""
    return whole + blur(local - whole, size, weights, channels=released, zero_borders=released)


class ScaleFusionPatch(Patch, SelfAttention):
    def __init__(self, settings: ScaleFusionSettings, run: Run) -> None:
        super().__init__()
        self._settings = settings
        self._run = run
        self._window = settings.window(run)
        self._levels = Levels(run)
        self._remembered = Remembered(run)

    def may_act(self, layer: AttentionLayer, call: Call) -> bool:
        return call.sigma in self._window

    def acts_at(self, place: Place) -> bool:
        if self._side(place) == place.size:
            return False
        return self._levels.is_above_native(place) or not self._settings.only_above_native

    def draws_at(self, place: Place) -> bool:
        side = self._side(place)
        between_borders = (
            length - window > (0 if self._settings.mode == NEIGHBOURHOOD else window // 2)
            for length, window in zip(place.size, side, strict=True)
        )
        return self._jitter(side) > 0 and any(between_borders)  # windows at a border keep to it

    def attend(self, q: Tensor, k: Tensor, v: Tensor, place: Place, inner: Attend) -> Tensor:
        if k.shape[1] != area(place.size):
            return inner(q, k, v)
        self.fired += 1
        local = attend_in(self._windows(place, q.device), q, k, v, inner)
        if self._settings.mode == NEIGHBOURHOOD:
            return local
        whole = self._global(q, k, v, place, inner)
        return fused(whole, local, place.size, self._weights(place), self._settings.released_blur)

    def _global(self, q: Tensor, k: Tensor, v: Tensor, place: Place, inner: Attend) -> Tensor:
        stride = self._scale(place, round)
        if self._settings.mode != FAST or stride == (1, 1):
            return inner(q, k, v)
        key = FAST, place.size, stride, q.device
        grids = self._remembered.get(key, lambda: strided_grids(place.size, stride).to(q.device))
        return attend_in(grids, q, k, v, inner)

    def _windows(self, place: Place, device: torch.device) -> Windows:
        size, side = place.size, self._side(place)
        most = self._jitter(side)
        kind = neighbourhoods if self._settings.mode == NEIGHBOURHOOD else overlapping_windows

        def shift(windows: Corners) -> Corners:
            return shifted(windows, most, side, size, seeded(place)) if most else windows

        key = kind, size, side, device, (place.seed, place.call.sigma) if most else None
        return self._remembered.get(key, lambda: kind(size, side, shift).to(device))

    def _jitter(self, side: Size) -> int:
        """By how many tokens a window may move."""
        return min(side) // 8 if self._settings.jitter else 0

    def _side(self, place: Place) -> Size:
        """The window: this layer's map at native size, inside the map."""
        height, width = (
            min(max(round(native * self._settings.window_size), 1), length)
            for native, length in zip(self._levels.trained(place.layer), place.size, strict=True)
        )
        return height, width

    def _scale(self, place: Place, whole: Callable[[float], int]) -> Size:
        """Map by window along both axes, as whole numbers."""
        height, width = (
            max(whole(length / side), 1) for length, side in zip(place.size, self._side(place), strict=True)
        )
        return height, width

    def _weights(self, place: Place) -> list[float]:
        """FreeScale's kernel has 2 scale - 1 taps; with less than 2x it would be one tap, and all would be local."""
        return gaussian(2 * max(2, *self._scale(place, math.ceil)) - 1, self._settings.blur_sigma)

    def describe(self) -> str:
        height, width = self._run.model.native
        share = self._settings.window_size
        return f"{self._settings.mode.lower()}, windows of {round(width * share)}x{round(height * share)} latent cells"


def begin(settings: ScaleFusionSettings, run: Run) -> ScaleFusionPatch:
    """The patch for one run. Raises `Refusal` on a model without UNet blocks, `Rest` at native size."""
    check_run(run, "Scale fusion", settings.only_above_native)
    return ScaleFusionPatch(settings, run)


TECHNIQUE = Technique(
    name="scale_fusion",
    title="Scale fusion",
    family="Attention",
    summary="Takes coarse content from native-sized windows and fine content from the whole picture: less repetition "
    "at 2x and more.",
    source="Qiu et al., FreeScale (2024); ScaleDiff (2025) for the neighbourhood mode",
    settings=ScaleFusionSettings,
    begin=begin,
    presets={
        "Default": ScaleFusionSettings(),
        "Fast (3x and more)": ScaleFusionSettings(mode=FAST),
        "Neighbourhood (faster than off)": ScaleFusionSettings(mode=NEIGHBOURHOOD),
        "Early steps only": ScaleFusionSettings(end=0.5),
        "As FreeScale's code": ScaleFusionSettings(released_blur=True),
    },
    cost="+40 % time",
)
