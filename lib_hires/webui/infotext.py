"""The plugin's keys in a picture's infotext, both ways.

A technique that is on writes its title ("DeepShrink: on") and, as "DeepShrink <label>", only what differs from the
defaults. Its title alone decides about on and off, so a text without our keys switches everything off.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

from lib_hires.generation import Generation
from lib_hires.registry import TECHNIQUES
from lib_hires.request import ENABLED, carrying, positional_fields, read_technique
from lib_hires.settings import Settings, changed_fields, params_of
from lib_hires.technique import Technique

log = logging.getLogger("hires_plus")

NOTE = "Hires Plus note"  # for people; no component reads it back
_NEVER_ACTED = "no step fell into its window, nothing was to change, or another technique did it"


def key(technique: Technique, field: str) -> str:
    """The infotext key of a technique's field."""
    if field == ENABLED:
        return technique.title
    return f"{technique.title} {params_of(technique.settings)[field].label}"


def all_keys() -> list[str]:
    """Every key that the plugin may write."""
    return [key(technique, field) for technique in TECHNIQUES for field in positional_fields(technique)] + [NOTE]


def write(params: MutableMapping[str, Any], generation: Generation) -> None:
    """Put down what was asked for. First everything of ours goes: X/Y/Z cells share one dict of parameters."""
    _replace(params, generation.selection, generation.notes)


def settle(params: MutableMapping[str, Any], generation: Generation) -> list[str]:
    """After sampling: keep only what really acted, and say why the rest did not. Returns what is new to say."""
    acted = {name: settings for name, settings in generation.selection.items() if name in generation.acted}
    reasons = [reason for technique in TECHNIQUES for reason in _outcome(technique, generation)]
    _replace(params, acted, [*generation.notes, *reasons])
    return reasons


def _replace(params: MutableMapping[str, Any], selection: Mapping[str, Settings], notes: list[str]) -> None:
    for name in all_keys():
        params.pop(name, None)
    for technique in TECHNIQUES:
        if technique.name in selection:
            params.update(_lines(technique, selection[technique.name]))
    if notes:
        params[NOTE] = "; ".join(notes)


def _lines(technique: Technique, settings: Settings) -> dict[str, str]:
    params = params_of(settings)
    lines = {key(technique, ENABLED): "on"}
    return lines | {key(technique, name): params[name].show(value) for name, value in changed_fields(settings).items()}


def _outcome(technique: Technique, generation: Generation) -> list[str]:
    """Why a technique that was on did not act, or what may have spoilt the picture; a refusal is told even if it acted
    in another pass."""
    if technique.name not in generation.selection:
        return []
    refusal = generation.refused.get(technique.title)
    if refusal:
        return [f"{technique.title} was refused: {refusal}"]
    warning = generation.warned.get(technique.title)
    if technique.name in generation.acted:
        return [f"{technique.title}: {warning}"] if warning else []
    return [f"{technique.title} did nothing: {generation.rested.get(technique.title) or warning or _NEVER_ACTED}"]


class PasteTarget(str):
    """What a host needs to fill one component from infotext parameters.

    As a string it is the infotext key, by which "Send to" finds the same component in another tab. As a function it
    gives the value: right-typed and in range, or None to leave the component as it is.
    """

    def __new__(cls, technique: Technique, field: str) -> PasteTarget:
        return super().__new__(cls, key(technique, field))

    def __init__(self, technique: Technique, field: str):
        self._technique = technique
        self._field = field

    def __call__(self, params: Mapping[str, Any]) -> Any:
        is_on, settings, notes = read(self._technique, params)
        if self._field == ENABLED:
            for note in notes:  # once per paste, not once per component
                log.warning(note)
            return is_on
        value = getattr(settings, self._field, None)
        return carrying(value, notes) if notes and self._field == _carrier(self._technique) else value


def paste_targets(technique: Technique) -> list[PasteTarget]:
    """One target for each component, in positional order."""
    return [PasteTarget(technique, field) for field in positional_fields(technique)]


def read(technique: Technique, params: Mapping[str, Any]) -> tuple[bool, Settings | None, list[str]]:
    """(on, settings, notes) from infotext parameters. Settings are None where the text does not switch it on; where it
    does and cannot be understood, the technique is off and its settings are the defaults.
    """
    known = {field: _key_in(params, technique, field) for field in positional_fields(technique)}
    raw = {field: params[name] for field, name in known.items() if name in params}
    settings, notes = read_technique(technique, raw)
    if settings is None and notes:
        return False, technique.settings(), notes
    return settings is not None, settings, notes


def _key_in(params: Mapping[str, Any], technique: Technique, field: str) -> str:
    """The key of a field, or the one that an older infotext has for it."""
    now = key(technique, field)
    formerly = "" if field == ENABLED else params_of(technique.settings)[field].formerly
    return f"{technique.title} {formerly}" if formerly and now not in params else now


def _carrier(technique: Technique) -> str | None:
    """The field whose value carries notes: a text if there is one, as any JSON writer takes a kind of str for a str."""
    kinds = {name: param.kind for name, param in params_of(technique.settings).items()}
    for wanted in (("choice", "text"), ("integer", "number")):
        for name, kind in kinds.items():
            if kind in wanted:
                return name
    return None  # only toggles, and true and false cannot carry anything
