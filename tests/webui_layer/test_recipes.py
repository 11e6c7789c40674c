"""Recipes: through the API and in the panel they ask for the same, and a request goes over them."""

import pytest

from lib_hires.recipes import MANAGED, RECIPES, find_recipe
from lib_hires.registry import BY_NAME
from lib_hires.request import read_request
from lib_hires.settings import params_of
from lib_hires.webui.recipe_row import updates


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_through_the_api_is_its_selection(recipe):
    generation = read_request([{"recipe": recipe.name.upper()}])
    assert generation.selection == dict(recipe.selection) and generation.notes == []
    assert recipe.summary.endswith(".")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_panel_sets_every_managed_technique(recipe):
    made = [update.get("value") for update in updates(recipe)]
    for name in MANAGED:
        switch, *values = made[: 1 + len(params_of(BY_NAME[name].settings))]
        del made[: 1 + len(values)]
        settings = recipe.selection.get(name)
        assert switch == (settings is not None)
        wanted = [None] * len(values) if settings is None else [getattr(settings, f) for f in params_of(settings)]
        assert values == wanted
    assert made == []


def test_other_keys_go_over_the_recipe():
    generation = read_request([{"recipe": "4x cascade", "cascade": {"cleanup": 0.2}, "low_band_lock": False}])
    assert set(generation.selection) == {"cascade"}
    assert generation.selection["cascade"].cleanup == 0.2
    assert generation.selection["cascade"].denoise == find_recipe("4x cascade").selection["cascade"].denoise


@pytest.mark.parametrize("wanted", ["8x", 4, ["2x faithful"]])
def test_an_unknown_recipe_is_told_and_ignored(wanted):
    generation = read_request([{"recipe": wanted, "apg": True}])
    assert set(generation.selection) == {"apg"}
    [note] = generation.notes
    assert repr(wanted) in note and "'2x faithful'" in note
