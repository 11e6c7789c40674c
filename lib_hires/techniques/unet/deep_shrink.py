"""DeepShrink (Kohya): shrink the feature map deep in the UNet while the composition forms.

Early in sampling the map that leaves an input block is shrunk by a factor, so that everything deeper sees the size that
the model was trained for; then the size grows back, and the last steps run at full size. With sigma_s, sigma_e, sigma_g
the noise levels of start, end and gradual, and f the factor, the scale is

    1/f                                                      for sigma_s >= sigma >= sigma_e
    1/f + (1 - 1/f) (sigma_e - sigma) / (sigma_e - sigma_g)  for sigma_e >  sigma >= sigma_g
    1                                                        otherwise

Reference: Kohya's Deep Shrink (2023), ComfyUI's PatchModelAddDownscale and its gradual version.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lib_hires.resize import BICUBIC, METHODS, map_size, resize, scaled_length
from lib_hires.run import Call, Run, Size
from lib_hires.settings import Settings, choice, integer, number, passes_choice, text, toggle
from lib_hires.sites import FeatureMaps
from lib_hires.technique import Curve, Patch, Refusal, Rest, Technique, check_above_native, unet_of
from lib_hires.window import SigmaRange, Window

FULL_SHRINK, GROWING, ORIGINAL = "full shrink", "growing", "original"

_MIN_FACTOR, _MAX_FACTOR = 0.5, 9.0
_STAGE_FORM = "block:factor:start-end or block:factor:start-end-gradual, separated by ;"


@dataclass(frozen=True)
class Stage:
    """One shrink: where, by how much and when (fractions of the pass)."""

    block: int
    factor: float
    start: float
    end: float
    gradual: float

    def problem(self) -> str | None:
        if self.start < max(self.end, self.gradual):
            return None
        return (
            f"start {self.start:g} is before neither end {self.end:g} nor gradual {self.gradual:g}, "
            "so it would never act: lower Start, or raise End or Gradual"
        )


def parse_stages(grammar: str) -> tuple[Stage, ...]:
    """Read "6:2:0-0.2; 3:1.5:0.2-0.5-0.7". Raises ValueError with the form and the accepted range."""
    return tuple([_parse_stage(part.strip()) for part in grammar.split(";") if part.strip()])


def _parse_stage(part: str) -> Stage:
    try:
        block, factor, times = part.split(":")
        fractions = [float(t) for t in times.split("-")]
        start, end, gradual = fractions if len(fractions) == 3 else (*fractions, fractions[1])
        stage = Stage(int(block), float(factor), start, end, gradual)
    except (ValueError, IndexError):
        raise ValueError(f"{part!r} is not of the form {_STAGE_FORM}") from None
    if not 1 <= stage.block <= 32:
        raise ValueError(f"block {stage.block} in {part!r} is outside 1 to 32")
    if not _MIN_FACTOR <= stage.factor <= _MAX_FACTOR:
        raise ValueError(f"factor {stage.factor:g} in {part!r} is outside {_MIN_FACTOR:g} to {_MAX_FACTOR:g}")
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(f"a time in {part!r} is outside 0 to 1")
    if stage.problem():
        raise ValueError(f"{part!r}: {stage.problem()}")
    return stage


@dataclass(frozen=True)
class DeepShrinkSettings(Settings):
    block: int = integer(
        3, 1, 32,
        label="Block number",
        help="Input block after which the map shrinks. 3 is the usual place; higher acts deeper and more gently. "
        "SD 1.x and 2.x have blocks 1 to 11, SDXL 1 to 8.",
    )  # fmt: skip
    factor: float = number(
        2.0, _MIN_FACTOR, _MAX_FACTOR, 0.05,
        label="Downscale factor",
        help="How many times smaller. About target size / native size: 2 for 1024 px with SD 1.5 or 2048 px with SDXL. "
        "1 does nothing, below 1 enlarges.",
    )  # fmt: skip
    start: float = number(
        0.0, 0.0, 1.0, 0.01,
        label="Start",
        help="Fraction of the pass at which shrinking begins. 0 is the first step.",
    )  # fmt: skip
    end: float = number(
        0.35, 0.0, 1.0, 0.01,
        label="End",
        help="Fraction at which the full shrink ends. Later keeps the composition safer, earlier keeps more detail.",
    )  # fmt: skip
    gradual: float = number(
        0.6, 0.0, 1.0, 0.01,
        label="Gradual",
        help="Fraction at which the map is back at its original size; between End and here it grows step by step. "
        "At or below End the size jumps back at once.",
    )  # fmt: skip
    after_skip: bool = toggle(
        True,
        label="Shrink after skip",
        help="On: the skip connection of the block keeps its full size, which keeps detail. Off: it shrinks as well.",
    )
    downscale_method: str = choice(BICUBIC, METHODS, label="Downscale method", help="How the map is shrunk.")
    upscale_method: str = choice(
        BICUBIC, METHODS, label="Upscale method", help="How the map is enlarged where it meets its full-size skip."
    )
    antialias: bool = toggle(
        False,
        label="Antialias",
        help="Low-pass before shrinking (bicubic and bilinear). Smoother at factors of 2 and more.",
    )
    more_stages: str = text(
        "",
        check=parse_stages,
        label="More stages",
        help=f"Further shrinks at the same time, each {_STAGE_FORM}. Example: 6:2:0-0.2",
    )
    only_above_native: bool = toggle(
        True,
        label="Only above native size",
        help="Does nothing when the picture has no more pixels than the model was trained for. Leave it on.",
    )
    passes: str = passes_choice()

    @property
    def stages(self) -> tuple[Stage, ...]:
        main = Stage(self.block, self.factor, self.start, self.end, self.gradual)
        return (main, *parse_stages(self.more_stages))

    def problem(self) -> str | None:
        return self.stages[0].problem()


@dataclass(frozen=True)
class ResolvedStage:
    """A stage in the noise levels of one run."""

    stage: Stage
    full: SigmaRange
    sigma_first: float
    sigma_end: float
    sigma_gradual: float

    @classmethod
    def of(cls, stage: Stage, run: Run) -> ResolvedStage:
        full = Window(stage.start, stage.end).resolve(run)
        # an end of 0 lies at infinite noise; the growth then starts with the run's own first level
        sigma_end = min(run.sigma_at(max(stage.start, stage.end)), run.sigma_first)
        return cls(stage, full, run.sigma_first, sigma_end, run.sigma_at(stage.gradual))

    def scale(self, sigma: float) -> float:
        """Scale of the map at a noise level: 1/f, growing, or 1. Monotone as sigma falls, once the window began."""
        smallest = 1 / self.stage.factor
        if sigma in self.full:
            return smallest
        if self.sigma_end >= sigma >= self.sigma_gradual and self.sigma_end > self.sigma_gradual:
            return smallest + (1 - smallest) * (self.sigma_end - sigma) / (self.sigma_end - self.sigma_gradual)
        return 1.0

    def phase(self, sigma: float) -> str:
        if sigma in self.full:
            return FULL_SHRINK
        return ORIGINAL if self.scale(sigma) == 1 else GROWING

    def describe(self) -> str:
        text_ = f"block {self.stage.block} shrunk by {self.stage.factor:g}"
        if self.stage.start < self.stage.end:
            text_ += f" from sigma {min(self.full.upper, self.sigma_first):.4g} to {self.full.lower:.4g}"
        if self.sigma_gradual < self.sigma_end:
            text_ += f", growing from {self.sigma_end:.4g} to {self.sigma_gradual:.4g}"
        return text_


class DeepShrinkPatch(Patch, FeatureMaps):
    def __init__(self, settings: DeepShrinkSettings, run: Run) -> None:
        super().__init__()
        assert run.model.unet is not None
        self._settings = settings
        self._topology = run.model.unet
        self._stages = tuple([ResolvedStage.of(stage, run) for stage in settings.stages])
        self._shrunk_in: Call | None = None

    def input_block(self, h: Tensor, index: int, call: Call) -> Tensor:
        return h if self._settings.after_skip else self._shrink(h, index, call)

    def after_skip(self, h: Tensor, index: int, call: Call) -> Tensor:
        return self._shrink(h, index, call) if self._settings.after_skip else h

    def grow(self, h: Tensor, size: Size, index: int, call: Call) -> Tensor | None:
        # a mismatch in a call that shrank nothing is the host's own (odd sizes) and stays the host's
        if self._shrunk_in is not call:
            return None
        return resize(h, size, self._settings.upscale_method)

    def _shrink(self, h: Tensor, index: int, call: Call) -> Tensor:
        multiple = 2 ** self._topology.halvings_after(index)
        for resolved in self._stages:
            if resolved.stage.block == index:
                h = self._resize(h, resolved.scale(call.sigma), multiple, call)
        return h

    def _resize(self, h: Tensor, scale: float, multiple: int, call: Call) -> Tensor:
        height, width = map_size(h)
        size = scaled_length(height, scale, multiple), scaled_length(width, scale, multiple)
        if size == (height, width):
            return h
        self.fired += 1
        self._shrunk_in = call
        return resize(h, size, self._settings.downscale_method, self._settings.antialias)

    def describe(self) -> str:
        return " and ".join(stage.describe() for stage in self._stages)


def begin(settings: DeepShrinkSettings, run: Run) -> DeepShrinkPatch:
    """The patch for one run. Raises `Refusal` on a model without UNet blocks or without the chosen block."""
    unet = unet_of(run, "DeepShrink changes UNet blocks")
    for stage in settings.stages:
        if stage.block >= unet.input_blocks:
            raise Refusal(
                f"input block {stage.block} does not exist in {run.model.family}: "
                f"set Block number to 1 to {unet.input_blocks - 1}"
            )
    if settings.only_above_native:
        check_above_native(run)
    if all(stage.factor == 1 for stage in settings.stages):
        raise Rest("factor 1 changes nothing")
    return DeepShrinkPatch(settings, run)


def curve(settings: DeepShrinkSettings, run: Run) -> Curve:
    """Scale of the deepest map at every step of a run."""
    stages = [ResolvedStage.of(stage, run) for stage in settings.stages]
    values, phases = [], []
    for sigma in run.sigmas:
        product = 1.0
        for stage in stages:
            product *= stage.scale(sigma)
        values.append(product)
        phases.append(stages[0].phase(sigma))
    return Curve(tuple(values), tuple(phases), low=0.0, high=max(1.0, *values), caption="scale of the deep map")


TECHNIQUE = Technique(
    name="deep_shrink",
    title="DeepShrink",
    family="Composition",
    summary="Keeps one subject instead of several above the model's native size, and makes the early steps faster.",
    source="Kohya's Deep Shrink (2023); ComfyUI PatchModelAddDownscale",
    twins=("Kohya HRFix", "Kohya Hires.fix"),
    settings=DeepShrinkSettings,
    begin=begin,
    presets={
        "Default (2x, gradual)": DeepShrinkSettings(),
        "2x, hard cut": DeepShrinkSettings(gradual=0.35),
        "2x, composition first": DeepShrinkSettings(end=0.5, gradual=0.75),
        "1.5x": DeepShrinkSettings(factor=1.5),
        "4x": DeepShrinkSettings(factor=4.0, end=0.5, gradual=0.75),
        "SDXL 2x, gentle": DeepShrinkSettings(block=4, end=0.35, gradual=0.5),
    },
    curve=curve,
)
