"""FreeU and FreeU V2: louder backbone maps, and skips with less of their lowest frequencies.

Where output block l joins a backbone map h with its skip, in the two deepest stages of the UNet,

    h[:, :C/2] <- h[:, :C/2] * beta          beta = b (V1), or (b - 1) m + 1 (V2)
    skip       <- Re F^-1(F(skip) * alpha)   alpha = s at the four bins k in {-1, 0}^2, 1 elsewhere

where m is the mean of h over the channels, brought to 0..1 by its minimum and maximum per sample. Stage 1 (b1, s1) are
the blocks whose h has 4 * model_channels channels, stage 2 (b2, s2) those with 2 *: the authors' convention.

Reference: Si et al. 2023, "FreeU: Free Lunch in Diffusion U-Net", equations 3 to 6; the authors' code for the bins, for
which V1 and V2 scale half of the channels, and for V2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_hires.precision import full_precision
from lib_hires.resize import map_size
from lib_hires.run import Call, Run
from lib_hires.settings import Settings, choice, number, passes_choice, window_end, window_start
from lib_hires.sites import FeatureMaps
from lib_hires.technique import Patch, Rest, Technique, unet_of
from lib_hires.topology import OUTPUT, UNetTopology
from lib_hires.window import Windowed

V1, V2 = "V1", "V2"

_STAGE_WIDTHS = (4, 2)  # channels of stage 1 and 2, in model_channels
_FLAT = 1e-5  # a channel mean that varies by less than this part of its size is constant: the rest is rounding


def filter_skip(skip: Tensor, s: float) -> Tensor:
    """The lowest frequencies of maps [B, C, h, w] times s: the four bins k in {-1, 0}^2 of the centred spectrum.

    Any size, one wide included; float32 inside, in the dtype of `skip`. The real part of the four filtered bins is

        y = x + (s - 1) / (h w) * sum over x of (1 + cos a)(1 + cos b) - sin a sin b

    with a, b the phases 2 pi (n - m) / h and / w between two cells: a projection on three functions per axis (1, cos,
    sin): two thin products per axis, and no spectrum. The bins are not symmetric, which is where the sines come from.
    """
    if s == 1:
        return skip
    height, width = map_size(skip)
    with full_precision(skip):
        rows, columns = _basis(height, skip.device), _basis(width, skip.device)
        x = skip.float().reshape(-1, width)
        # both axes of all maps in a few plain products: one product per map, however small, would take longer
        over_rows = torch.kron(rows, torch.eye(len(columns), device=skip.device))
        coefficients = (x @ columns.T).reshape(-1, over_rows.shape[1]) @ over_rows.T  # [B C, 9]
        kept = coefficients - coefficients @ torch.kron(_quarter_turn(rows), _quarter_turn(columns)).T
        back = (kept @ over_rows).reshape(-1, len(columns))
        return torch.addmm(x, back, columns, alpha=s - 1).reshape(skip.shape).to(skip.dtype)


def _basis(n: int, device: torch.device) -> Tensor:
    """Mean, cosine and sine of one period over n cells, [3, n], scaled by n ** -0.5. One cell has only its mean."""
    if n == 1:
        return torch.ones(1, 1, device=device)
    phase = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    return (torch.stack([torch.ones_like(phase), phase.cos(), phase.sin()]) * n**-0.5).float().to(device)


def _quarter_turn(basis: Tensor) -> Tensor:
    """In the basis, the kernel sin(2 pi (n - m) / size): cosine to sine, sine to minus cosine."""
    turn = torch.zeros(len(basis), len(basis), device=basis.device)
    if len(basis) == 3:
        turn[2, 1], turn[1, 2] = 1.0, -1.0
    return turn


def scale_backbone(h: Tensor, b: float, version: str) -> Tensor:
    """The first half of the channels of maps [B, C, h, w] times b (V1), or more where the map is strong (V2).

    Out of place, in the dtype of h; V2's factor (b - 1) m + 1 is made in float32. A map whose channel mean is constant
    has no strong places: m is 0 there, and the map keeps its values.
    """
    if b == 1:
        return h
    half = h.shape[1] // 2
    factor = b if version == V1 else ((b - 1) * _strength_map(h) + 1).to(h.dtype)
    return torch.cat([h[:, :half] * factor, h[:, half:]], dim=1)


def _strength_map(h: Tensor) -> Tensor:
    """Channel mean [B, 1, h, w] float32, per sample from 0 at its minimum to 1 at its maximum."""
    mean = h.mean(dim=1, keepdim=True, dtype=torch.float32)
    low, high = mean.amin(dim=(2, 3), keepdim=True), mean.amax(dim=(2, 3), keepdim=True)
    spread = high - low
    varies = spread > _FLAT * torch.maximum(low.abs(), high.abs())
    return torch.where(varies, (mean - low) / torch.where(varies, spread, 1.0), 0.0)


def stages(unet: UNetTopology) -> dict[int, int]:
    """{output block: stage 1 or 2}. By the channels of the backbone map, as the authors do; where the network's widths
    do not tell two stages apart, by level: the deepest is stage 1 and the next stage 2, as diffusers does."""
    widths = [unet.model_channels * multiple for multiple in _STAGE_WIDTHS]
    if unet.model_channels and set(widths) <= set(unet.backbone_channels):
        wide = enumerate(unet.backbone_channels)
        return {index: widths.index(channels) + 1 for index, channels in wide if channels in widths}
    deepest = len(unet.downsamplers)
    levels = ((index, unet.halvings_at(OUTPUT, index)) for index in range(unet.output_blocks))
    return {index: deepest - level + 1 for index, level in levels if level >= deepest - 1}


@dataclass(frozen=True)
class FreeUSettings(Windowed, Settings):
    version: str = choice(
        V2, (V1, V2),
        label="Version",
        help="V1 amplifies the backbone evenly; V2 amplifies it where the map is strong, and bears a higher b.",
    )  # fmt: skip
    b1: float = number(
        1.3, 0.0, 10.0, 0.01,
        label="b1",
        help="Strength of the deepest backbone maps. Higher: clearer structure, too high: oversmooth. 1 is off.",
    )  # fmt: skip
    b2: float = number(
        1.4, 0.0, 10.0, 0.01,
        label="b2",
        help="The same one stage above. 1 is off.",
    )  # fmt: skip
    s1: float = number(
        0.9, 0.0, 10.0, 0.01,
        label="s1",
        help="Strength of the lowest frequencies of the deepest skips. Lower suppresses more; 1 is off.",
    )  # fmt: skip
    s2: float = number(
        0.2, 0.0, 10.0, 0.01,
        label="s2",
        help="The same one stage above. Lower suppresses more; 1 is off.",
    )  # fmt: skip
    start: float = window_start()
    end: float = window_end()
    fade: float = number(
        0.0, 0.0, 0.5, 0.01,
        label="Fade",
        help="Fraction of the pass over which the strength rises after Start and falls before End. 0 switches at once. "
        "Start 0 and End 1 have no fade.",
    )  # fmt: skip
    passes: str = passes_choice()

    @property
    def scales(self) -> dict[int, tuple[float, float]]:
        """{stage: (b, s)}"""
        return {1: (self.b1, self.s1), 2: (self.b2, self.s2)}


def strength(settings: FreeUSettings, elapsed: float) -> float:
    """0 to 1 at an elapsed fraction inside the window. The fades meet where the window is shorter than both."""
    fade = min(settings.fade, (settings.end - settings.start) / 2)
    if fade == 0:
        return 1.0
    rise = 1.0 if settings.start == 0 else (elapsed - settings.start) / fade
    fall = 1.0 if settings.end == 1 else (settings.end - elapsed) / fade
    return min(max(min(rise, fall), 0.0), 1.0)


class FreeUPatch(Patch, FeatureMaps):
    def __init__(self, settings: FreeUSettings, run: Run, stage_of: dict[int, int]) -> None:
        super().__init__()
        self._settings = settings
        self._run = run
        self._window = settings.window(run)
        self._stage_of = stage_of

    def join(self, h: Tensor, skip: Tensor, index: int, call: Call) -> tuple[Tensor, Tensor]:
        if index not in self._stage_of or call.sigma not in self._window:
            return h, skip
        b, s = self._settings.scales[self._stage_of[index]]
        part = strength(self._settings, self._run.elapsed(call.sigma))
        scaled = scale_backbone(h, 1 + part * (b - 1), self._settings.version)
        filtered = filter_skip(skip, 1 + part * (s - 1))
        self.fired += scaled is not h or filtered is not skip
        return scaled, filtered

    def describe(self) -> str:
        def of_stage(stage: int) -> str:
            b, s = self._settings.scales[stage]
            blocks = [index for index, its in self._stage_of.items() if its == stage]
            return f"b {b:g}, s {s:g} in output blocks {min(blocks)} to {max(blocks)}"

        window = f"sigma {min(self._window.upper, self._run.sigma_first):.4g} to {self._window.lower:.4g}"
        return f"{self._settings.version}, {', '.join(map(of_stage, sorted(set(self._stage_of.values()))))}, {window}"


def begin(settings: FreeUSettings, run: Run) -> FreeUPatch:
    """The patch for one run. Raises `Refusal` on a model without UNet blocks, `Rest` where all four values are 1."""
    unet = unet_of(run, "FreeU changes UNet blocks")
    if all(pair == (1, 1) for pair in settings.scales.values()):
        raise Rest("b1, b2, s1 and s2 are 1, which changes nothing")
    return FreeUPatch(settings, run, stages(unet))


TECHNIQUE = Technique(
    name="freeu",
    title="FreeU",
    family="Quality",
    summary="Cleaner structure and richer contrast at no cost; the right values depend on the model.",
    source="Si et al. 2023, FreeU (V1 and V2); values of the last preset from Qiu et al. 2024, FreeScale",
    twins=("FreeU",),
    settings=FreeUSettings,
    begin=begin,
    presets={
        "SDXL": FreeUSettings(),
        "SD 1.4": FreeUSettings(b1=1.3, b2=1.4),
        "SD 1.5": FreeUSettings(b1=1.5, b2=1.6),
        "SD 2.1": FreeUSettings(b1=1.4, b2=1.6),
        "FreeScale (SDXL)": FreeUSettings(version=V1, b1=1.1, b2=1.2, s1=0.6, s2=0.4),
    },
)
