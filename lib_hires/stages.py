"""Stages of a hires pass: how the way from the small picture to the target size is divided.

A technique that divides it has a `stages` function (technique.Technique): from the stages so far to new ones. Hosts run
each stage as a hires pass of their own, with the picture of the one before as its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lib_hires.run import Run, Size

Changes = Mapping[str, Mapping[str, str]]  # technique name: {field: value as text}

HIRES_FAMILY = "Hires pass"  # these techniques look back at the picture before, which a clean-up must not

CELL = 8  # pixels of a latent cell; every stage is a whole number of them


@dataclass(frozen=True)
class Stage:
    """One stage. `size` in pixels (height, width). None: as the host's own hires pass has it."""

    size: Size
    denoise: float | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    changes: Changes = field(default_factory=dict)  # settings of techniques that differ in this stage
    suggested: Changes = field(default_factory=dict)  # likewise, but not asked for: nobody is told where it is moot
    cleanup: bool = False  # at the size of the stage before, to smooth what it left
    save: bool = False  # whether its picture is wanted beside the final one


@dataclass(frozen=True)
class HiresPass:
    """What the host was asked for. Sizes in pixels; `first` is the run that drew the small picture, if one did."""

    base: Size
    target: Size
    first: Run | None = None
    steps: int | None = None  # asked for by the user
    masked: bool = False  # inpainting: a mask belongs to one size
    native: Size | None = None  # what the model was trained at


def even_factors(scale: float, largest: float) -> tuple[float, ...]:
    """The fewest equal factors, none above `largest`, that multiply to `scale`."""
    count = max(1, math.ceil(math.log(max(scale, 1.0)) / math.log(largest) - 1e-9))
    return (scale ** (1 / count),) * count


def sizes(base: Size, target: Size, factors: Sequence[float]) -> list[Size]:
    """Sizes after each factor, on the straight way (in logarithms) from base to target, which the last one is.

    Width and height may grow by different factors: each takes its own share.
    """
    total = math.log(math.prod(factors)) or 1.0
    passed, found = 0.0, []
    for factor in factors[:-1]:
        passed += math.log(factor) / total
        found.append(_whole(tuple(b * (t / b) ** passed for b, t in zip(base, target, strict=True))))
    return [*found, target]


def scaled(base: Size, factors: Sequence[float]) -> list[Size]:
    """Sizes after each factor, wherever they lead."""
    return [_whole(tuple(side * math.prod(factors[: k + 1]) for side in base)) for k in range(len(factors))]


def _whole(size: Sequence[float]) -> Size:
    height, width = (max(CELL, round(side / CELL) * CELL) for side in size)
    return height, width


def per_stage(grammar: str, read: Callable[[str], Any]) -> tuple[Any, ...]:
    """Read "0.7, 0.5": one value for each stage. Raises ValueError naming the part that cannot be read."""
    return tuple(read(part.strip()) for part in grammar.split(",") if part.strip())


def of_stage(values: Sequence[Any], number: int) -> Any:
    """The value of stage `number` (from 0); the last one serves all further stages. None where there are none."""
    return values[min(number, len(values) - 1)] if values else None


def parse_changes(grammar: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """Read "iterative_mixing.alpha = 3, 1.5; deep_shrink.factor = 2, 4": {(technique, field): a value per stage}."""
    found = {}
    for part in (part.strip() for part in grammar.split(";")):
        if not part:
            continue
        target, equals, values = part.partition("=")
        technique, dot, name = target.strip().partition(".")
        if not (equals and dot and technique and name and values.strip()):
            raise ValueError(f"{part!r} is not of the form technique.setting = value, value; ...")
        found[technique, name] = per_stage(values, str)
    return found


def changes_of(parsed: Mapping[tuple[str, str], Sequence[str]], number: int) -> Changes:
    """What `parse_changes` found, for one stage."""
    changes: dict[str, dict[str, str]] = {}
    for (technique, name), values in parsed.items():
        changes.setdefault(technique, {})[name] = of_stage(values, number)
    return changes


def with_first(stages: Sequence[Stage], **values: Any) -> list[Stage]:
    """The stages, the first of them changed."""
    return [replace(stages[0], **values), *stages[1:]]
