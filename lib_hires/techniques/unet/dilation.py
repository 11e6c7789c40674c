"""Restrained dilated convolution: the deep convolutions of the down path see as far as on a picture of native size.

Above its native size the UNet's convolutions cover a smaller part of the picture, and each part grows its own object.
With the taps d times as far apart (k is the kernel, o a cell),

    f(h)(o) = sum over t of h(o + d t) k(t),

they cover what they covered in training. Restrained: only the last downsampler, what lies deeper on the input side, and
the middle (dilated output blocks bring messy textures), and not in the last steps, which only render detail.

Reference: He et al. 2023, "ScaleCrafter", equation 2 and section 3.2 (fractional factors); Qiu et al. 2024,
"FreeScale", section on restrained dilated convolution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from lib_hires.run import Call, Run, Size
from lib_hires.settings import Settings, number, passes_choice, text, toggle, window_start
from lib_hires.sites import Convolutions
from lib_hires.technique import Patch, Refusal, Rest, Technique, check_above_native, unet_of
from lib_hires.topology import DOWN, FIRST_CONV, INPUT, MIDDLE, OUTPUT, SECOND_CONV, UP, ConvLayer, UNetTopology
from lib_hires.window import Windowed

_MAX_FACTOR = 8.0
# A fraction costs two resizings of the map and more cells to convolve: 2.02 must not become a dilation of 3.
_STEPS_PER_UNIT = 4
_SIDES = {"i": INPUT, "m": MIDDLE, "o": OUTPUT}
_PARTS = (DOWN, UP, FIRST_CONV, SECOND_CONV)
_LAYER = re.compile(rf"(?P<side>[imo])((?P<first>\d+)(-(?P<last>\d+))?)?(\.(?P<part>{'|'.join(_PARTS)}))?")
_SEPARATOR = re.compile(r"[,;\s]+")  # X/Y/Z takes commas for itself
_LAYER_FORM = (
    "i, m or o (input, middle, output), a block number or range, and .down, .up, .in or .out for one convolution of it"
)


@dataclass(frozen=True)
class LayerRule:
    """Convolutions of some blocks of one side, and how the user wrote them."""

    name: str
    side: str
    first: int = 0
    last: float = math.inf
    part: str = ""  # empty: all

    def __contains__(self, layer: ConvLayer) -> bool:
        in_blocks = layer.side == self.side and self.first <= layer.block <= self.last
        return in_blocks and self.part in ("", layer.part)


def parse_layers(grammar: str) -> tuple[LayerRule, ...]:
    """Read "i6.down, i7-8, m"; spaces and semicolons separate as well. Raises ValueError with the form."""
    return tuple(_parse_layer(name) for name in _SEPARATOR.split(grammar) if name)


def _parse_layer(name: str) -> LayerRule:
    match = _LAYER.fullmatch(name)
    if match is None or (match["side"] == "m" and match["first"]):
        raise ValueError(f"{name!r} is not of the form {_LAYER_FORM}; the middle has no number")
    side, part = _SIDES[match["side"]], match["part"] or ""
    if match["first"] is None:
        return LayerRule(name, side, part=part)
    first = int(match["first"])
    last = int(match["last"] or first)
    if first > last:
        raise ValueError(f"the range in {name!r} runs backwards")
    return LayerRule(name, side, first, last, part)


def default_layers(unet: UNetTopology) -> tuple[LayerRule, ...]:
    """The last downsampler, everything deeper on the input side, and the middle. SDXL: input blocks 6 to 8; SD 1.x and
    2.x: 9 to 11."""
    first = unet.downsamplers[-1] if unet.downsamplers else unet.input_blocks
    return LayerRule(f"i{first}", INPUT, first), LayerRule("m", MIDDLE)


@dataclass(frozen=True)
class DilationSettings(Windowed, Settings):
    factor: float = number(
        0.0, 0.0, _MAX_FACTOR, 0.25,
        label="Factor",
        help="How many times further the convolutions see. 0 chooses it: target size / native size, in quarters, and "
        "less while DeepShrink shrinks the map. 2 for 1024 px with SD 1.5 or 2048 px with SDXL. Fractions cost time.",
    )  # fmt: skip
    layers: str = text(
        "",
        check=parse_layers,
        label="Layers",
        help="Which convolutions, separated by commas or spaces; empty takes the last downsampler, the input blocks "
        f"after it and the middle. Each is {_LAYER_FORM}. Example for SDXL: i6.down, i7-8, m",
    )
    start: float = window_start()
    end: float = number(
        0.7, 0.0, 1.0, 0.01,
        label="End",
        help="Fraction of the pass at which it stops. The last steps only render detail and need the original reach.",
    )  # fmt: skip
    only_above_native: bool = toggle(
        True,
        label="Only above native size",
        help="Does nothing when the picture has no more pixels than the model was trained for. Leave it on.",
    )
    passes: str = passes_choice()

    def problem(self) -> str | None:
        if 0 < self.factor < 1:
            return f"factor {self.factor:g} is below 1: set 0 to have it chosen, or more than 1"
        return super().problem()


def enlargement(size: Size, other: Size) -> float:
    """How many times wider a map is than another, by area: an aspect ratio is no enlargement."""
    return math.sqrt(size[0] * size[1] / (other[0] * other[1]))


def in_quarters(ratio: float) -> float:
    return max(1.0, round(ratio * _STEPS_PER_UNIT) / _STEPS_PER_UNIT)


class DilationPatch(Patch, Convolutions):
    def __init__(self, settings: DilationSettings, run: Run, layers: Iterable[ConvLayer]) -> None:
        super().__init__()
        self._chosen = settings.factor
        self._run = run
        self._window = settings.window(run)
        self._layers = frozenset(layers)

    def dilates_in(self, layer: ConvLayer) -> bool:
        return layer in self._layers

    def dilation(self, layer: ConvLayer, size: Size, call: Call) -> float:
        if call.sigma not in self._window:
            return 1.0
        factor = self._chosen or self._factor_here(layer, size)
        self.fired += factor != 1
        return factor

    def _factor_here(self, layer: ConvLayer, size: Size) -> float:
        """The run's factor, less where the map is smaller than the maps of this level are: then somebody shrank it.
        Halving an odd size rounds up, so the map is not compared with the native size itself."""
        height, width = self._run.latent
        usual = -(-height // 2**layer.level), -(-width // 2**layer.level)
        return in_quarters(enlargement(self._run.latent, self._run.model.native) * min(1.0, enlargement(size, usual)))

    def describe(self) -> str:
        factor = self._chosen or in_quarters(enlargement(self._run.latent, self._run.model.native))
        window = f"sigma {min(self._window.upper, self._run.sigma_first):.4g} to {self._window.lower:.4g}"
        return f"factor {factor:g} in {len(self._layers)} convolutions, {window}"


def begin(settings: DilationSettings, run: Run) -> DilationPatch:
    """The patch for one run. Raises `Refusal` on a model without UNet blocks or without the chosen layers, and `Rest`
    where the factor is 1."""
    unet = unet_of(run, "dilation changes the convolutions of a UNet")
    if settings.only_above_native:
        check_above_native(run)
    (height, width), (native_height, native_width) = run.latent, run.model.native
    if (settings.factor or in_quarters(enlargement(run.latent, run.model.native))) == 1:
        raise Rest(f"latent {width}x{height} is about the native {native_width}x{native_height}, and factor 1 is off")
    return DilationPatch(settings, run, _chosen_layers(settings, run.model.family, unet))


def _chosen_layers(settings: DilationSettings, family: str, unet: UNetTopology) -> list[ConvLayer]:
    rules = parse_layers(settings.layers)
    for rule in rules:
        if not any(layer in rule for layer in unet.convolutions):
            raise Refusal(
                f"layer {rule.name!r} names no convolution of {family}: it has i0 to i{unet.input_blocks - 1}, m and "
                f"o0 to o{unet.output_blocks - 1}, and of the parts {_resamplers(unet)}"
            )
    chosen = rules or default_layers(unet)
    return [layer for layer in unet.convolutions if any(layer in rule for rule in chosen)]


def _resamplers(unet: UNetTopology) -> str:
    """The parts that few blocks have, as the grammar writes them: "i3.down, o2.up"."""
    letters = {side: letter for letter, side in _SIDES.items()}
    found = (layer for layer in unet.convolutions if layer.part in (DOWN, UP))
    return ", ".join(f"{letters[layer.side]}{layer.block}.{layer.part}" for layer in found)


TECHNIQUE = Technique(
    name="dilation",
    title="Restrained dilation",
    family="Composition",
    summary="Lets the deep convolutions see as far as at native size, against repeated objects; best at 2x and more.",
    source="He et al. 2023, ScaleCrafter; Qiu et al. 2024, FreeScale",
    settings=DilationSettings,
    begin=begin,
    presets={
        "Automatic (FreeScale)": DilationSettings(),
        "2x": DilationSettings(factor=2.0),
        "4x": DilationSettings(factor=4.0),
    },
)
