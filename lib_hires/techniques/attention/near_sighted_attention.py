"""Near-sighted Attention: tiles that see fewer tokens of themselves, and of the whole map.

Near-sighted Tile and Slothful Attention in one: with s the rate of a layer and time as in Slothful, a tile's keys are
one (sampled or pooled) of every s of its own tokens and one of every max(1, s) * tiles / ratio tokens of the map,
pooled over s tokens too. Sources are reduced before K and V are projected. A map of one tile is reduced as a whole.

Differs from the reference: nothing is padded (tiles overlap at sizes that are not divisible, the nearest one answers);
any UNet's depth is known; the first attention level of SDXL is always tiled.

Reference: MitoshiroPJ, Near-sighted Attention (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_hires.run import Call, Run
from lib_hires.settings import choice, integer, number, passes_choice, window_end, window_start
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
from lib_hires.tiling import Remembered, Windows, attend_in, rows_of, seeded
from lib_hires.tokens import AVG_2D, MODES, Reduction, reduced
from lib_hires.topology import OUTPUT, AttentionLayer
from lib_hires.window import Windowed


@dataclass(frozen=True)
class NearSightedAttentionSettings(Windowed, TimedSettings):
    base_tile_size: int = integer(
        24, 8, 128,
        label="Base tile size",
        help="Largest side of a tile, away from the peak time, in cells of a map: 64 is 512 px at full resolution.",
    )  # fmt: skip
    peak_tile_size: int = integer(32, 8, 128, label="Peak tile size", help="The same at the peak time.")
    base_global_ratio: float = global_ratio(
        0.2,
        "Base global ratio",
        "How much of the whole map a tile sees away from the peak time, in tiles. More keeps the picture consistent.",
    )
    peak_global_ratio: float = global_ratio(0.8, "Peak global ratio", "The same at the peak time.")
    peak_time: float = peak_time()
    time_decay: float = time_decay()
    tiling_max_depth: int = integer(
        2, 1, 3,
        label="Tiling max depth",
        help="How many levels are tiled, from full resolution down. Where attention begins deeper, as in SDXL, its "
        "first level always is.",
    )  # fmt: skip
    in_slothful: float = number(
        6.0, 0.0, 50.0, 0.5,
        label="In slothful",
        help="Input blocks keep about one of this many tokens as keys and values. With small tiles, high rates leave "
        "too few. 1 and below: all.",
    )  # fmt: skip
    out_slothful: float = number(4.0, 0.0, 50.0, 0.5, label="Out slothful", help="The same in output blocks.")
    in_mode: str = choice(
        AVG_2D, MODES, label="In mode", help="How input blocks pool tokens where a blend asks for it."
    )
    out_mode: str = choice(
        AVG_2D, MODES, label="Out mode", help="How output blocks pool tokens. AVG looks softer, MAX harder."
    )
    in_k_blend: float = number(
        0.0, 0.0, 1.0, 0.05, label="In k blend", help="Pooled share of the keys in input blocks. More has less noise."
    )
    in_v_blend: float = number(
        0.0, 0.0, 1.0, 0.05, label="In v blend", help="Pooled share of the values in input blocks."
    )
    out_k_blend: float = number(
        0.0, 0.0, 1.0, 0.05, label="Out k blend", help="Pooled share of the keys in output blocks."
    )
    out_v_blend: float = number(
        0.0,
        0.0,
        1.0,
        0.05,
        label="Out v blend",
        help="Pooled share of the values in output blocks: contrast, sharpness.",
    )
    in_depth_decay: float = number(
        2.0, 0.0, 4.0, 0.1, label="In depth decay", help="How fast the rate falls deeper in the input blocks."
    )
    out_depth_decay: float = number(
        2.0, 0.0, 4.0, 0.1, label="Out depth decay", help="How fast the rate falls deeper in the output blocks."
    )
    shift_tiles: bool = shift_tiles()
    only_where_faster: bool = only_where_faster()
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()


@dataclass(frozen=True)
class NearSight:
    """What one layer does in one call: its tiles, and how their tokens and the map's are reduced to keys."""

    tiles: Tiles
    local: Reduction
    whole: Reduction | None

    @classmethod
    def of(cls, tiles: Tiles, ratio: float, rate: float, mode: str) -> NearSight:
        local = Reduction.of(mode, tiles.side, rate, rate)
        if tiles.count == 1 or ratio <= 0:
            return cls(tiles, local, None)
        return cls(tiles, local, Reduction.of(mode, tiles.size, rate, max(1.0, rate) * tiles.count / ratio))

    @property
    def seen(self) -> int:
        """Keys that one query meets."""
        return self.local.count + (self.whole.count if self.whole else 0)

    @property
    def sources(self) -> int:
        return self.seen + (self.tiles.count - 1) * self.local.count

    def reduced(
        self, key: Tensor, value: Tensor, tokens: Tensor, k_blend: float, v_blend: float
    ) -> tuple[Tensor, Tensor]:
        """Sources [B, sources, C]: the reduced tokens of every tile (`tokens` numbers them), then those of the map."""
        keys, values = self._local(key, value, tokens, k_blend, v_blend)
        if self.whole is None:
            return keys, values
        more_keys, more_values = reduced(key, value, self.whole, k_blend, v_blend)
        joined = torch.cat([keys, more_keys], dim=1)
        return joined, joined if values is keys else torch.cat([values, more_values], dim=1)

    def _local(
        self, key: Tensor, value: Tensor, tokens: Tensor, k_blend: float, v_blend: float
    ) -> tuple[Tensor, Tensor]:
        tiled = rows_of(key, tokens)
        same = value is key
        keys, values = reduced(tiled, tiled if same else rows_of(value, tokens), self.local, k_blend, v_blend)
        shape = len(key), self.tiles.count * self.local.count, key.shape[-1]
        joined = keys.reshape(shape)
        return joined, joined if values is keys else values.reshape(shape)

    def windows(self) -> Windows:
        """Tiles that ask their own reduced tokens and the map's."""
        count, each = self.tiles.count, self.local.count
        keys = torch.arange(count * each).reshape(count, each)
        more = torch.arange(count * each, self.sources).expand(count, -1)
        return self.tiles.asking(torch.cat([keys, more], dim=1))


class NearSightedAttentionPatch(Patch, SelfAttention):
    def __init__(self, settings: NearSightedAttentionSettings, run: Run) -> None:
        super().__init__()
        self._settings = settings
        self._run = run
        self._window = settings.window(run)
        self._levels = Levels(run)
        self._remembered = Remembered(run)
        self._reduced: Place | None = None  # where the sources at hand are ours

    def may_act(self, layer: AttentionLayer, call: Call) -> bool:
        return call.sigma in self._window

    def acts_at(self, place: Place) -> bool:
        sight = self._sight(place)
        if sight.tiles.count == 1 and sight.local.count == area(place.size):
            return False
        faster = self._levels.is_above_native(place) and sight.seen < area(place.size)
        return faster or not self._settings.only_where_faster

    def draws_at(self, place: Place) -> bool:
        return self._settings.shift_tiles and self._sight(place).tiles.have_room

    def sources(self, key_source: Tensor, value_source: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        self._reduced = None
        if not key_source.shape[1] == value_source.shape[1] == area(place.size):
            return key_source, value_source
        self.fired += 1
        self._reduced = place
        s, sight, device = self._settings, self._sight(place), key_source.device
        blends = (s.out_k_blend, s.out_v_blend) if place.layer.side == OUTPUT else (s.in_k_blend, s.in_v_blend)
        tokens = self._remembered.get((sight.tiles, device), lambda: sight.tiles.tokens().to(device))
        return sight.reduced(key_source, value_source, tokens, *blends)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, place: Place, inner: Attend) -> Tensor:
        sight = self._sight(place)
        if sight.tiles.count == 1 or self._reduced != place or k.shape[1] != sight.sources:
            return inner(q, k, v)
        windows = self._remembered.get((sight, q.device), lambda: sight.windows().to(q.device))
        return attend_in(windows, q, k, v, inner)

    def _sight(self, place: Place) -> NearSight:
        s, layer = self._settings, place.layer
        weight = s.weight(self._run, place.call.sigma)
        on_the_way_out = layer.side == OUTPUT
        rate, decay = (s.out_slothful, s.out_depth_decay) if on_the_way_out else (s.in_slothful, s.in_depth_decay)
        rate *= weight * self._levels.decay(layer, decay)
        ratio = between(s.base_global_ratio, s.peak_global_ratio, weight)
        return NearSight.of(self._tiles(place, weight), ratio, rate, s.out_mode if on_the_way_out else s.in_mode)

    def _tiles(self, place: Place, weight: float) -> Tiles:
        s = self._settings
        if not self._levels.is_within(place.layer, s.tiling_max_depth):
            return Tiles.of(place.size, max(place.size), None)
        rng = seeded(place) if s.shift_tiles else None
        return Tiles.of(place.size, round(between(s.base_tile_size, s.peak_tile_size, weight)), rng)

    def describe(self) -> str:
        s = self._settings
        return (
            f"tiles of {s.base_tile_size} to {s.peak_tile_size}, 1 of {s.in_slothful:g} tokens in and 1 of "
            f"{s.out_slothful:g} out, with {s.base_global_ratio:g} to {s.peak_global_ratio:g} of the map"
        )


def begin(settings: NearSightedAttentionSettings, run: Run) -> NearSightedAttentionPatch:
    """The patch for one run. Raises `Refusal` on a model without UNet blocks, `Rest` at native size."""
    check_run(run, "Near-sighted Attention", settings.only_where_faster)
    return NearSightedAttentionPatch(settings, run)


def curve(settings: NearSightedAttentionSettings, run: Run) -> Curve:
    """The rate where it is highest, at every step of a run."""
    window, rate = settings.window(run), max(settings.in_slothful, settings.out_slothful)
    values = [rate * settings.weight(run, sigma) for sigma in run.sigmas]
    phases = tuple(["tiled" if sigma in window else "plain" for sigma in run.sigmas])
    return Curve(tuple([max(value, 1.0) for value in values]), phases, 1.0, max(2.0, *values), "tokens per key")


_SIMPLE = NearSightedAttentionSettings(in_slothful=4.0, out_slothful=4.0, in_depth_decay=1.5, out_depth_decay=1.5)

TECHNIQUE = Technique(
    name="near_sighted_attention",
    title="Near-sighted Attention",
    family="Attention",
    summary="Near-sighted Tile and Slothful Attention in one: the fastest of the three, with the most to adjust.",
    source="MitoshiroPJ's Near-sighted Attention (2023)",
    settings=NearSightedAttentionSettings,
    begin=begin,
    presets={
        "Default": NearSightedAttentionSettings(),
        "Simple (rate 4)": _SIMPLE,
        "Consistent": NearSightedAttentionSettings(
            base_tile_size=48, peak_tile_size=64, base_global_ratio=0.5, peak_global_ratio=1.0
        ),
        "Gentle": NearSightedAttentionSettings(base_tile_size=48, peak_tile_size=48, in_slothful=2.0, out_slothful=2.0),
    },
    curve=curve,
)
