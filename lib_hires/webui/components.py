"""One gradio component for each declared parameter, and how our handlers talk to gradio 3.41 and 4.40 alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from lib_hires.request import ENABLED, positional_fields, read_technique
from lib_hires.settings import Param, Settings
from lib_hires.technique import Technique

# no queue, no spinner: what is shown is to follow the hand
LIVE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


def component(param: Param, elem_id: str) -> Any:
    """The component for a parameter. Its value has the type of the default: hosts convert pasted values to that."""
    shared = {"value": param.default, "label": param.label, "info": param.help, "elem_id": elem_id}
    if param.kind == "toggle":
        return unsaved(gr.Checkbox(elem_classes=["hires-plus-toggle"], **shared))
    if param.kind == "choice":
        return unsaved(gr.Dropdown(choices=list(param.choices), **shared))
    if param.kind == "text":
        return unsaved(gr.Textbox(max_lines=1, **shared))
    if param.kind == "painting":
        return unsaved(gr.Textbox(max_lines=1, elem_classes=["hires-plus-painting", *_shown_with(param)], **shared))
    return unsaved(gr.Slider(minimum=param.minimum, maximum=param.maximum, step=param.step, **shared))


def _shown_with(param: Param) -> list[str]:
    """For javascript/hires_plus_painting.js: with which field's choice there is something to paint."""
    return [f"hires-plus-with-{word}" for word in param.shown_with or ()]


def on_change(watched: Sequence[Any], answer: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Call `answer` when any of the components changes."""
    if hasattr(gr, "on"):
        # one handler for all, which answers a burst of changes (a preset, a dragged slider) once at its end
        gr.on([made.change for made in watched], answer, inputs, outputs, trigger_mode="always_last", **LIVE)
        return
    for made in watched:
        made.change(answer, inputs, outputs, **LIVE)


def unsaved(made: Any) -> Any:
    """Keep the WebUI from writing today's default into ui-config.json, where it would outlive a better one."""
    made.do_not_save_to_config = True
    return made


def read_values(technique: Technique, values: Sequence[Any]) -> tuple[Settings | None, list[str]]:
    """Settings from the values of a technique's components, as if its switch were on."""
    raw = dict(zip(positional_fields(technique)[1:], values, strict=False))
    return read_technique(technique, {**raw, ENABLED: True})
