"""From whatever arrived (page, API, infotext, X/Y/Z axes) to what one generation is asked to do.

Nothing here raises: what cannot be read switches its technique off, what can be repaired is repaired, and either is
told in a note that names the field, the value and the accepted range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lib_hires import uploaded_map
from lib_hires.generation import Generation
from lib_hires.recipes import RECIPES, find_recipe
from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.settings import Param, Settings, Unusable, excerpt, params_of, read_settings
from lib_hires.technique import Technique

ENABLED, PRESET = "enabled", "preset"  # what a request may say about a technique beside its parameters
RECIPE = "recipe"  # and beside the techniques

Raw = Mapping[str, Any]  # {field name, "enabled" or "preset": value as it arrived}
Axes = Mapping[tuple[str, str], Any]  # {(technique name, field): value of an X/Y/Z cell}
Presets = Callable[[Technique], Mapping[str, Settings]]

_SWITCH = Param("toggle", False, "Enabled", "Whether the technique acts at all.")
_CARRIED = "hires_plus_notes"
_LONGEST_NOTE = 400  # a megabyte of nonsense in a request must not become a megabyte of infotext


def built_in_presets(technique: Technique) -> Mapping[str, Settings]:
    return technique.presets


def read_request(args: Sequence[Any], axes: Axes | None = None, presets: Presets = built_in_presets) -> Generation:
    """Read script arguments: a dict by technique name in front, or the positional list; axes go over both."""
    notes = [note for value in args for note in getattr(value, _CARRIED, ())]
    asked = _by_name(args, notes) if args and isinstance(args[0], Mapping) else _by_position(args, notes)
    asked = _with_axes(asked, axes or {})
    selection = {}
    for technique in TECHNIQUES:
        settings, told = read_technique(technique, asked.get(technique.name, {}), presets)
        notes += told
        if settings is not None:
            selection[technique.name] = settings
    return Generation(selection, [_shortened(note) for note in notes])


def read_technique(
    technique: Technique, raw: Raw, presets: Presets = built_in_presets
) -> tuple[Settings | None, list[str]]:
    """The settings of one technique, None where it is off, and what to tell the user."""
    try:
        if not _is_on(raw):
            return None, []
        values = {name: _sent(technique, name, raw[name]) for name in raw if name not in (ENABLED, PRESET)}
        settings, notes = read_settings(technique.settings, values, _preset(technique, raw, presets))
    except Unusable as error:
        return None, [f"{technique.title} is off: {error}"]
    return settings, [f"{technique.title}: {note}" for note in notes]


def carrying(value: Any, notes: Sequence[str]) -> Any:
    """The same number or text, with notes for the request that it will be an argument of.

    Infotext in an API request becomes script arguments long before there is a generation; this is how what had to be
    repaired in it still reaches the answer. A host that copies the value to its page drops the notes.
    """
    kind = type(value)
    if kind not in (str, int, float):
        return value
    return type(kind.__name__, (kind,), {_CARRIED: tuple(notes)})(value)


def positional_fields(technique: Technique) -> tuple[str, ...]:
    """The fields of a technique in the order of its components and of the positional list."""
    return (ENABLED, *params_of(technique.settings))


def _by_position(args: Sequence[Any], notes: list[str]) -> dict[str, Raw]:
    rest = list(args)
    asked: dict[str, Raw] = {}
    for technique in TECHNIQUES:
        fields = positional_fields(technique)
        asked[technique.name] = dict(zip(fields, rest, strict=False))
        rest = rest[len(fields) :]
    if rest:
        notes.append(f"{len(rest)} values beyond the last setting are ignored")
    return asked


def _by_name(args: Sequence[Any], notes: list[str]) -> dict[str, Raw]:
    asked = _of_recipe(args[0].get(RECIPE), notes)
    for name, value in args[0].items():
        if name == RECIPE:
            continue
        if name not in BY_NAME:
            notes.append(f"unknown technique {name!r} is ignored (known: {', '.join(BY_NAME)})")
        elif isinstance(value, Mapping):
            on = True if value.get(ENABLED) is None else value[ENABLED]
            below = {} if PRESET in value else asked.get(name, {})
            asked[name] = {**below, **value, ENABLED: on}
        elif isinstance(value, bool):
            asked[name] = {ENABLED: value}
        else:
            notes.append(f"{BY_NAME[name].title} is off: {_printable(value)!r} is neither settings nor true or false")
    if _were_sent(args[1:]):
        notes.append("values after the dictionary are ignored: put them into it")
    return asked


def _of_recipe(wanted: Any, notes: list[str]) -> dict[str, Raw]:
    """What a recipe asks for; the other keys of the request go over it."""
    if wanted is None:
        return {}
    recipe = find_recipe(wanted) if isinstance(wanted, str) else None
    if recipe is None:
        known = ", ".join(repr(each.name) for each in RECIPES)
        notes.append(f"recipe {_printable(wanted)!r} is unknown and ignored (known: {known})")
        return {}
    return {name: {ENABLED: True, **_values(settings)} for name, settings in recipe.selection.items()}


def _values(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in params_of(settings)}


def _were_sent(values: Sequence[Any]) -> bool:
    """Whether values beside the dictionary come from the user: hosts fill the list up with defaults."""
    defaults: list[Any] = []
    for technique in TECHNIQUES:
        defaults += [False, *(param.default for param in params_of(technique.settings).values())]
    return any(value is not None and value != default for value, default in zip(values, defaults[1:], strict=False))


def _with_axes(asked: Mapping[str, Raw], axes: Axes) -> dict[str, Raw]:
    merged = dict(asked)
    for name in dict.fromkeys(technique for technique, _ in axes):
        cell = {field: value for (technique, field), value in axes.items() if technique == name}
        below = {} if PRESET in cell else merged.get(name, {})  # a preset speaks for every setting
        merged[name] = {**below, ENABLED: True, **cell}
    return merged


def _sent(technique: Technique, field: str, value: Any) -> Any:
    """The value of a setting as its declaration reads it: a picture file stands for the map that it shows."""
    param = params_of(technique.settings).get(field)
    if param is None or param.kind != "painting":
        return _printable(value)
    try:
        return uploaded_map.as_map(_printable(value))
    except ValueError as error:
        raise Unusable(f"{param.label} = {excerpt(value)}: {error} ({param.accepts})") from None


def _is_on(raw: Raw) -> bool:
    try:
        return bool(_SWITCH.read(_printable(raw.get(ENABLED)))[0])
    except Unusable as error:
        raise Unusable(f"{_SWITCH.label} = {error}") from None


def _preset(technique: Technique, raw: Raw, presets: Presets) -> Settings | None:
    wanted = raw.get(PRESET)
    if wanted is None:
        return None
    known = presets(technique)
    for name, settings in known.items():
        if isinstance(wanted, str) and name.lower() == wanted.strip().lower():
            return settings
    raise Unusable(f"Preset = {_printable(wanted)!r} is unknown (known: {', '.join(map(repr, known))})")


def _printable(value: Any) -> Any:
    """The value, or words for one that cannot even be written into a message (an integer of 5000 digits)."""
    try:
        repr(value)
    except (ValueError, RecursionError):
        return f"<{type(value).__name__}>"
    return value


def _shortened(note: str) -> str:
    """Cut out the middle, where the value is: the field stands in front of it and the range behind."""
    note = " ".join(note.split())
    half = _LONGEST_NOTE // 2
    return note if len(note) <= _LONGEST_NOTE else f"{note[: half - 3]} ... {note[-half + 3 :]}"
