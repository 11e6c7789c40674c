"""The plugin's accordion: one section per technique, built from the declarations.

It needs gradio (3.41 or 4.40) and no WebUI: what a host makes differently comes in as a `Maker`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import gradio as gr

from lib_hires import TITLE, __version__
from lib_hires.registry import TECHNIQUES
from lib_hires.request import ENABLED, positional_fields, read_technique
from lib_hires.settings import Param, Settings, params_of
from lib_hires.technique import Technique
from lib_hires.webui.plot import DEFAULT_STEPS, plot
from lib_hires.webui.presets import PresetError, PresetStore, matching_name

Section = Callable[[str, str], tuple[Any, Any]]
"""(label, elem_id) -> (switch component, context to build the section's content in)"""

# no queue, no spinner: what it shows is to follow the hand
_LIVE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


@dataclass
class TechniqueUI:
    """The components of one technique. `arguments` are in positional order; the rest is not passed on to a request."""

    technique: Technique
    arguments: list[Any]
    view: Any  # plot and message
    preset: Any
    store: PresetStore

    def follow(self, steps: Any | None) -> None:
        """Redraw at every change of a component, or of the step count where the host has a component for it."""
        inputs = [self.preset, *self.arguments[1:], *([steps] if steps is not None else [])]
        for component in inputs[1:]:
            component.change(self._refresh, inputs=inputs, outputs=[self.view, self.preset], **_LIVE)

    def _refresh(self, preset: Any, *values: Any) -> tuple[str, Any]:
        count = len(self.arguments) - 1
        steps = values[count] if len(values) > count else DEFAULT_STEPS
        settings, notes = _read(self.technique, values[:count])
        name = matching_name(self.store.all(self.technique), settings, preferred=preset)
        return view(self.technique, settings, notes, steps), gr.update(value=name)


@dataclass
class Panel:
    """Everything that a host has to know of the built panel."""

    techniques: list[TechniqueUI]

    @property
    def arguments(self) -> list[Any]:
        """All components whose values make a request, in positional order."""
        return [component for ui in self.techniques for component in ui.arguments]

    def follow(self, steps: Any | None = None) -> None:
        for ui in self.techniques:
            ui.follow(steps)


def plain_section(label: str, elem_id: str) -> tuple[Any, Any]:
    """An accordion with a switch in it, for hosts that have no accordion with a switch in its title."""
    accordion = gr.Accordion(label, open=False, elem_id=elem_id)
    with accordion:
        switch = gr.Checkbox(False, label="Enable", elem_id=f"{elem_id}_enabled")
    return switch, accordion


def build(elem_id: Callable[[str], str], store: PresetStore, section: Section = plain_section) -> Panel:
    """Build the accordion in the current gradio context. Can be called any number of times."""
    built: dict[str, TechniqueUI] = {}
    title = f"{TITLE} {__version__}"
    with _unsaved(gr.Accordion(title, open=False, elem_id=elem_id("panel"), elem_classes=["hires-plus"])):
        for family, members in groupby(sorted(TECHNIQUES, key=_family_rank), key=lambda technique: technique.family):
            gr.HTML(f'<div class="hires-plus-family">{escape(family)}</div>')
            for technique in members:
                built[technique.name] = _technique(technique, elem_id, store, section)
    return Panel([built[technique.name] for technique in TECHNIQUES])


def view(technique: Technique, settings: Settings | None, notes: Sequence[str], steps: Any = DEFAULT_STEPS) -> str:
    """The plot, and under it what is wrong with the values."""
    try:
        count = int(steps)
    except (TypeError, ValueError, OverflowError):
        count = DEFAULT_STEPS
    problem = settings.problem() if settings is not None else None
    lines = [*notes, *([f"{technique.title} will not act: {problem}"] if problem else [])]
    picture = plot(technique, settings, count) if settings is not None else ""
    return picture + "".join(f'<div class="hires-plus-problem">{escape(line)}</div>' for line in lines)


def _family_rank(technique: Technique) -> int:
    families = list(dict.fromkeys(member.family for member in TECHNIQUES))
    return families.index(technique.family)


def _technique(
    technique: Technique, elem_id: Callable[[str], str], store: PresetStore, section: Section
) -> TechniqueUI:
    name = technique.name
    label = f"{technique.title} ({technique.cost})" if technique.cost else technique.title
    switch, context = section(label, elem_id(name))
    _unsaved(context)
    with context:
        gr.HTML(f'<div class="hires-plus-summary">{escape(technique.summary)}</div>')
        row = _PresetRow(technique, lambda item: elem_id(f"{name}_{item}"), store)
        shown = gr.HTML(view(technique, technique.settings(), []), elem_id=elem_id(f"{name}_view"))
        components = _in_pairs(params_of(technique.settings), lambda field: elem_id(f"{name}_{field}"))
        row.connect(components)
    return TechniqueUI(technique, [_unsaved(switch), *components], shown, row.preset, store)


def _in_pairs(params: dict[str, Param], elem_id: Callable[[str], str]) -> list[Any]:
    components = []
    names = list(params)
    for pair in (names[i : i + 2] for i in range(0, len(names), 2)):
        with gr.Row(elem_classes=["hires-plus-row"]):
            components += [_unsaved(_component(params[name], elem_id(name))) for name in pair]
    return components


def _component(param: Param, elem_id: str) -> Any:
    shared = {"value": param.default, "label": param.label, "info": param.help, "elem_id": elem_id}
    if param.kind == "toggle":
        return gr.Checkbox(elem_classes=["hires-plus-toggle"], **shared)
    if param.kind == "choice":
        return gr.Dropdown(choices=list(param.choices), **shared)
    if param.kind == "text":
        return gr.Textbox(max_lines=1, **shared)
    return gr.Slider(minimum=param.minimum, maximum=param.maximum, step=param.step, **shared)


def _read(technique: Technique, values: Sequence[Any]) -> tuple[Settings | None, list[str]]:
    raw = dict(zip(positional_fields(technique)[1:], values, strict=False))
    return read_technique(technique, {**raw, ENABLED: True})


def _unsaved(component: Any) -> Any:
    """Keep the WebUI from writing today's default into ui-config.json, where it would outlive a better one."""
    component.do_not_save_to_config = True
    return component


class _PresetRow:
    """Choose, save, delete and reset. Choosing applies at once; the list always names what the values are."""

    def __init__(self, technique: Technique, elem_id: Callable[[str], str], store: PresetStore):
        self._technique = technique
        self._store = store
        names = list(store.all(technique))
        current = matching_name(store.all(technique), technique.settings())
        with gr.Row(elem_classes=["hires-plus-presets"]):
            self.preset = gr.Dropdown(
                choices=names, value=current, label="Preset", elem_id=elem_id("preset"), scale=4, min_width=140
            )
            self._name = gr.Textbox(
                label="Name to save as", max_lines=1, elem_id=elem_id("preset_name"), scale=3, min_width=120
            )
            self._save = _button("Save", elem_id("preset_save"))
            self._delete = _button("Delete", elem_id("preset_delete"))
            self._reset = _button("Reset", elem_id("preset_reset"))
        self._message = gr.HTML("", elem_id=elem_id("preset_message"))
        for component in (self.preset, self._name, self._save, self._delete, self._reset):
            _unsaved(component)

    def connect(self, components: list[Any]) -> None:
        message = [self._message]
        # a choice and nothing else: `input` comes at other moments too, and at different ones in each gradio
        self.preset.select(self._choose, [], [*components, *message], **_LIVE)
        self._reset.click(self._set_back, [], [*components, self.preset, *message], **_LIVE)
        saved = [self.preset, self._name, *message]
        self._save.click(self._keep, [self._name, *components], saved, **_LIVE)
        self._delete.click(self._remove, [self.preset, *components], [self.preset, *message], **_LIVE)

    def _choose(self, chosen: gr.SelectData) -> list[Any]:
        name = chosen.value
        settings = self._store.all(self._technique).get(str(name))
        if settings is None:
            unchanged = [gr.update() for _ in params_of(self._technique.settings)]
            return [*unchanged, _says(f"There is no preset {name!r} any more")]
        return [*_updates(settings), ""]

    def _set_back(self) -> list[Any]:
        settings = self._technique.settings()
        return [*_updates(settings), self._choices(settings), ""]

    def _keep(self, name: Any, *values: Any) -> list[Any]:
        settings, notes = _read(self._technique, values)
        try:
            if settings is None:
                raise PresetError("; ".join(notes))
            name = self._store.save(self._technique, name, settings)
        except PresetError as error:
            return [gr.update(), gr.update(), _says(f"Not saved: {error}")]
        return [self._choices(settings, name), "", _says(f"Saved as {name!r}")]

    def _remove(self, name: Any, *values: Any) -> list[Any]:
        try:
            if not name:
                raise PresetError("choose one of your own presets first")
            self._store.delete(self._technique, name)
        except PresetError as error:
            return [gr.update(), _says(f"Not deleted: {error}")]
        settings, _ = _read(self._technique, values)
        return [self._choices(settings), _says(f"Deleted {name!r}")]

    def _choices(self, settings: Settings | None, preferred: str | None = None) -> Any:
        presets = self._store.all(self._technique)
        return gr.update(choices=list(presets), value=matching_name(presets, settings, preferred))


def _button(label: str, elem_id: str) -> Any:
    return gr.Button(label, elem_id=elem_id, elem_classes=["hires-plus-button"], size="sm", scale=0, min_width=56)


def _updates(settings: Settings) -> list[Any]:
    return [gr.update(value=getattr(settings, name)) for name in params_of(settings)]


def _says(text: str) -> str:
    return f'<div class="hires-plus-message">{escape(text)}</div>'
