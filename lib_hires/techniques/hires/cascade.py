"""Cascade: the hires pass in stages, each a hires pass of its own that begins from the picture of the one before.

Beyond twice the size one pass loses the composition; a picture that grows in steps keeps it. Every stage is the host's
own hires pass: its upscaler (through the picture, or of latents), its sampler, and the techniques of this plugin with
the stage's own size. A last stage at low denoise can clean up what the others left.

Reference: FreeScale's self-cascade (Qiu et al. 2024, section 3.2), DemoFusion (Du et al. 2023); the clean-up is the
advice of ComfyUI-Iterative-Mixer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from lib_hires.run import Size
from lib_hires.settings import Settings, number, text, toggle
from lib_hires.stages import (
    HIRES_FAMILY,
    Changes,
    HiresPass,
    Stage,
    changes_of,
    even_factors,
    of_stage,
    parse_changes,
    per_stage,
    scaled,
    sizes,
)
from lib_hires.technique import Rest, Technique

AUTO = "auto"
_MOST_STAGES = 8


def _number_between(low: float, high: float, what: str) -> Callable[[str], float]:
    def read(part: str) -> float:
        try:
            value = float(part)
        except ValueError:
            raise ValueError(f"{part!r} is not a number ({what}, {low:g} to {high:g})") from None
        if not low <= value <= high:
            raise ValueError(f"{what} {part} is outside {low:g} to {high:g}")
        return value

    return read


def parse_factors(grammar: str) -> tuple[float, ...]:
    """Read "1.5, 2"; "auto" is the empty tuple."""
    if grammar.strip().lower() == AUTO:
        return ()
    factors = per_stage(grammar, _number_between(0.25, 8, "factor"))
    if not factors:
        raise ValueError(f"write {AUTO}, or factors as 1.5, 2")
    if len(factors) > _MOST_STAGES:
        raise ValueError(f"{len(factors)} stages are more than {_MOST_STAGES}")
    return factors


def parse_denoise(grammar: str) -> tuple[float, ...]:
    return per_stage(grammar, _number_between(0, 1, "denoise"))


def parse_steps(grammar: str) -> tuple[int, ...]:
    return tuple(round(steps) for steps in per_stage(grammar, _number_between(1, 1000, "steps")))


def parse_cfg(grammar: str) -> tuple[float, ...]:
    return per_stage(grammar, _number_between(1, 30, "CFG scale"))


@dataclass(frozen=True)
class CascadeSettings(Settings):
    factors: str = text(
        AUTO,
        check=parse_factors,
        label="Stages",
        help='How many times larger each stage is than the one before, as "2, 2" or "1.5, 2". auto: even stages to the '
        "size that Hires. fix asks for. A list goes where it leads, also beyond that size.",
    )
    largest: float = number(
        2.0, 1.1, 4.0, 0.05,
        label="Largest stage",
        help="With auto: no stage is more than this many times larger than the one before. Above 2 pictures lose their "
        "composition.",
    )  # fmt: skip
    denoise: str = text(
        "",
        check=parse_denoise,
        label="Denoise per stage",
        help='Denoising strength of each stage, as "0.6, 0.4"; the last one serves all further stages. '
        "Empty: that of Hires. fix.",
    )
    steps: str = text(
        "", check=parse_steps, label="Steps per stage", help='As "20, 12". Empty: the hires steps of Hires. fix.'
    )
    cfg_scale: str = text(
        "", check=parse_cfg, label="CFG per stage", help='As "7, 9". Empty: the CFG scale of the hires pass.'
    )
    changes: str = text(
        "",
        check=parse_changes,
        label="Settings per stage",
        help='Other settings that differ between stages, as "deep_shrink.factor = 2, 4; iterative_mixing.alpha = 3, 1" '
        "(names of the API). The technique must be switched on in its own section.",
    )
    follow_size: bool = toggle(
        True,
        label="DeepShrink follows the stages",
        help="With several stages DeepShrink's factor is each stage's size / native size, instead of the same in all "
        "(restrained dilation's automatic factor does so anyway). A factor under Settings per stage goes before.",
    )
    cleanup: float = number(
        0.0, 0.0, 0.5, 0.01,
        label="Clean-up denoise",
        help="Above 0: one more pass at the final size with this denoising strength and without mixing, against grain. "
        "0.05 to 0.25 is usual.",
    )  # fmt: skip
    save_stages: bool = toggle(
        False, label="Save stage pictures", help="Saves the picture of every stage beside the final one."
    )


def divide(settings: CascadeSettings, hires: HiresPass, stages: list[Stage]) -> list[Stage]:
    """The stages from the base to the target size. Raises `Rest` where one stage is all that is asked for."""
    listed = parse_factors(settings.factors)
    found = scaled(hires.base, listed) if listed else _even(hires, settings.largest)
    divided = [_stage(settings, number_, size) for number_, size in enumerate(found)]
    if settings.cleanup > 0:
        divided.append(Stage(found[-1], denoise=settings.cleanup, cleanup=True))
    if settings.follow_size and hires.native is not None and len(found) > 1:
        divided = [replace(stage, suggested=_following(stage.size, hires.native)) for stage in divided]
    if divided == stages:
        height, width = hires.target
        raise Rest(f"{width}x{height} is one stage, with nothing of its own")
    return divided


def _following(size: Size, native: Size) -> Changes:
    """Settings that go by how much larger a stage is than what the model was trained at."""
    larger = max(1.0, math.sqrt(math.prod(size) / math.prod(native)))
    return {"deep_shrink": {"factor": f"{larger:.4g}"}}


def _even(hires: HiresPass, largest: float) -> list[Size]:
    scale = max(target / base for base, target in zip(hires.base, hires.target, strict=True))
    return sizes(hires.base, hires.target, even_factors(scale, largest))


def _stage(settings: CascadeSettings, position: int, size: Size) -> Stage:
    return Stage(
        size,
        denoise=of_stage(parse_denoise(settings.denoise), position),
        steps=of_stage(parse_steps(settings.steps), position),
        cfg_scale=of_stage(parse_cfg(settings.cfg_scale), position),
        changes=changes_of(parse_changes(settings.changes), position),
        save=settings.save_stages,
    )


TECHNIQUE = Technique(
    name="cascade",
    title="Cascade",
    family=HIRES_FAMILY,
    summary="Hires. fix in several smaller steps instead of one, for 3x, 4x and beyond, each from the picture before. "
    "Needs Hires. fix to be on, or img2img at a larger size.",
    source="FreeScale self-cascade (Qiu et al. 2024); DemoFusion (Du et al. 2023)",
    settings=CascadeSettings,
    stages=divide,
    presets={
        "2x at most per stage": CascadeSettings(),
        "Less denoise as it grows": CascadeSettings(denoise="0.6, 0.45, 0.35"),
        "With clean-up": CascadeSettings(cleanup=0.15),
    },
)
