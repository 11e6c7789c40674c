"""Near-sighted Tile: self-attention inside tiles, which also see samples of the whole map.

A map of h x w tokens is cut into ceil(h / tile) x ceil(w / tile) near-equal tiles. The queries of a tile ask the keys
of that tile and one of every (number of tiles / ratio) tokens of the map, ceil(sqrt) rows apart. Tile size and ratio
go from their base to their peak values with exp(-((t - peak time) * decay)^2).

Differs from the reference: nothing is padded (at sizes that are not divisible tiles overlap, and the nearest one
answers), rows and columns of the samples are not exchanged, and the first attention level of SDXL is always tiled.

Reference: MitoshiroPJ, Near-sighted Tile (2023); tiles as in HyperTile (tfernd, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_hires.run import Call, Run, Size
from lib_hires.settings import integer, passes_choice, window_end, window_start
from lib_hires.sites import Attend, Place, SelfAttention
from lib_hires.technique import Curve, Patch, Technique
from lib_hires.techniques.attention.curves import (
    Levels,
    TimedSettings,
    area,
    between,
    check_run,
    peak_time,
    time_decay,
)
from lib_hires.techniques.attention.tiles import Tiles, global_ratio, only_where_faster, shift_tiles
from lib_hires.tiling import Remembered, Windows, attend_in, seeded
from lib_hires.tokens import AVG_2D, Reduction
from lib_hires.topology import AttentionLayer
from lib_hires.window import Windowed


@dataclass(frozen=True)
class NearSightedTileSettings(Windowed, TimedSettings):
    base_tile_size: int = integer(
        32, 8, 128,
        label="Base tile size",
        help="Largest side of a tile, away from the peak time, in cells of a map: 64 is 512 px at full resolution. "
        "Smaller is faster and may improve detail; larger keeps the picture consistent.",
    )  # fmt: skip
    peak_tile_size: int = integer(32, 8, 128, label="Peak tile size", help="The same at the peak time.")
    base_global_ratio: float = global_ratio(
        0.5,
        "Base global ratio",
        "How much of the whole map a tile sees away from the peak time, in tiles. More keeps the picture consistent.",
    )
    peak_global_ratio: float = global_ratio(0.5, "Peak global ratio", "The same at the peak time.")
    peak_time: float = peak_time()
    time_decay: float = time_decay()
    tiling_max_depth: int = integer(
        2, 1, 3,
        label="Tiling max depth",
        help="How many levels are tiled, from full resolution down. Where attention begins deeper, as in SDXL, its "
        "first level always is.",
    )  # fmt: skip
    shift_tiles: bool = shift_tiles()
    only_where_faster: bool = only_where_faster()
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()


def samples_of_map(size: Size, rate: float) -> Tensor:
    """Token numbers of about one of every `rate` tokens."""
    everything = torch.arange(area(size))[None, :, None]
    return Reduction.of(AVG_2D, size, 1, rate)(everything, 0)[0, :, 0]


def tiles_with_samples(tiles: Tiles, ratio: float) -> Windows:
    """Tiles that ask their own tokens and, at a ratio above 0, samples of the whole map."""
    local = tiles.tokens()
    if ratio <= 0:
        return tiles.asking(local)
    samples = samples_of_map(tiles.size, tiles.count / ratio)
    return tiles.asking(torch.cat([local, samples.expand(len(local), -1)], dim=1))


class NearSightedTilePatch(Patch, SelfAttention):
    def __init__(self, settings: NearSightedTileSettings, run: Run) -> None:
        super().__init__()
        self._settings = settings
        self._run = run
        self._window = settings.window(run)
        self._levels = Levels(run)
        self._remembered = Remembered(run)

    def may_act(self, layer: AttentionLayer, call: Call) -> bool:
        return call.sigma in self._window and self._levels.is_within(layer, self._settings.tiling_max_depth)

    def acts_at(self, place: Place) -> bool:
        tiles, ratio = self._tiles(place)
        if tiles.count == 1:
            return False
        seen = tiles.area * (1 + ratio)  # tiles x ratio x map / tiles, in tokens
        faster = self._levels.is_above_native(place) and seen < area(place.size)
        return faster or not self._settings.only_where_faster

    def draws_at(self, place: Place) -> bool:
        return self._settings.shift_tiles and self._tiles(place)[0].have_room

    def attend(self, q: Tensor, k: Tensor, v: Tensor, place: Place, inner: Attend) -> Tensor:
        if k.shape[1] != area(place.size):
            return inner(q, k, v)
        self.fired += 1
        tiles, ratio = self._tiles(place)
        windows = self._remembered.get((tiles, ratio, q.device), lambda: tiles_with_samples(tiles, ratio).to(q.device))
        return attend_in(windows, q, k, v, inner)

    def _tiles(self, place: Place) -> tuple[Tiles, float]:
        s = self._settings
        weight = s.weight(self._run, place.call.sigma)
        most = round(between(s.base_tile_size, s.peak_tile_size, weight))
        rng = seeded(place) if s.shift_tiles else None
        return Tiles.of(place.size, most, rng), between(s.base_global_ratio, s.peak_global_ratio, weight)

    def describe(self) -> str:
        s = self._settings
        return (
            f"tiles of {s.base_tile_size} to {s.peak_tile_size} with {s.base_global_ratio:g} to "
            f"{s.peak_global_ratio:g} of the map, in {s.tiling_max_depth} levels"
        )


def begin(settings: NearSightedTileSettings, run: Run) -> NearSightedTilePatch:
    """The patch for one run. Raises `Refusal` on a model without UNet blocks, `Rest` at native size."""
    check_run(run, "Near-sighted Tile", settings.only_where_faster)
    return NearSightedTilePatch(settings, run)


def curve(settings: NearSightedTileSettings, run: Run) -> Curve:
    """The tile size at every step of a run."""
    s, window = settings, settings.window(run)
    values = [between(s.base_tile_size, s.peak_tile_size, s.weight(run, sigma)) for sigma in run.sigmas]
    phases = tuple(["tiled" if sigma in window else "plain" for sigma in run.sigmas])
    return Curve(tuple(values), phases, 0.0, max(values), "tile size")


TECHNIQUE = Technique(
    name="near_sighted_tile",
    title="Near-sighted Tile",
    family="Attention",
    summary="Self-attention sees tiles and samples of the whole picture: faster above native size, finer detail.",
    source="MitoshiroPJ's Near-sighted Tile (2023)",
    settings=NearSightedTileSettings,
    begin=begin,
    presets={
        "Default": NearSightedTileSettings(),
        "Native tiles, fast": NearSightedTileSettings(
            base_tile_size=64, peak_tile_size=64, base_global_ratio=0.1, peak_global_ratio=0.1
        ),
        "Fine detail": NearSightedTileSettings(base_tile_size=16, peak_tile_size=24),
        "Consistent": NearSightedTileSettings(base_global_ratio=1.0, peak_global_ratio=1.0),
        "Larger at the peak": NearSightedTileSettings(
            peak_time=0.3, peak_tile_size=48, base_global_ratio=1.0, peak_global_ratio=0.5
        ),
        "SDXL": NearSightedTileSettings(
            base_tile_size=64, peak_tile_size=64, base_global_ratio=0.3, peak_global_ratio=0.3
        ),
    },
    curve=curve,
)
