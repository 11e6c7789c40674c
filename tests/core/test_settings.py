"""Declarations: what a value is read as, and what a user is told."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.registry import TECHNIQUES
from lib_hires.settings import (
    Param,
    Settings,
    Unusable,
    changed_fields,
    choice,
    integer,
    number,
    params_of,
    read_settings,
    text,
    toggle,
)


@dataclasses.dataclass(frozen=True)
class Sample(Settings):
    on: bool = toggle(False, label="On", help="")
    level: float = number(0.5, 0.0, 1.0, 0.1, label="Level", help="")
    count: int = integer(3, 1, 9, label="Count", help="")
    way: str = choice("up", ("up", "down"), label="Way", help="")
    words: str = text("0", check=int, label="Words", help="")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
@given(data=st.data())
def test_whatever_arrives_is_either_read_within_its_range_or_refused_with_the_field_named(technique, data):
    raw = data.draw(st.dictionaries(st.sampled_from([*params_of(technique.settings), "no such"]), JSON))
    try:
        settings, notes = read_settings(technique.settings, raw)
    except Unusable as error:
        assert any(str(error).startswith(param.label) for param in params_of(technique.settings).values())
        return
    for name, param in params_of(technique.settings).items():
        assert param.read(getattr(settings, name)) == (getattr(settings, name), None)
    assert ("no such" in raw) == any("no such" in note for note in notes)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
@given(data=st.data())
def test_what_infotext_shows_is_read_back_unchanged(technique, data):
    for param in params_of(technique.settings).values():
        if param.kind in ("number", "integer"):
            kind = st.integers if param.kind == "integer" else st.floats
            value = data.draw(kind(param.minimum, param.maximum))
            read, note = param.read(param.show(value))
            assert note is None and math.isclose(read, value, rel_tol=1e-9, abs_tol=1e-12)
        elif param.kind not in ("text", "painting"):
            for value in param.choices or (True, False):
                assert param.read(param.show(value)) == (value, None)


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ({"level": "0.25"}, 0.25),
        ({"level": 1}, 1.0),
        ({"count": "4"}, 4),
        ({"count": 4.0}, 4),
        ({"on": "true"}, True),
        ({"on": 0}, False),
        ({"way": " DOWN "}, "down"),
        ({"words": " 7 "}, "7"),
    ],
)
def test_harmless_spellings_are_read_without_a_note(raw, value):
    settings, notes = read_settings(Sample, raw)
    assert getattr(settings, next(iter(raw))) == value
    assert notes == []


@pytest.mark.parametrize(
    ("raw", "value", "words"),
    [
        ({"level": 1e9}, 1.0, ["Level", "1000000000", "0 to 1", "nearest bound 1"]),
        ({"level": float("-inf")}, 0.0, ["Level", "-inf", "nearest bound 0"]),
        ({"count": 3.6}, 4, ["Count", "3.6", "not a whole number", "4 is used"]),
        ({"count": None}, 3, ["Count", "no value", "default 3"]),
    ],
)
def test_repaired_values_name_field_value_and_range(raw, value, words):
    settings, notes = read_settings(Sample, raw)
    assert getattr(settings, next(iter(raw))) == value
    assert len(notes) == 1 and all(word in notes[0] for word in words), notes


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"level": "abc"}, ["Level", "'abc'", "0 to 1"]),
        ({"level": float("nan")}, ["Level", "nan"]),
        ({"level": True}, ["Level", "True"]),
        ({"level": [1]}, ["Level", "[1]"]),
        ({"count": {}}, ["Count", "{}", "1 to 9"]),
        ({"way": "left"}, ["Way", "'left'", "up, down"]),
        ({"on": "maybe"}, ["On", "'maybe'"]),
        ({"words": "x"}, ["Words", "'x'"]),
        ({"words": 3}, ["Words", "3"]),
    ],
)
def test_unusable_values_name_field_value_and_what_would_do(raw, words):
    with pytest.raises(Unusable) as caught:
        read_settings(Sample, raw)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_default_outside_its_own_range_is_a_programming_error():
    with pytest.raises(ValueError, match="Level"):
        number(2.0, 0.0, 1.0, 0.1, label="Level", help="")


def test_omitted_fields_come_from_the_base():
    settings, _ = read_settings(Sample, {"count": 5}, base=Sample(level=0.9))
    assert (settings.level, settings.count) == (0.9, 5)
    assert changed_fields(settings) == {"level": 0.9, "count": 5}


def test_huge_integers_are_out_of_range_and_not_an_overflow():
    with pytest.raises(Unusable):
        Param("number", 0.5, "Level", "", 0.0, 1.0).read(10**400)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_declarations_are_complete_for_a_new_user(technique):
    labels = [param.label for param in params_of(technique.settings).values()]
    assert len(set(labels)) == len(labels)
    for param in params_of(technique.settings).values():
        assert param.help.endswith(".") or "Example" in param.help, param.label
        if param.kind == "number":
            assert isinstance(param.default, float)
    for name, preset in technique.presets.items():
        assert preset.problem() is None, name
