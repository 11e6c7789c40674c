"""FreSca: different guidance strengths for coarse and fine structure.

The guidance difference g = cond - uncond is split by spatial frequency, and its halves are scaled:

    cond' = uncond + F^-1[ W F[g] ],    W = scale_low inside the box of low frequencies, scale_high outside.

The box holds the bins -f <= k < f of each axis, f at most half the axis. It is one bin longer on its negative side, and
the real part of the inverse transform is taken, so what acts is the mean of W and its mirror image: a filter that is
real, even, and half way between the scales where the box ends. That makes a real transform exact, at half the work.

Reference: Huang et al., "FreSca: Scaling in Frequency Space Enhances Diffusion Models" (2025); ComfyUI's FreSca.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_hires.run import Run, Size
from lib_hires.settings import Settings, choice, integer, number, passes_choice, window_end, window_start
from lib_hires.sites import Predictions
from lib_hires.technique import Rest, Technique
from lib_hires.techniques.guidance.windowed import WindowedGuidance
from lib_hires.window import Windowed

FRACTION, BINS = "Fraction", "Bins (ComfyUI)"


@dataclass(frozen=True)
class FreScaSettings(Windowed, Settings):
    scale_low: float = number(
        1.0, 0.0, 10.0, 0.01,
        label="Scale low",
        help="Guidance of the coarse structure: shapes, colours, light. 1 leaves it as it is.",
    )  # fmt: skip
    scale_high: float = number(
        1.25, 0.0, 10.0, 0.01,
        label="Scale high",
        help="Guidance of the fine structure. Above 1: more detail and texture. Below 1: smoother.",
    )  # fmt: skip
    cutoff_as: str = choice(
        FRACTION, (FRACTION, BINS),
        label="Cutoff given as",
        help=f"{FRACTION}: the same grain of detail at every picture size. {BINS}: the number of waves across the "
        "picture, as ComfyUI's freq_cutoff counts it; the same number means coarser detail in a larger picture.",
    )  # fmt: skip
    cutoff: float = number(
        0.625, 0.0, 1.0, 0.005,
        label="Cutoff fraction",
        help="Where fine structure begins, as a fraction of the finest that a latent can hold. Higher: more counts as "
        "coarse. 0.625 is ComfyUI's 20 for SD 1.x at 512 px; for SDXL at 1024 px that is 0.3125.",
    )  # fmt: skip
    freq_cutoff: int = integer(
        20, 1, 10000,
        label="Cutoff bins",
        help=f"Where fine structure begins, with Cutoff given as {BINS}.",
    )  # fmt: skip
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()

    def half_box(self, size: Size) -> Size:
        """f of both axes of a latent: half the side of the box of low frequencies, in bins."""
        height, width = size
        return self._half_side(height), self._half_side(width)

    def _half_side(self, n: int) -> int:
        f = self.freq_cutoff if self.cutoff_as == BINS else round(self.cutoff * n / 2)
        return min(f, n // 2)


def low_pass(size: Size, half_box: Size) -> Tensor:
    """How much each bin of rfft2 counts as low, [h, w // 2 + 1]: 1, 1/2 at the border of the box, or 0."""
    rows, columns = (_in_box(n, f) for n, f in zip(size, half_box, strict=True))
    box = torch.outer(rows, columns)
    mirrored = box.flip(0, 1).roll((1, 1), (0, 1))  # bin k lands on -k, modulo the side
    return ((box + mirrored) / 2)[:, : size[1] // 2 + 1]


def _in_box(n: int, f: int) -> Tensor:
    k = torch.fft.fftfreq(n, 1 / n).round()
    return ((k >= -f) & (k < f)).float()


def reweighted(g: Tensor, low: Tensor, scale_low: float, scale_high: float) -> Tensor:
    """What the scales add to a difference g [B, C, h, w] (float32, any space: it is linear). `low`: see `low_pass`."""
    change = (scale_high - 1) + (scale_low - scale_high) * low
    return torch.fft.irfft2(torch.fft.rfft2(g) * change, s=g.shape[-2:])


class FreScaPatch(WindowedGuidance):
    def __init__(self, settings: FreScaSettings, run: Run) -> None:
        super().__init__(settings, run)
        self._settings = settings
        self._latent = run.latent
        self._low: dict[tuple[int, int, torch.device], Tensor] = {}

    def before_mix(self, cond: Tensor, uncond: Tensor, raw: Predictions) -> tuple[Tensor, Tensor]:
        if not self.acts_in(raw.call):
            return cond, uncond
        self.fired += 1
        scales = self._settings.scale_low, self._settings.scale_high
        return cond + reweighted(cond - uncond, self._low_pass(cond), *scales), uncond

    def _low_pass(self, latent: Tensor) -> Tensor:
        height, width = latent.shape[-2:]
        key = height, width, latent.device
        if key not in self._low:
            self._low[key] = low_pass((height, width), self._settings.half_box((height, width))).to(latent.device)
        return self._low[key]

    def describe(self) -> str:
        s, (rows, columns) = self._settings, self._settings.half_box(self._latent)
        return f"{s.scale_low:g} up to {columns}x{rows} waves, {s.scale_high:g} above, {super().describe()}"


def begin(settings: FreScaSettings, run: Run) -> FreScaPatch:
    """The patch for one run. Raises `Rest` where both scales are 1."""
    if settings.scale_low == settings.scale_high == 1:
        raise Rest("scale low 1 and scale high 1 change nothing")
    return FreScaPatch(settings, run)


TECHNIQUE = Technique(
    name="fresca",
    title="FreSca",
    family="Guidance",
    summary="Guides fine detail more strongly (or weakly) than the coarse structure: crisper or smoother pictures with "
    "the same composition.",
    source="FreSca (Huang et al. 2025)",
    settings=FreScaSettings,
    begin=begin,
    presets={
        "More detail": FreScaSettings(),
        "Much more detail": FreScaSettings(scale_high=1.5),
        "Smoother": FreScaSettings(scale_low=1.25, scale_high=0.8),
        "More detail, SDXL": FreScaSettings(cutoff=0.3125),
        "As ComfyUI": FreScaSettings(cutoff_as=BINS),
    },
)
