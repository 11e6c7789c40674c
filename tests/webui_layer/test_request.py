"""A request never raises, its result is always valid, and what was repaired or refused is told."""

import json

import pytest
from hypothesis import given

from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.request import built_in_presets, carrying, positional_fields, read_request
from lib_hires.settings import params_of
from tests.webui_layer import strategies

DEEP_SHRINK = BY_NAME["deep_shrink"]
KIND = DEEP_SHRINK.settings


def settings(*args, **kwargs):
    return read_request(args, **kwargs).selection.get("deep_shrink")


def notes(*args, **kwargs):
    return read_request(args, **kwargs).notes


@given(strategies.arguments, strategies.axes)
def test_nothing_raises_and_everything_validates(args, axes):
    generation = read_request(args, axes)
    for name, chosen in generation.selection.items():
        assert type(chosen) is BY_NAME[name].settings
        for field, param in params_of(chosen).items():
            value = getattr(chosen, field)
            assert param.read(value) == (value, None)
    assert all(isinstance(note, str) and len(note) <= 400 and "\n" not in note for note in generation.notes)


@given(strategies.selections)
def test_the_positional_list_and_the_dict_say_the_same(selection):
    positional = []
    for technique in TECHNIQUES:
        chosen = selection.get(technique.name)
        values = [getattr(chosen or technique.settings(), field) for field in params_of(technique.settings)]
        positional += [chosen is not None, *values]
    named = {name: {f: getattr(chosen, f) for f in params_of(chosen)} for name, chosen in selection.items()}
    for args in (positional, [named], json.loads(json.dumps([named]))):
        generation = read_request(args)
        assert generation.selection == selection
        assert generation.notes == []


def test_nothing_asked_is_nothing_done():
    for args in ((), (False,), (None,), ({},), ("off",), (0,)):
        generation = read_request(args)
        assert not generation.selection and not generation.notes


def test_a_short_list_leaves_the_rest_at_defaults():
    assert settings(True) == KIND()
    assert settings(True, 4, "2.5") == KIND(block=4, factor=2.5)


def test_a_long_list_is_told():
    count = sum(len(positional_fields(technique)) for technique in TECHNIQUES)
    assert notes(*[None] * (count + 2)) == ["2 values beyond the last setting are ignored"]


def test_naming_a_technique_switches_it_on():
    assert settings({"deep_shrink": {}}) == KIND()
    assert settings({"deep_shrink": True}) == KIND()
    assert settings({"deep_shrink": {"enabled": None, "factor": 3}}) == KIND(factor=3.0)
    assert settings({"deep_shrink": False}) is None
    assert settings({"deep_shrink": {"enabled": False, "factor": "abc"}}) is None


def test_a_preset_is_the_base_of_the_other_keys():
    assert settings({"deep_shrink": {"preset": "4X"}}) == DEEP_SHRINK.presets["4x"]
    assert settings({"deep_shrink": {"preset": "4x", "end": 0.4}}) == KIND(factor=4.0, end=0.4, gradual=0.75)
    mine = {"mine": KIND(factor=3.0)}
    presets = lambda technique: {**built_in_presets(technique), **mine}
    assert settings({"deep_shrink": {"preset": "mine"}}, presets=presets) == mine["mine"]


@pytest.mark.parametrize(
    ("args", "note"),
    [
        ((True, 3, "abc"), "DeepShrink is off: Downscale factor = 'abc' is not a number (0.5 to 9)"),
        ((True, 3, float("nan")), "DeepShrink is off: Downscale factor = nan is not a number (0.5 to 9)"),
        ((True, [3]), "DeepShrink is off: Block number = [3] is not a number (1 to 32)"),
        (("maybe",), "DeepShrink is off: Enabled = 'maybe' is neither on nor off"),
        (({"deep_shrink": [1]},), "DeepShrink is off: [1] is neither settings nor true or false"),
        ((True, 3, 10**6000), "DeepShrink is off: Downscale factor = '<int>' is not a number (0.5 to 9)"),
    ],
    ids=["word", "nan", "list", "switch", "list of settings", "an integer that cannot be printed"],
)
def test_what_cannot_be_read_switches_off(args, note):
    generation = read_request(args)
    assert not generation.selection
    assert generation.notes == [note]


def test_a_long_value_is_cut_but_field_and_range_stay():
    for value in ("9" * 5000, "x" * 5000, 10**400, ["x" * 5000]):
        (note,) = notes(True, 3, value)
        assert len(note) <= 400
        assert "Downscale factor" in note and "0.5 to 9" in note


def test_an_unknown_preset_names_the_known_ones():
    (note,) = notes({"deep_shrink": {"preset": "zz"}})
    assert note.startswith("DeepShrink is off: Preset = 'zz' is unknown (known: 'Default (2x, gradual)', ")


@pytest.mark.parametrize(
    ("asked", "want", "note"),
    [
        (
            {"factor": 1e9},
            {"factor": 9.0},
            "DeepShrink: Downscale factor = 1000000000.0 is outside 0.5 to 9; the nearest bound 9 is used",
        ),
        ({"block": 2.6}, {"block": 3}, "DeepShrink: Block number = 2.6 is not a whole number (1 to 32); 3 is used"),
        ({"end": None}, {}, "DeepShrink: End has no value; its default 0.35 is used"),
    ],
)
def test_what_can_be_repaired_is(asked, want, note):
    generation = read_request([{"deep_shrink": asked}])
    assert generation.selection == {"deep_shrink": KIND(**want)}
    assert generation.notes == [note]


def test_unknown_names_are_told_and_ignored():
    generation = read_request([{"deep_shrimp": {}, "deep_shrink": {"faktor": 3}}])
    assert generation.selection == {"deep_shrink": KIND()}
    first, second = generation.notes
    assert first == f"unknown technique 'deep_shrimp' is ignored (known: {', '.join(BY_NAME)})"
    assert second.startswith("DeepShrink: unknown setting 'faktor' is ignored (known: block, factor, ")


def test_values_after_a_dict_are_told_unless_they_are_the_hosts_defaults():
    assert notes({"deep_shrink": {}}, 3, 2.0, 0.0) == []
    assert notes({"deep_shrink": {}}, 5) == ["values after the dictionary are ignored: put them into it"]


def test_an_axis_goes_over_the_page_and_switches_on():
    axes = {("deep_shrink", "factor"): 3.0}
    assert settings(False, 5, axes=axes) == KIND(block=5, factor=3.0)
    assert settings(False, 5, axes={**axes, ("deep_shrink", "enabled"): "off"}) is None
    assert settings(False, 5, axes={("deep_shrink", "enabled"): "on"}) == KIND(block=5)
    assert settings({"deep_shrink": {"block": 5}}, axes=axes) == KIND(block=5, factor=3.0)


def test_a_preset_axis_speaks_for_every_setting():
    axes = {("deep_shrink", "preset"): "4x"}
    assert settings(True, 5, 1.5, axes=axes) == DEEP_SHRINK.presets["4x"]
    axes[("deep_shrink", "end")] = 0.1
    assert settings(True, 5, 1.5, axes=axes) == KIND(factor=4.0, end=0.1, gradual=0.75)


def test_a_bad_axis_value_is_a_note():
    generation = read_request([True], {("deep_shrink", "factor"): "abc"})
    assert not generation.selection
    assert "Downscale factor = 'abc' is not a number (0.5 to 9)" in generation.notes[0]


@pytest.mark.parametrize("value", ["both", 3, 2.5])
def test_values_can_carry_notes_to_the_request(value):
    carried = carrying(value, ["what was wrong"])
    assert carried == value and isinstance(carried, type(value))
    assert read_request([False, carried]).notes == ["what was wrong"]
    assert carrying(True, ["lost"]) is True
