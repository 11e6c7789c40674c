"""Slothful Attention: keys and values of self-attention are made of fewer tokens; queries keep all of them.

One of every s tokens stays: ceil(sqrt s) rows and ceil(s / rows) columns apart, or ceil(s) apart along the line of all
tokens (1D). k_blend and v_blend mix it with the average or the maximum of the tokens that it stands for. At an elapsed
fraction t, and at the depth of a level (1, 2, 4 from the one where attention begins),

    s = rate * exp(-((t - peak) * decay)^2) * (1 / depth)^depth_decay,      and s <= 1 changes nothing.

Differs from the reference: input blocks take the "in" values and output blocks the "out" values (they are exchanged
there); blends of 1 pool fully (there, both at 1 do not pool); t counts the pass's own range; any UNet's depth is known.

Reference: MitoshiroPJ, Slothful Attention (2023); after Spatial-Reduction Attention (Wang et al. 2021, PVT, eq. 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lib_hires.run import Call, Run, Size
from lib_hires.settings import choice, number, passes_choice, toggle, window_end, window_start
from lib_hires.sites import Place, SelfAttention
from lib_hires.technique import Curve, Patch, Technique
from lib_hires.techniques.attention.curves import (
    Levels,
    TimedSettings,
    area,
    check_run,
    only_above_native,
    peak_time,
    time_decay,
)
from lib_hires.tokens import AVG_2D, MAX_2D, MODES, Reduction, reduced
from lib_hires.topology import MIDDLE, OUTPUT, AttentionLayer
from lib_hires.window import Windowed


@dataclass(frozen=True)
class SlothfulSettings(Windowed, TimedSettings):
    peak_time: float = peak_time()
    time_decay: float = time_decay()
    in_slothful: float = number(
        6.0, 0.0, 50.0, 0.5,
        label="In slothful",
        help="Input blocks keep about one of this many tokens as keys and values. 1 and below: all.",
    )  # fmt: skip
    out_slothful: float = number(
        4.0, 0.0, 50.0, 0.5,
        label="Out slothful",
        help="Output blocks keep about one of this many tokens as keys and values. 1 and below: all.",
    )  # fmt: skip
    in_mode: str = choice(
        AVG_2D, MODES, label="In mode", help="How input blocks pool tokens where a blend asks for it."
    )
    out_mode: str = choice(
        AVG_2D, MODES, label="Out mode", help="How output blocks pool tokens. AVG looks softer, MAX harder."
    )
    in_k_blend: float = number(
        0.0, 0.0, 1.0, 0.05,
        label="In k blend",
        help="Pooled share of the keys in input blocks. More has less noise and blurs patterns.",
    )  # fmt: skip
    in_v_blend: float = number(
        0.0,
        0.0,
        1.0,
        0.05,
        label="In v blend",
        help="Pooled share of the values in input blocks: outlines and patterns.",
    )
    out_k_blend: float = number(
        0.0, 0.0, 1.0, 0.05, label="Out k blend", help="Pooled share of the keys in output blocks."
    )
    out_v_blend: float = number(
        0.0, 0.0, 1.0, 0.05,
        label="Out v blend",
        help="Pooled share of the values in output blocks: contrast and sharpness.",
    )  # fmt: skip
    in_depth_decay: float = number(
        2.0,
        0.0,
        4.0,
        0.1,
        label="In depth decay",
        help="How fast the rate falls deeper in the input blocks. 0: nowhere.",
    )
    out_depth_decay: float = number(
        2.0,
        0.0,
        4.0,
        0.1,
        label="Out depth decay",
        help="How fast the rate falls deeper in the output blocks. 0: nowhere.",
    )
    keep_middle: bool = toggle(
        True,
        label="Keep middle",
        help="Leaves the middle block alone, which decides most about composition. Off: it takes the In values.",
    )
    only_above_native: bool = only_above_native()
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()


@dataclass(frozen=True)
class Share:
    """What one side of the UNet uses: rate, its decay, pooling."""

    rate: float
    depth_decay: float
    mode: str
    k_blend: float
    v_blend: float


def shares(settings: SlothfulSettings) -> tuple[Share, Share]:
    """The values of the way in, and of the way out."""
    s = settings
    return (
        Share(s.in_slothful, s.in_depth_decay, s.in_mode, s.in_k_blend, s.in_v_blend),
        Share(s.out_slothful, s.out_depth_decay, s.out_mode, s.out_k_blend, s.out_v_blend),
    )


class SlothfulPatch(Patch, SelfAttention):
    def __init__(self, settings: SlothfulSettings, run: Run) -> None:
        super().__init__()
        self._settings = settings
        self._run = run
        self._window = settings.window(run)
        self._levels = Levels(run)
        self._in, self._out = shares(settings)

    def rate(self, layer: AttentionLayer, sigma: float) -> float:
        """How many tokens one key stands for, in one layer at one noise level; 1 and below: no reduction."""
        share = self._share(layer)
        if share is None or sigma not in self._window:
            return 0.0
        return share.rate * self._settings.weight(self._run, sigma) * self._levels.decay(layer, share.depth_decay)

    def may_act(self, layer: AttentionLayer, call: Call) -> bool:
        return self.rate(layer, call.sigma) > 1

    def acts_at(self, place: Place) -> bool:
        return self._levels.is_above_native(place) or not self._settings.only_above_native

    def sources(self, key_source: Tensor, value_source: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        share = self._share(place.layer)
        if share is None or not _are_whole(key_source, value_source, place.size):
            return key_source, value_source
        self.fired += 1
        rate = self.rate(place.layer, place.call.sigma)
        reduction = Reduction.of(share.mode, place.size, rate, rate)
        return reduced(key_source, value_source, reduction, share.k_blend, share.v_blend)

    def _share(self, layer: AttentionLayer) -> Share | None:
        if layer.side == MIDDLE and self._settings.keep_middle:
            return None
        return self._out if layer.side == OUTPUT else self._in

    def describe(self) -> str:
        kept = f"1 of {self._in.rate:g} tokens in, 1 of {self._out.rate:g} out"
        return f"{kept}, most at sigma {self._run.sigma_at(max(self._settings.peak_time, 1e-6)):.4g}"


def _are_whole(key_source: Tensor, value_source: Tensor, size: Size) -> bool:
    return key_source.shape[1] == value_source.shape[1] == area(size)


def begin(settings: SlothfulSettings, run: Run) -> SlothfulPatch:
    """The patch for one run. Raises `Refusal` on a model without UNet blocks, `Rest` at native size."""
    check_run(run, "Slothful Attention", settings.only_above_native)
    return SlothfulPatch(settings, run)


def curve(settings: SlothfulSettings, run: Run) -> Curve:
    """The rate where it is highest, at every step of a run."""
    window, rate = settings.window(run), max(settings.in_slothful, settings.out_slothful)
    values = [rate * settings.weight(run, sigma) if sigma in window else 0.0 for sigma in run.sigmas]
    phases = tuple(["reduced" if value > 1 else "plain" for value in values])
    return Curve(tuple([max(value, 1.0) for value in values]), phases, 1.0, max(2.0, *values), "tokens per key")


TECHNIQUE = Technique(
    name="slothful",
    title="Slothful Attention",
    family="Attention",
    summary="Self-attention looks at fewer tokens: faster above native size, and a control over detail and contrast.",
    source="MitoshiroPJ's Slothful Attention (2023)",
    settings=SlothfulSettings,
    begin=begin,
    presets={
        "Default": SlothfulSettings(),
        "Simple (rate 4)": SlothfulSettings(in_slothful=4.0, out_slothful=4.0, in_depth_decay=1.5, out_depth_decay=1.5),
        "Fast": SlothfulSettings(
            time_decay=0.0, in_slothful=4.0, out_slothful=4.0, in_depth_decay=0.0, out_depth_decay=0.0
        ),
        "Keep the composition": SlothfulSettings(peak_time=0.5, time_decay=2.5),
        "Less noise": SlothfulSettings(in_k_blend=0.3),
        "Soft contrast": SlothfulSettings(out_v_blend=0.4),
        "Hard contrast": SlothfulSettings(out_mode=MAX_2D, out_v_blend=0.4),
    },
    curve=curve,
)
