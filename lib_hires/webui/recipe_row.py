"""The row of recipes on top of the panel: a choice sets switches and values of the techniques that recipes use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from lib_hires.recipes import MANAGED, RECIPES, Recipe, find_recipe
from lib_hires.registry import BY_NAME
from lib_hires.settings import params_of
from lib_hires.webui.components import LIVE, unsaved

_HINT = "Settings for a purpose, over several sections at once. They need Hires. fix, or img2img at a larger size."


class RecipeRow:
    """Built in the current gradio context. None of its components is an argument of a request."""

    def __init__(self, elem_id: Callable[[str], str]) -> None:
        names = [recipe.name for recipe in RECIPES]
        self._choice = unsaved(gr.Dropdown(names, value=None, label="Recipe", info=_HINT, elem_id=elem_id("recipe")))
        self._message = gr.HTML("", elem_id=elem_id("recipe_message"), elem_classes=["hires-plus-view"])

    def connect(self, arguments: Mapping[str, Sequence[Any]]) -> None:
        """`arguments`: the components of each technique, the switch first."""
        targets = [component for name in MANAGED for component in arguments[name]]
        self._choice.select(self._choose, [], [*targets, self._message], **LIVE)

    def _choose(self, chosen: gr.SelectData) -> list[Any]:
        recipe = find_recipe(chosen.value)
        if recipe is None:
            unchanged = [gr.update() for name in MANAGED for _ in (name, *params_of(BY_NAME[name].settings))]
            return [*unchanged, ""]
        return [*updates(recipe), f'<div class="hires-plus-message">{escape(recipe.summary)}</div>']


def updates(recipe: Recipe) -> list[Any]:
    """Of the components of all managed techniques: on with the recipe's values, or off with values as they are."""
    made = []
    for name in MANAGED:
        settings = recipe.selection.get(name)
        made.append(gr.update(value=settings is not None))
        for field in params_of(BY_NAME[name].settings):
            made.append(gr.update() if settings is None else gr.update(value=getattr(settings, field)))
    return made
