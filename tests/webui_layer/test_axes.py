"""X/Y/Z axes: all there, once, with the host's range syntax, and no value that fails a request."""

import csv
from copy import copy
from io import StringIO
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.request import ENABLED, PRESET, read_request
from lib_hires.settings import params_of
from lib_hires.webui import axes
from lib_hires.webui.presets import PresetStore
from tests.webui_layer import strategies


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
    listed = option.prepare(text) if option.prepare else next(csv.reader(StringIO(text), skipinitialspace=True))
    return [option.type(value) for value in listed]


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


def label(technique, field):
    if field == ENABLED:
        return technique.title
    return f"{technique.title} " + ("preset" if field == PRESET else params_of(technique.settings)[field].label)


def asked_by(axis, text):
    """What each value in an axis text makes of a request."""
    for value in values_of(axis, text):
        p = SimpleNamespace()
        axis.apply(p, value, [value])
        assert isinstance(axis.format_value(p, axis, value) if axis.format_value else "", str)
        yield read_request([], getattr(p, axes.ATTRIBUTE))


def as_csv(values):
    """How the host writes choices into an axis, and how people write a value with a comma in it."""
    line = StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue().strip()


def texts_for(technique, field):
    """An axis text for a parameter, and the settings' values that it means."""
    param = params_of(technique.settings)[field]
    if param.kind in ("integer", "number"):
        return f"{param.minimum:g}, {param.maximum:g}", [param.minimum, param.maximum]
    values = {"toggle": [False, True], "choice": list(param.choices)}.get(param.kind)
    if values is None:
        values = strategies.examples(technique, field)
    return as_csv([param.show(value) for value in values]), values


@pytest.mark.parametrize(("name", "field"), strategies.FIELDS)
def test_every_axis_reaches_the_request(xyz, name, field):
    technique = BY_NAME[name]
    axis = option(xyz, label(technique, field))
    if field in (ENABLED, PRESET):
        wanted = [{}, {name: technique.settings()}]
        wanted = [{name: preset} for preset in technique.presets.values()] if field == PRESET else wanted
        text = as_csv(axis.choices())
    else:
        text, values = texts_for(technique, field)
        wanted = [{name: technique.settings(**{field: value})} for value in values]
        assert axis.choices is None or as_csv(axis.choices()) == text
    requests = list(asked_by(axis, text))
    assert [request.selection for request in requests] == wanted
    assert not any(request.notes for request in requests)


def test_a_bad_value_is_refused_by_the_request(xyz):
    p = SimpleNamespace()
    axis = option(xyz, "DeepShrink Downscale factor")
    (value,) = values_of(axis, "abc")
    axis.apply(p, value, [value])
    generation = read_request([], getattr(p, axes.ATTRIBUTE))
    assert not generation.selection
    assert "'abc' is not a number (0.5 to 9)" in generation.notes[0]


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda technique: technique.name)
def test_preset_choices_are_asked_for_when_shown(tmp_path, technique):
    store = PresetStore(tmp_path / "presets.json")
    xyz = SimpleNamespace(AxisOption=AxisOption, axis_options=[])
    axes.add_axes(xyz, store)
    store.save(technique, "mine", technique.settings())
    assert option(xyz, f"{technique.title} preset").choices() == [*technique.presets, "mine"]


def test_without_an_xyz_script_nothing_happens(monkeypatch, tmp_path):
    scripts = SimpleNamespace(scripts_data=[])
    monkeypatch.setitem(__import__("sys").modules, "modules", SimpleNamespace(scripts=scripts))
    axes.register(PresetStore(tmp_path / "presets.json"))
    fake = type("Script", (), {"__module__": "xyz_grid.py"})
    module = SimpleNamespace(AxisOption=AxisOption, axis_options=[])
    scripts.scripts_data.append(SimpleNamespace(script_class=fake, module=module))
    axes.register(PresetStore(tmp_path / "presets.json"))
    assert module.axis_options
