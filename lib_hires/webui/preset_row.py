"""The row of a technique's presets: choose, save, delete and reset.

Choosing applies at once. The list always names what the values are, and is empty where they are no preset's.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from lib_hires.settings import Settings, params_of
from lib_hires.technique import Technique
from lib_hires.webui.components import LIVE, read_values, unsaved
from lib_hires.webui.presets import PresetError, PresetStore, matching_name


class PresetRow:
    """Built in the current gradio context. None of its components is an argument of a request."""

    def __init__(self, technique: Technique, elem_id: Callable[[str], str], store: PresetStore):
        self._technique = technique
        self._store = store
        presets = store.all(technique)
        current = matching_name(presets, technique.settings())
        with gr.Row(elem_classes=["hires-plus-presets"]):
            self.choice = gr.Dropdown(
                list(presets), value=current, label="Preset", elem_id=elem_id("preset"), scale=4, min_width=140
            )
            self._name = gr.Textbox(
                label="Name to save as", max_lines=1, elem_id=elem_id("preset_name"), scale=3, min_width=120
            )
            self._save = _button("Save", elem_id("preset_save"))
            self._delete = _button("Delete", elem_id("preset_delete"))
            self._reset = _button("Reset", elem_id("preset_reset"))
        self._message = gr.HTML("", elem_id=elem_id("preset_message"), elem_classes=["hires-plus-view"])
        # the list as this browser has it; presets come and go, also in the other tab
        self.list = [self.choice, gr.State(list(presets))]
        for made in (self.choice, self._name, self._save, self._delete, self._reset):
            unsaved(made)

    def connect(self, switch: Any, components: list[Any]) -> None:
        """Wire the row to the switch and the parameter components of its technique."""
        message = [self._message]
        for look_again in (switch.change, self.choice.focus):
            look_again(self._look_again, [self.list[1]], self.list, **LIVE)
        # a choice and nothing else: `input` comes at other moments too, and at different ones in each gradio
        self.choice.select(self._choose, [], [*components, *message], **LIVE)
        self._reset.click(self._set_back, [], [*components, *self.list, *message], **LIVE)
        self._save.click(self._keep, [self._name, *components], [*self.list, self._name, *message], **LIVE)
        self._delete.click(self._remove, [self.choice, *components], [*self.list, *message], **LIVE)

    def naming(self, settings: Settings | None, preferred: Any = None) -> list[Any]:
        """Updates of `list`: today's presets, and of these the one that the settings are."""
        presets = self._store.all(self._technique)
        names = list(presets)
        return [gr.update(choices=names, value=matching_name(presets, settings, preferred)), names]

    def name_among(self, known: Any, settings: Settings | None, preferred: Any) -> Any:
        """Update of the choice alone. A list that this came into while it was open would otherwise lose its entries."""
        presets = self._store.all(self._technique)
        listed = {name: presets[name] for name in known if name in presets}
        return gr.update(value=matching_name(listed, settings, preferred))

    def _look_again(self, known: Any) -> list[Any]:
        names = list(self._store.all(self._technique))
        # nothing where nothing is new: gradio 3 filters an open list by its own text when it gets its choices again
        return [gr.update() if names == known else gr.update(choices=names), names]

    def _choose(self, chosen: gr.SelectData) -> list[Any]:
        settings = self._store.all(self._technique).get(str(chosen.value))
        if settings is None:
            unchanged = [gr.update() for _ in params_of(self._technique.settings)]
            return [*unchanged, _says(f"There is no preset {chosen.value!r} any more")]
        return [*_updates(settings), ""]

    def _set_back(self) -> list[Any]:
        settings = self._technique.settings()
        return [*_updates(settings), *self.naming(settings), ""]

    def _keep(self, name: Any, *values: Any) -> list[Any]:
        settings, notes = read_values(self._technique, values)
        try:
            if settings is None:
                raise PresetError("; ".join(notes))
            name = self._store.save(self._technique, name, settings)
        except PresetError as error:
            return [*self.naming(settings), gr.update(), _says(f"Not saved: {error}")]
        return [*self.naming(settings, name), "", _says(f"Saved as {name!r}")]

    def _remove(self, name: Any, *values: Any) -> list[Any]:
        settings, _ = read_values(self._technique, values)
        try:
            if not name:
                raise PresetError("choose one of your own presets first")
            self._store.delete(self._technique, name)
        except PresetError as error:
            return [*self.naming(settings, name), _says(f"Not deleted: {error}")]
        return [*self.naming(settings), _says(f"Deleted {name!r}")]


def _button(label: str, elem_id: str) -> Any:
    return gr.Button(label, elem_id=elem_id, elem_classes=["hires-plus-button"], size="sm", scale=0, min_width=56)


def _updates(settings: Settings) -> list[Any]:
    return [gr.update(value=getattr(settings, name)) for name in params_of(settings)]


def _says(text: str) -> str:
    return f'<div class="hires-plus-message">{escape(text)}</div>'
