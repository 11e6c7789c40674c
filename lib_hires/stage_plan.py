"""Which stages a hires pass has, and which techniques act in each of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from lib_hires.generation import Generation
from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.settings import Settings, Unusable, read_settings
from lib_hires.stages import HIRES_FAMILY, HiresPass, Stage
from lib_hires.technique import Refusal, Rest, Technique

log = logging.getLogger("hires_plus")

Selection = Mapping[str, Settings]


def plan_stages(generation: Generation, hires: HiresPass) -> list[Stage]:
    """The stages of this pass: one of the target size, unless techniques divide it. What acted, rests or was refused is
    noted in the generation. Never raises."""
    stages = [Stage(hires.target)]
    for technique in TECHNIQUES:
        if technique.name in generation.selection and technique.stages is not None:
            stages = _divided(technique, generation, hires, stages)
    return stages


def _divided(technique: Technique, generation: Generation, hires: HiresPass, stages: list[Stage]) -> list[Stage]:
    assert technique.stages is not None
    try:
        if hires.masked:
            raise Rest("a mask belongs to one size")
        divided = list(technique.stages(generation.selection[technique.name], hires, stages))
    except Rest as rest:
        generation.rested[technique.title] = str(rest)
    except Refusal as refusal:
        generation.refused[technique.title] = str(refusal)
    except Exception as error:  # a defect of ours must cost the user one technique, not the picture
        log.exception("%s could not divide the hires pass", technique.title)
        generation.refused[technique.title] = f"internal error: {error}"
    else:
        generation.acted.add(technique.name)
        return divided
    return stages


def divides(selection: Selection) -> bool:
    """Whether any technique in the selection may divide a hires pass."""
    return any(BY_NAME[name].stages is not None for name in selection)


def selection_of(stage: Stage, selection: Selection) -> tuple[dict[str, Settings], list[str]]:
    """The techniques of one stage with their values in it, and what to tell the user."""
    chosen, notes = {}, []
    for name, settings in selection.items():
        if not (stage.cleanup and BY_NAME[name].family == HIRES_FAMILY):
            chosen[name] = settings
    for name, raw in stage.suggested.items():
        if name in chosen:
            chosen[name], _ = _changed(name, chosen[name], raw)
    for name, raw in stage.changes.items():
        if name not in BY_NAME:
            notes.append(f"stage setting of unknown technique {name!r} is ignored (known: {', '.join(BY_NAME)})")
        elif name in chosen:
            chosen[name], told = _changed(name, chosen[name], raw)
            notes += told
    return chosen, notes


@contextmanager
def in_stage(generation: Generation, number: int, stages: Sequence[Stage]) -> Iterator[None]:
    """While it is open, runs of this generation have the techniques of one stage, with their values in it."""
    generation.in_stage, notes = selection_of(stages[number], generation.selection)
    generation.notes += [note for note in notes if note not in generation.notes]
    for note in notes:
        log.warning(note)
    if len(stages) > 1:
        generation.stage = "clean-up" if stages[number].cleanup else f"stage {number + 1} of {len(stages)}"
    try:
        yield
    finally:
        generation.in_stage, generation.stage = None, ""


def _changed(name: str, settings: Settings, raw: Mapping[str, str]) -> tuple[Settings, list[str]]:
    title = BY_NAME[name].title
    try:
        changed, notes = read_settings(type(settings), raw, settings)
    except Unusable as error:
        return settings, [f"{title}, stage setting {error}; the stage goes on without it"]
    return changed, [f"{title}, stage setting: {note}" for note in notes]
