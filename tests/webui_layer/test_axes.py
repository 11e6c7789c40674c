"""X/Y/Z axes: all there, once, with the host's range syntax, and no value that fails a request."""

from copy import copy
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.registry import TECHNIQUES
from lib_hires.request import read_request
from lib_hires.settings import params_of
from lib_hires.webui import axes
from lib_hires.webui.presets import PresetStore


class AxisOption:
    """The host's class, with the arguments it takes."""

    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.format_value = label, type, apply, format_value
        self.choices, self.prepare = choices, prepare


@pytest.fixture
def xyz(tmp_path):
    module = SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Nothing", str, None)])
    axes.add_axes(module, PresetStore(tmp_path / "presets.json"))
    return module


def option(xyz, name):
    return next(o for o in xyz.axis_options if o.label == f"[Hires Plus] {name}")


def values_of(option, text):
    """As the host reads an axis: values from the text, each through the axis' type."""
    return [option.type(value) for value in (option.prepare(text) if option.prepare else text.split(","))]


def test_every_field_has_its_axis_and_only_one(xyz, tmp_path):
    count = sum(2 + len(params_of(technique.settings)) for technique in TECHNIQUES)
    assert len(xyz.axis_options) == 1 + count
    axes.add_axes(xyz, PresetStore(tmp_path / "presets.json"))
    labels = [o.label for o in xyz.axis_options]
    assert len(labels) == len(set(labels)) == 1 + count


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1, 2.5,3", [1, 2.5, 3]),
        ("1-3", [1, 2, 3]),
        ("1-3 (+1)", [1, 2, 3]),
        ("0-1 (+0.25)", [0, 0.25, 0.5, 0.75, 1]),
        ("0-1(+0.3)", [0, 0.3, 0.6, 0.9]),
        ("3-1 (-1)", [3, 2, 1]),
        ("1-2 [3]", [1, 1.5, 2]),
        ("0.5 - .7 [2]", [0.5, 0.7]),
        ("-1-1", [-1, 0, 1]),
        ("2-2", [2]),
        ("1e-3", [0.001]),
        ("", []),
    ],
)
def test_numeric_values(text, values):
    assert axes.numbers(text) == values


@pytest.mark.parametrize("text", ["abc", "1-3 (+0)", "0-1 (+0.0)", "3-1", "1-2 [0]", "0-1 [99999999]", "1-99999999999"])
def test_what_is_no_number_stays_text_for_the_request_to_refuse(text):
    assert axes.numbers(text) == [text]


@given(st.text(alphabet="0123456789.+-()[] ,eabc", max_size=24) | st.none() | st.integers())
def test_no_axis_text_raises(text):
    assert len(axes.numbers(text)) < 20000


def test_a_value_lands_on_its_own_cell_only(xyz):
    p = SimpleNamespace()
    first, second = copy(p), copy(p)
    factor, end = option(xyz, "DeepShrink Downscale factor"), option(xyz, "DeepShrink End")
    factor.apply(first, 3.0, [3.0])
    third = copy(first)
    end.apply(third, 0.2, [0.2])
    assert not hasattr(p, axes.ATTRIBUTE) and not hasattr(second, axes.ATTRIBUTE)
    assert getattr(first, axes.ATTRIBUTE) == {("deep_shrink", "factor"): 3.0}
    assert getattr(third, axes.ATTRIBUTE) == {("deep_shrink", "factor"): 3.0, ("deep_shrink", "end"): 0.2}


def test_every_axis_reaches_the_request(xyz):
    for axis in xyz.axis_options[1:]:
        for text in axis.choices() if axis.choices else ["1"]:
            for value in [axis.type(text)] if axis.choices else values_of(axis, text):
                p = SimpleNamespace()
                axis.apply(p, value, [value])
                assert isinstance(axis.format_value(p, axis, value) if axis.format_value else "", str)
                generation = read_request([], getattr(p, axes.ATTRIBUTE))
                is_off = text == "off" and axis.label.count(" ") == 2
                assert bool(generation.selection) != is_off or "More stages" in axis.label


def test_a_bad_value_is_refused_by_the_request(xyz):
    p = SimpleNamespace()
    axis = option(xyz, "DeepShrink Downscale factor")
    (value,) = values_of(axis, "abc")
    axis.apply(p, value, [value])
    generation = read_request([], getattr(p, axes.ATTRIBUTE))
    assert not generation.selection
    assert "'abc' is not a number (0.5 to 9)" in generation.notes[0]


def test_preset_choices_are_asked_for_when_shown(tmp_path):
    store = PresetStore(tmp_path / "presets.json")
    xyz = SimpleNamespace(AxisOption=AxisOption, axis_options=[])
    axes.add_axes(xyz, store)
    technique = TECHNIQUES[0]
    store.save(technique, "mine", technique.settings())
    assert "mine" in option(xyz, f"{technique.title} preset").choices()


def test_without_an_xyz_script_nothing_happens(monkeypatch, tmp_path):
    scripts = SimpleNamespace(scripts_data=[])
    monkeypatch.setitem(__import__("sys").modules, "modules", SimpleNamespace(scripts=scripts))
    axes.register(PresetStore(tmp_path / "presets.json"))
    fake = type("Script", (), {"__module__": "xyz_grid.py"})
    module = SimpleNamespace(AxisOption=AxisOption, axis_options=[])
    scripts.scripts_data.append(SimpleNamespace(script_class=fake, module=module))
    axes.register(PresetStore(tmp_path / "presets.json"))
    assert module.axis_options
