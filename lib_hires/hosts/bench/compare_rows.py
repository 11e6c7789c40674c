"""The rows that the bench can draw: what is switched on, at which size, and which rows belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from lib_hires.generation import Generation
from lib_hires.hosts.bench.model import NATIVE_SIZE
from lib_hires.recipes import find_recipe
from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.settings import HIRES, Settings, params_of


@dataclass(frozen=True)
class Row:
    """One line of the table: a size, and the presets of the techniques that are on, with what differs from them."""

    title: str
    width: int
    height: int
    presets: tuple[tuple[str, str], ...] = ()  # (technique, preset)
    cfg_scale: float | None = None  # None: that of the command line
    changes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # by technique
    hires_scale: float = 1.0  # above 1: a first pass at the size divided by it, then a hires pass at the size
    hires_denoise: float = 1.0
    recipe: str = ""  # a recipe instead of presets
    direct: str = ""  # the row that draws at this size directly: its work counts as 1
    against: str = ""  # the row that this one is compared with, picture by picture

    def generation(self) -> Generation:
        return Generation(self.selection())

    def selection(self) -> dict[str, Settings]:
        """Settings of all techniques that are on."""
        recipe = find_recipe(self.recipe)
        if recipe is not None:
            return dict(recipe.selection)
        presets = {name: BY_NAME[name].presets[preset] for name, preset in self.presets}
        return {name: replace(preset, **self.changes.get(name, {})) for name, preset in presets.items()}


_N = NATIVE_SIZE
_HARD_CUT = (("deep_shrink", "2x, hard cut"),)
_GRADUAL = (("deep_shrink", "Default (2x, gradual)"),)
_FIRST = (("deep_shrink", "2x, composition first"),)

SIZE_ROWS: dict[str, Row] = {
    "native": Row("native", _N, _N),
    "naive": Row("naive 2x", 2 * _N, 2 * _N),
    "hard-cut": Row("DeepShrink 2x, hard cut", 2 * _N, 2 * _N, _HARD_CUT),
    "deep-shrink": Row("DeepShrink 2x, gradual", 2 * _N, 2 * _N, _GRADUAL),
    "composition": Row("DeepShrink 2x, composition first", 2 * _N, 2 * _N, _FIRST),
    "naive-wide": Row("naive 1x2", 2 * _N, _N),
    "deep-shrink-wide": Row("DeepShrink 1x2, composition first", 2 * _N, _N, _FIRST),
}

_DILATION = ("dilation", "Automatic (FreeScale)")
_FUSION = ("scale_fusion", "Default")
_SLOTHFUL = ("slothful", "Default")
_NEIGHBOURHOOD = ("scale_fusion", "Neighbourhood (faster than off)")
# Tiles of the bench's native size that see nothing else: each draws its own object, as it should without help.
_TILES = ("near_sighted_tile", "Native tiles, fast")
_ALONE = {"base_tile_size": 16, "peak_tile_size": 16, "base_global_ratio": 0.0, "peak_global_ratio": 0.0}

UNET_ROWS: dict[str, Row] = {
    "dilation": Row("dilation 2x", 2 * _N, 2 * _N, (_DILATION,)),
    "tiles-alone": Row("Near-sighted tiles alone 2x", 2 * _N, 2 * _N, (_TILES,), changes={_TILES[0]: _ALONE}),
    "slothful": Row("Slothful 2x", 2 * _N, 2 * _N, (_SLOTHFUL,)),
    "scale-fusion": Row("scale fusion 2x", 2 * _N, 2 * _N, (_FUSION,)),
    "neighbourhood": Row("neighbourhood 2x", 2 * _N, 2 * _N, (_NEIGHBOURHOOD,)),
    "freeu-v1": Row("FreeU V1, native", _N, _N, (("freeu", "FreeScale (SDXL)"),)),
    "freeu-v2": Row("FreeU V2, native", _N, _N, (("freeu", "SD 1.5"),)),
    "together": Row("DeepShrink + dilation + fusion 2x", 2 * _N, 2 * _N, (*_FIRST, _DILATION, _FUSION)),
}
# a picture takes ten times as long as at 2x
UNET_4X_ROWS: dict[str, Row] = {
    "naive-4x": Row("naive 4x", 4 * _N, 4 * _N),
    "dilation-4x": Row("dilation 4x", 4 * _N, 4 * _N, (_DILATION,)),
    "tiles-alone-4x": Row("Near-sighted tiles alone 4x", 4 * _N, 4 * _N, (_TILES,), changes={_TILES[0]: _ALONE}),
}
# beside what they are to be better than
UNET_GROUP = ("native", "naive", "composition", *UNET_ROWS)


def _hires(
    title: str, denoise: float, *presets: tuple[str, str], scale: int = 2, **changes: Mapping[str, object]
) -> Row:
    """Techniques that have a pass choice act in the hires pass only."""
    only_there = {
        name: ({"passes": HIRES} if "passes" in params_of(BY_NAME[name].settings) else {}) | dict(changes.get(name, {}))
        for name, _ in presets
    }
    return _compared(
        Row(title, scale * _N, scale * _N, presets, changes=only_there, hires_scale=scale, hires_denoise=denoise)
    )


def _recipe(name: str, scale: int = 2) -> Row:
    title = f"recipe {name}"
    return _compared(Row(title, scale * _N, scale * _N, hires_scale=scale, hires_denoise=0.7, recipe=name))


def _compared(row: Row) -> Row:
    return (
        replace(row, direct="naive", against="hires-fix")
        if row.hires_scale == 2
        else replace(row, direct="naive-4x", against="hires-fix-4x")
    )


_MIXING = ("iterative_mixing", "FreeScale")
_LOCK = ("low_band_lock", "Default")
_RELAY = ("relay", "Fast 2x")
_CASCADE = ("cascade", "2x at most per stage")
HIRES_ROWS: dict[str, Row] = {
    "hires-fix": _hires("Hires. fix, denoise 0.7", 0.7),
    "mixing-0.5": _hires("Iterative mixing, alpha 0.5", 1.0, _MIXING, iterative_mixing={"alpha": 0.5}),
    "mixing-1": _hires("Iterative mixing, alpha 1", 1.0, _MIXING, iterative_mixing={"alpha": 1.0}),
    "mixing-2": _hires("Iterative mixing, alpha 2", 1.0, _MIXING),
    "mixing-3": _hires("Iterative mixing, alpha 3", 1.0, _MIXING, iterative_mixing={"alpha": 3.0}),
    "lock": _hires("Low-band lock, denoise 0.7", 0.7, _LOCK),
    "relay": _hires("Relay", 1.0, _RELAY),
    "relay-lock": _hires("Relay, low-band lock", 1.0, _RELAY, _LOCK),
    "freescale": _hires("FreeScale, denoise 0.7", 0.7, _MIXING, _DILATION, _FUSION),
    "freescale-no-mixing": _hires("FreeScale without mixing", 0.7, _DILATION, _FUSION),
    "freescale-no-dilation": _hires("FreeScale without dilation", 0.7, _MIXING, _FUSION),
    "freescale-no-fusion": _hires("FreeScale without scale fusion", 0.7, _MIXING, _DILATION),
    "freescale-clean": _hires(
        "FreeScale, scale fusion to 0.75", 0.7, _MIXING, _DILATION, _FUSION, scale_fusion={"end": 0.75}
    ),
    "mixing-0.7": _hires("Iterative mixing, alpha 2, denoise 0.7", 0.7, _MIXING),
}
RECIPE_ROWS: dict[str, Row] = {
    "faithful": _recipe("2x faithful"),
    "more-detail": _recipe("2x more detail"),
    "fast": _recipe("Fast 2x (relay)"),
}
HIRES_4X_ROWS: dict[str, Row] = {
    "hires-fix-4x": _hires("Hires. fix at once, denoise 0.7", 0.7, scale=4),
    "cascade-4x": _hires("Cascade 2x, 2x", 0.7, _CASCADE, scale=4),
    "4x-cascade": _recipe("4x cascade", scale=4),
    "freescale-4x": _hires("FreeScale 2x, 2x", 0.7, _CASCADE, _MIXING, _DILATION, _FUSION, scale=4),
    "freescale-clean-4x": _hires(
        "FreeScale 2x, 2x, scale fusion to 0.75",
        0.7,
        _CASCADE,
        _MIXING,
        _DILATION,
        _FUSION,
        scale=4,
        scale_fusion={"end": 0.75},
    ),
}
# the first is where every hires pass begins, the second what sampling at the size costs
HIRES_GROUP = ("native", "naive", *HIRES_ROWS, *RECIPE_ROWS)
HIRES_4X_GROUP = ("native", "naive-4x", *HIRES_4X_ROWS)

GUIDANCE = tuple(technique for technique in TECHNIQUES if technique.family == "Guidance")
CFG_SCALES = (4.0, 7.5, 15.0)  # low, normal, burning


def _guidance_rows(cfg_scale: float) -> Iterator[tuple[str, Row]]:
    yield f"cfg-{cfg_scale:g}", Row(f"CFG {cfg_scale:g}", _N, _N, (), cfg_scale)
    for technique in GUIDANCE:
        preset = next(iter(technique.presets))
        title = f"CFG {cfg_scale:g}, {technique.title}"
        yield f"{technique.name}-{cfg_scale:g}", Row(title, _N, _N, ((technique.name, preset),), cfg_scale)


GUIDANCE_ROWS = {name: row for cfg_scale in CFG_SCALES for name, row in _guidance_rows(cfg_scale)}
NAMED_ROWS = SIZE_ROWS | UNET_ROWS | UNET_4X_ROWS | HIRES_ROWS | RECIPE_ROWS | HIRES_4X_ROWS
ROWS = NAMED_ROWS | GUIDANCE_ROWS
GROUPS = {
    "sizes": tuple(SIZE_ROWS),
    "unet": UNET_GROUP,
    "unet-4x": ("native", *UNET_4X_ROWS),
    "hires": HIRES_GROUP,
    "hires-4x": HIRES_4X_GROUP,
    "guidance": tuple(GUIDANCE_ROWS),
}
DEFAULT_ROWS = ("native", "naive", "hard-cut", "composition")
KNOWN_ROWS = (
    f"{', '.join(NAMED_ROWS)}, a guidance technique and a CFG scale (pag-7.5, cfg-15), or a group: {', '.join(GROUPS)}"
)
