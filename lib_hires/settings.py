"""One declaration per parameter.

A technique's settings are a frozen dataclass of fields made with `toggle`, `integer`, `number`, `choice`, `text`,
`painting`.
Everything that a user meets (component, infotext, X/Y/Z axis, preset, API key, parameter table, error text) derives
from these declarations; nothing else repeats a range or a default.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lib_hires import painted_map

FIRST, HIRES, BOTH = "First pass", "Hires pass", "Both"
PASS_CHOICES = (BOTH, FIRST, HIRES)

_YES = {"true", "on", "yes", "1"}
_NO = {"false", "off", "no", "0"}
_LONGEST_EXCERPT = 80


class Unusable(ValueError):
    """A value that cannot be read as its parameter; the text says what would do."""


@dataclass(frozen=True)
class Param:
    """How one parameter looks, what it accepts and what it means."""

    kind: str  # toggle, integer, number, choice, text or painting
    default: Any
    label: str
    help: str
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    check: Callable[[str], object] | None = None  # text and painting: raises ValueError on bad grammar
    shown_with: tuple[str, str] | None = None  # painting only: the field and its choice that make use of it
    formerly: str = ""  # the label that older infotexts have

    @property
    def accepts(self) -> str:
        """The accepted values in words, for messages and the parameter table."""
        if self.kind == "toggle":
            return "on or off"
        if self.kind == "choice":
            return ", ".join(self.choices)
        if self.kind == "text":
            return "text"
        if self.kind == "painting":
            return f"{painted_map.ACCEPTS}; over the API also a PNG or JPEG in base64"
        return f"{self.minimum:g} to {self.maximum:g}"

    def read(self, raw: Any) -> tuple[Any, str | None]:
        """Return (value, note). The note tells of a repair, else None. Raises `Unusable` where no repair is honest."""
        if raw is None:
            return self.default, f"has no value; its default {self.show(self.default)} is used"
        return _READERS[self.kind](self, raw)

    def show(self, value: Any) -> str:
        """The value as infotext and messages write it; `read` takes it back unchanged."""
        if self.kind == "toggle":
            return "on" if value else "off"
        if self.kind == "number":
            return repr(float(value)) if abs(value) < 1e-4 else f"{value:.10g}"
        return str(value)


def _read_toggle(param: Param, raw: Any) -> tuple[bool, str | None]:
    if isinstance(raw, bool):
        return raw, None
    word = f"{raw:g}" if isinstance(raw, float) else str(raw).strip().lower()
    if word in _YES:
        return True, None
    if word in _NO:
        return False, None
    raise Unusable(f"{raw!r} is neither on nor off")


def _read_number(param: Param, raw: Any) -> tuple[float, str | None]:
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise Unusable(f"{raw!r} is not a number ({param.accepts})")
    try:
        value = float(raw)
    except (ValueError, OverflowError):
        raise Unusable(f"{raw!r} is not a number ({param.accepts})") from None
    if math.isnan(value):
        raise Unusable(f"{raw!r} is not a number ({param.accepts})")
    assert param.minimum is not None and param.maximum is not None
    bounded = min(max(value, param.minimum), param.maximum)
    if bounded != value:
        return bounded, f"= {raw} is outside {param.accepts}; the nearest bound {bounded:g} is used"
    return value, None


def _read_integer(param: Param, raw: Any) -> tuple[int, str | None]:
    value, note = _read_number(param, raw)
    whole = round(value)
    if note is None and whole != value:
        note = f"= {raw} is not a whole number ({param.accepts}); {whole} is used"
    return whole, note


def _read_choice(param: Param, raw: Any) -> tuple[str, str | None]:
    for choice_ in param.choices:
        if str(raw).strip().lower() == choice_.lower():
            return choice_, None
    raise Unusable(f"{raw!r} is not one of {param.accepts}")


def _read_text(param: Param, raw: Any) -> tuple[str, str | None]:
    if not isinstance(raw, str):
        raise Unusable(f"{raw!r} is not text")
    value = raw.strip()
    if param.check is not None:
        try:
            param.check(value)
        except ValueError as error:
            raise Unusable(f"{excerpt(raw)}: {error}") from None
    return value, None


def excerpt(raw: str) -> str:
    """A text in a message: the beginning of one that nobody could read."""
    return repr(raw) if len(raw) <= _LONGEST_EXCERPT else f"{raw[:_LONGEST_EXCERPT]!r}..."


_READERS: Mapping[str, Callable[[Param, Any], tuple[Any, str | None]]] = {
    "toggle": _read_toggle,
    "number": _read_number,
    "integer": _read_integer,
    "choice": _read_choice,
    "text": _read_text,
    "painting": _read_text,
}


def _field(param: Param) -> Any:
    value, note = param.read(param.default)
    if note is not None or value != param.default:
        raise ValueError(f"{param.label}: default {param.default!r} is not acceptable: {note}")
    return dataclasses.field(default=param.default, metadata={"param": param})


def toggle(default: bool, *, label: str, help: str) -> Any:
    return _field(Param("toggle", default, label, help))


def number(
    default: float, minimum: float, maximum: float, step: float, *, label: str, help: str, formerly: str = ""
) -> Any:
    bounds = (float(minimum), float(maximum), float(step))
    return _field(Param("number", float(default), label, help, *bounds, formerly=formerly))


def integer(default: int, minimum: int, maximum: int, *, label: str, help: str) -> Any:
    return _field(Param("integer", default, label, help, minimum, maximum, 1))


def choice(default: str, choices: Sequence[str], *, label: str, help: str) -> Any:
    return _field(Param("choice", default, label, help, choices=tuple(choices)))


def text(default: str, *, check: Callable[[str], object] | None = None, label: str, help: str) -> Any:
    return _field(Param("text", default, label, help, check=check))


def painting(*, shown_with: tuple[str, str], label: str, help: str) -> Any:
    """A map that is painted in the panel, as text; empty unless one is painted (see painted_map.py)."""
    return _field(Param("painting", "", label, help, check=painted_map.check, shown_with=shown_with))


def passes_choice() -> Any:
    """The pass choice that every technique offers."""
    return choice(
        BOTH,
        PASS_CHOICES,
        label="Passes",
        help="Which sampling passes it acts in: the first pass, the Hires. fix pass, or both. "
        "img2img has one pass, and it always acts there.",
    )


def window_start() -> Any:
    return number(
        0.0, 0.0, 1.0, 0.01,
        label="Start",
        help="Fraction of the pass at which it begins to act. 0 is the first step.",
    )  # fmt: skip


def window_end() -> Any:
    return number(
        1.0, 0.0, 1.0, 0.01,
        label="End",
        help="Fraction of the pass at which it stops. 1 is the last step.",
    )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Base of every technique's settings. Subclasses are frozen dataclasses of declared parameters."""

    def problem(self) -> str | None:
        """What makes these values, each fine by itself, useless together. None where nothing does."""
        return None


S = TypeVar("S", bound=Settings)


def params_of(settings: type[Settings] | Settings) -> dict[str, Param]:
    """All declared parameters in order: {field name: Param}."""
    return {f.name: f.metadata["param"] for f in dataclasses.fields(settings)}


def read_settings(kind: type[S], raw: Mapping[str, Any], base: S | None = None) -> tuple[S, list[str]]:
    """Validate `raw` ({field name: value}); omitted fields come from `base` or the defaults.

    Returns (settings, notes on repaired or ignored values). Raises `Unusable` if a value cannot be repaired.
    """
    params = params_of(kind)
    values, notes = {}, []
    for name, value in raw.items():
        if name not in params:
            notes.append(f"unknown setting {name!r} is ignored (known: {', '.join(params)})")
            continue
        try:
            values[name], note = params[name].read(value)
        except Unusable as error:
            raise Unusable(f"{params[name].label} = {error}") from None
        if note:
            notes.append(f"{params[name].label} {note}")
    return dataclasses.replace(base if base is not None else kind(), **values), notes


def changed_fields(settings: Settings) -> dict[str, Any]:
    """Field values that differ from their defaults."""
    return {
        name: getattr(settings, name)
        for name, param in params_of(settings).items()
        if getattr(settings, name) != param.default
    }
