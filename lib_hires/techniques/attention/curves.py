"""How strong attention techniques act over time, and how deep in the UNet."""

from __future__ import annotations

import math

from lib_hires.run import Run, Size
from lib_hires.settings import Settings, number, toggle
from lib_hires.sites import Place
from lib_hires.technique import Refusal, check_above_native, unet_of
from lib_hires.topology import AttentionLayer, UNetTopology

_DEEPEST = 2  # SD's channel multiples are 1, 2, 4, 4: the reference, which reads depth from channels, stops here too


def time_curve(elapsed: float, peak: float, decay: float) -> float:
    """exp(-((elapsed - peak) * decay)^2): 1 at the peak and less around it; 1 everywhere at decay 0."""
    return math.exp(-(((elapsed - peak) * max(decay, 0.0)) ** 2))


def between(base: float, peak: float, weight: float) -> float:
    return base + (peak - base) * weight


class Levels:
    """The levels of one run's UNet that have self-attention.

    The reference's depth, channels / model_channels, is 1, 2, 4, 4 at levels 0 to 3 of SD 1.x and 2, 4 at levels 1
    and 2 of SDXL. Here it comes from the halvings on the way to a layer, so that any channel table will do.
    """

    def __init__(self, run: Run) -> None:
        assert run.model.unet is not None
        self._unet: UNetTopology = run.model.unet
        self._native = run.model.native
        self.shallowest = min((self.of(layer) for layer in self._unet.attention), default=0)

    def of(self, layer: AttentionLayer) -> int:
        return min(self._unet.halvings_at(layer.side, layer.block), _DEEPEST)

    def decay(self, layer: AttentionLayer, exponent: float) -> float:
        """(shallowest depth / depth)^exponent: 1 where attention begins, whatever level that is (2 / depth on SDXL)."""
        return 2.0 ** ((self.shallowest - self.of(layer)) * exponent)

    def is_within(self, layer: AttentionLayer, most: int) -> bool:
        """Whether the layer is one of the first `most` levels, counted from full resolution; where attention begins
        deeper than that, its first level is."""
        return self.of(layer) < max(most, self.shallowest + 1)

    def trained(self, layer: AttentionLayer) -> Size:
        """The size of this layer's map at the model's native size."""
        height, width = self._native
        halvings = self._unet.halvings_at(layer.side, layer.block)
        return max(height >> halvings, 1), max(width >> halvings, 1)

    def is_above_native(self, place: Place) -> bool:
        """Whether a map has more tokens than the model was trained for there (a shrunk one may not)."""
        return area(place.size) > area(self.trained(place.layer))


def area(size: Size) -> int:
    return size[0] * size[1]


def only_above_native() -> bool:
    switch: bool = toggle(
        True,
        label="Only above native size",
        help="Leaves maps alone that are not larger than those the model was trained for: there it would only make "
        "sampling slower. Off: acts there too.",
    )
    return switch


def peak_time(default: float = 0.4) -> float:
    time: float = number(
        default, 0.0, 1.0, 0.05,
        label="Peak time",
        help="Fraction of the pass at which it acts most. Lower it if the last details suffer.",
    )  # fmt: skip
    return time


def time_decay() -> float:
    decay: float = number(
        2.0, 0.0, 4.0, 0.1,
        label="Time decay",
        help="How fast it fades away from the peak time. 0 keeps it at its peak all the time.",
    )  # fmt: skip
    return decay


def check_run(run: Run, title: str, only_above: bool) -> None:
    """Raises `Refusal` on a model without UNet blocks, and `Rest` at or below its native size."""
    if not unet_of(run, f"{title} changes a UNet's attention").attention:
        raise Refusal(f"this UNet has no self-attention that {title} knows: switch it off for this model")
    if only_above:
        check_above_native(run)


class TimedSettings(Settings):
    """For settings with the fields `peak_time` and `time_decay`."""

    peak_time: float
    time_decay: float

    def weight(self, run: Run, sigma: float) -> float:
        return time_curve(run.elapsed(sigma), self.peak_time, self.time_decay)
