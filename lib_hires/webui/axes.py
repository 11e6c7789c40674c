"""X/Y/Z axes for every technique: on and off, its preset, and each parameter.

An axis only notes down the raw value on the cell's own `p`; reading and repairing it is the request's business.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from lib_hires import TITLE
from lib_hires.registry import TECHNIQUES
from lib_hires.request import ENABLED, PRESET
from lib_hires.settings import Param, params_of
from lib_hires.technique import Technique
from lib_hires.webui.presets import PresetStore

log = logging.getLogger("hires_plus")

ATTRIBUTE = "hires_plus_axes"  # on p: {(technique name, field): raw value}

_MODULES = ("xyz_grid.py", "scripts.xyz_grid")  # the first is the name that a WebUI's script loader gives it
_NUMBER = r"[+-]?\s*(?:\d+\.?\d*|\.\d+)"
_RANGE = re.compile(rf"({_NUMBER})\s*-\s*({_NUMBER})\s*(?:\(\s*({_NUMBER})\s*\)|\[\s*(\d+)\s*\])?")
_MOST_VALUES = 1000


def register(store: PresetStore) -> None:
    """Add the axes to the host's X/Y/Z script; a callback of the host, run before it builds its page."""
    from modules import scripts

    for data in scripts.scripts_data:
        if data.script_class.__module__ in _MODULES:
            add_axes(data.module, store)
            return
    log.info("this WebUI has no X/Y/Z plot script, so there are no axes for it")


def add_axes(xyz: Any, store: PresetStore) -> None:
    """Append what is not there yet: the page can be built several times with one X/Y/Z module."""
    present = {option.label for option in xyz.axis_options}
    xyz.axis_options += [option for option in _options(xyz.AxisOption, store) if option.label not in present]


def _options(make: Callable[..., Any], store: PresetStore) -> list[Any]:
    options = []
    for technique in TECHNIQUES:
        on_off = Param("toggle", False, "", "")
        options.append(_option(make, technique, ENABLED, technique.title, on_off))
        names = _preset_names(technique, store)
        options.append(make(_label(f"{technique.title} preset"), str, _apply(technique, PRESET), choices=names))
        for field, param in params_of(technique.settings).items():
            options.append(_option(make, technique, field, f"{technique.title} {param.label}", param))
    return options


def _option(make: Callable[..., Any], technique: Technique, field: str, name: str, param: Param) -> Any:
    apply, show = _apply(technique, field), _format(name)
    if param.kind in ("integer", "number"):
        return make(_label(name), _as_it_is, apply, format_value=show, prepare=numbers)
    choices = {"toggle": ("off", "on"), "choice": param.choices}.get(param.kind)
    return make(_label(name), str, apply, format_value=show, choices=(lambda: list(choices)) if choices else None)


def _label(name: str) -> str:
    return f"[{TITLE}] {name}"


def _preset_names(technique: Technique, store: PresetStore) -> Callable[[], list[str]]:
    return lambda: list(store.all(technique))


def _apply(technique: Technique, field: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, x: Any, xs: Any) -> None:
        # a new dict each time: the cells are shallow copies of one p
        setattr(p, ATTRIBUTE, {**getattr(p, ATTRIBUTE, {}), (technique.name, field): x})

    return apply


def _format(name: str) -> Callable[[Any, Any, Any], str]:
    return lambda p, opt, x: f"{name}: {x:.8g}" if isinstance(x, float) else f"{name}: {x}"


def _as_it_is(value: Any) -> Any:
    """An axis type that never raises: a plain float would turn "abc" into a failed request."""
    return value


def numbers(text: Any) -> list[Any]:
    """The values of a numeric axis: "1, 2.5, 3-5, 0-1 (+0.25), 0-1 [5]". What is not a number stays text."""
    parts = (part.strip() for part in str(text).split(","))
    return [value for part in parts if part for value in _expanded(part)]


def _expanded(part: str) -> list[Any]:
    matched = _RANGE.fullmatch(part)
    if matched is None:
        return [_number_or_text(part)]
    first, last, step, count = matched.groups()
    start, end = _float(first), _float(last)
    if count is not None:
        values = _spread(start, end, int(count))
    else:
        values = _stepped(start, end, _float(step) if step else 1.0)
    return values or [part]


def _stepped(start: float, end: float, step: float) -> list[float]:
    if step == 0 or (end - start) / step > _MOST_VALUES:
        return []
    count = int((end - start) / step + 1e-6) + 1 if (end - start) / step >= 0 else 0
    return [round(start + index * step, 10) for index in range(count)]


def _spread(start: float, end: float, count: int) -> list[float]:
    if not 1 <= count <= _MOST_VALUES:
        return []
    return [round(start + (end - start) * index / max(count - 1, 1), 10) for index in range(count)]


def _float(text: str) -> float:
    return float(text.replace(" ", ""))


def _number_or_text(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
