"""The plugin's accordion: one section per technique, built from the declarations.

It needs gradio (3.41 or 4.40) and no WebUI: what a host makes differently comes in as a `Section`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, islice
from typing import Any

import gradio as gr

from lib_hires import TITLE, __version__
from lib_hires.registry import TECHNIQUES
from lib_hires.settings import Param, Settings, params_of
from lib_hires.technique import Technique
from lib_hires.webui.components import component, on_change, read_values, unsaved
from lib_hires.webui.pictures import pictures
from lib_hires.webui.plot import DEFAULT_STEPS, plot
from lib_hires.webui.preset_row import PresetRow
from lib_hires.webui.presets import PresetStore
from lib_hires.webui.recipe_row import RecipeRow

Section = Callable[[str, str], tuple[Any, Any]]
"""(label, elem_id) -> (switch component, context to build the section's content in)"""


@dataclass
class TechniqueUI:
    """The components of one technique. `arguments` are in positional order; the rest is not passed on to a request."""

    technique: Technique
    arguments: list[Any]
    view: Any  # plot and message
    presets: PresetRow

    @property
    def values(self) -> list[Any]:
        """The components of the parameters, without the switch."""
        return self.arguments[1:]

    def follow(self, steps: Any | None) -> None:
        """Redraw at every change of a component."""
        inputs = [*self.presets.list, *self.values, *([steps] if steps is not None else [])]
        on_change(self.values, self._refresh, inputs, [self.view, self.presets.choice])

    def draw(self, values: Sequence[Any], steps: Any = DEFAULT_STEPS) -> str:
        """What the view shows for these values."""
        settings, notes = read_values(self.technique, values)
        return view(self.technique, settings, notes, steps)

    def _refresh(self, preset: Any, known: Any, *values: Any) -> list[Any]:
        count = len(self.values)
        settings, _ = read_values(self.technique, values[:count])
        return [self.draw(values[:count], *values[count:]), self.presets.name_among(known, settings, preset)]


@dataclass
class Panel:
    """Everything that a host has to know of the built panel."""

    techniques: list[TechniqueUI]

    @property
    def arguments(self) -> list[Any]:
        """All components whose values make a request, in positional order."""
        return [component for ui in self.techniques for component in ui.arguments]

    def follow(self, steps: Any | None = None) -> None:
        """Redraw at every change of a component, or of the step count where the host has a component for it."""
        for ui in self.techniques:
            ui.follow(steps)
        if steps is not None and self._plotted:
            inputs = [steps, *(component for ui in self._plotted for component in ui.values)]
            on_change([steps], self._redraw, inputs, [ui.view for ui in self._plotted])

    @property
    def _plotted(self) -> list[TechniqueUI]:
        return [ui for ui in self.techniques if ui.technique.curve or ui.technique.preview]

    def _redraw(self, steps: Any, *values: Any) -> Any:
        """All plots for another step count: one request, however many techniques there are."""
        rest = iter(values)
        drawn = [ui.draw(list(islice(rest, len(ui.values))), steps) for ui in self._plotted]
        return drawn if len(drawn) > 1 else drawn[0]


def plain_section(label: str, elem_id: str) -> tuple[Any, Any]:
    """An accordion with a switch in it, for hosts that have no accordion with a switch in its title."""
    accordion = gr.Accordion(label, open=False, elem_id=elem_id, elem_classes=["hires-plus-section"])
    with accordion:
        switch = gr.Checkbox(
            False, label="Enable", elem_id=f"{elem_id}_enabled", container=False, elem_classes=["hires-plus-switch"]
        )
    return switch, accordion


def build(elem_id: Callable[[str], str], store: PresetStore, section: Section = plain_section) -> Panel:
    """Build the accordion in the current gradio context. Can be called any number of times."""
    built: dict[str, TechniqueUI] = {}
    title = f"{TITLE} {__version__}"
    with unsaved(gr.Accordion(title, open=False, elem_id=elem_id("panel"), elem_classes=["hires-plus"])):
        recipes = RecipeRow(elem_id)
        for family, members in groupby(sorted(TECHNIQUES, key=_family_rank), key=lambda technique: technique.family):
            with gr.Column(elem_classes=["hires-plus-list"]):
                gr.HTML(f'<div class="hires-plus-family">{escape(family)}</div>')
                for technique in members:
                    built[technique.name] = _technique(technique, elem_id, store, section)
        recipes.connect({name: ui.arguments for name, ui in built.items()})
    return Panel([built[technique.name] for technique in TECHNIQUES])


def view(technique: Technique, settings: Settings | None, notes: Sequence[str], steps: Any = DEFAULT_STEPS) -> str:
    """The plot and the small pictures, and under them what is wrong with the values."""
    try:
        count = int(steps)
    except (TypeError, ValueError, OverflowError):
        count = DEFAULT_STEPS
    problem = settings.problem() if settings is not None else None
    lines = [*notes, *([f"{technique.title} will not act: {problem}"] if problem else [])]
    drawn = plot(technique, settings, count) + pictures(technique, settings, count) if settings is not None else ""
    return drawn + "".join(f'<div class="hires-plus-problem">{escape(line)}</div>' for line in lines)


def _family_rank(technique: Technique) -> int:
    families = list(dict.fromkeys(member.family for member in TECHNIQUES))
    return families.index(technique.family)


def _technique(
    technique: Technique, elem_id: Callable[[str], str], store: PresetStore, section: Section
) -> TechniqueUI:
    name = technique.name
    label = f"{technique.title} ({technique.cost})" if technique.cost else technique.title
    switch, context = section(label, elem_id(name))
    unsaved(context)
    with context:
        gr.HTML(f'<div class="hires-plus-summary">{escape(technique.summary)}</div>')
        row = PresetRow(technique, lambda item: elem_id(f"{name}_{item}"), store)
        shown = gr.HTML(
            view(technique, technique.settings(), []), elem_id=elem_id(f"{name}_view"), elem_classes=["hires-plus-view"]
        )
        components = _in_pairs(params_of(technique.settings), lambda field: elem_id(f"{name}_{field}"))
        row.connect(switch, components)
    return TechniqueUI(technique, [unsaved(switch), *components], shown, row)


def _in_pairs(params: dict[str, Param], elem_id: Callable[[str], str]) -> list[Any]:
    components = []
    for names in _rows(params):
        with gr.Row(elem_classes=["hires-plus-row"]):
            components += [component(params[name], elem_id(name)) for name in names]
    return components


def _rows(params: dict[str, Param]) -> list[list[str]]:
    """Pairs of fields in their order; a painting has a row of its own."""
    rows: list[list[str]] = []
    for is_painting, names in groupby(params, key=lambda name: params[name].kind == "painting"):
        group, width = list(names), 1 if is_painting else 2
        rows += [group[i : i + width] for i in range(0, len(group), width)]
    return rows
