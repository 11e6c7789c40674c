"""User presets survive crashes, hand editing and damage; built-in ones are never touched."""

import json
import os

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st

from lib_hires.registry import BY_NAME
from lib_hires.webui.presets import PresetError, PresetStore, matching_name
from tests.webui_layer import strategies

DEEP_SHRINK = BY_NAME["deep_shrink"]
KIND = DEEP_SHRINK.settings
MINE = KIND(factor=3.0, more_stages="6:2:0-0.2")


@pytest.fixture
def store(tmp_path):
    return PresetStore(tmp_path / "user" / "presets.json")


def write(store, content):
    store.path.parent.mkdir(exist_ok=True)
    store.path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_without_a_file_there_are_the_built_in_ones(store):
    assert store.all(DEEP_SHRINK) == DEEP_SHRINK.presets
    assert not store.path.exists()


def test_save_and_delete(store):
    assert store.save(DEEP_SHRINK, "  my   own ", MINE) == "my own"
    again = PresetStore(store.path)
    assert again.of_user(DEEP_SHRINK) == {"my own": MINE}
    assert list(again.all(DEEP_SHRINK))[-1] == "my own"
    again.delete(DEEP_SHRINK, "my own")
    assert store.all(DEEP_SHRINK) == DEEP_SHRINK.presets
    assert os.listdir(store.path.parent) == ["presets.json"]


@pytest.mark.parametrize("name", ["", "   ", None, "x" * 61, "4x", "4X"])
def test_names_that_will_not_do(store, name):
    with pytest.raises(PresetError):
        store.save(DEEP_SHRINK, name, MINE)
    assert not store.path.exists()


@pytest.mark.parametrize("name", ["4x", "never saved", "", None])
def test_what_cannot_be_deleted(store, name):
    store.save(DEEP_SHRINK, "mine", MINE)
    with pytest.raises(PresetError):
        store.delete(DEEP_SHRINK, name)
    assert store.of_user(DEEP_SHRINK) == {"mine": MINE}


@pytest.mark.parametrize("content", ["{", "", "[]", "3", '{"deep_shrink": 3}', '{"deep_shrink": {"a": 3}}', "\x00"])
def test_a_damaged_file_is_kept_aside(store, caplog, content):
    write(store, content)
    assert store.all(DEEP_SHRINK) == DEEP_SHRINK.presets
    assert (store.path.parent / "presets.json.broken").read_text() == content
    assert "presets.json.broken" in caplog.text
    store.save(DEEP_SHRINK, "mine", MINE)
    assert store.of_user(DEEP_SHRINK) == {"mine": MINE}


def test_a_failed_save_leaves_the_old_file(store, monkeypatch):
    store.save(DEEP_SHRINK, "mine", MINE)
    before = store.path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PresetError, match="disk full"):
        store.save(DEEP_SHRINK, "another", MINE)
    assert store.path.read_bytes() == before


def test_stored_values_are_repaired_or_left_out(store, caplog):
    write(store, {"deep_shrink": {"far": {"factor": 99, "faktor": 1}, "word": {"factor": "abc"}, "4x": {"factor": 1}}})
    assert store.of_user(DEEP_SHRINK) == {"far": KIND(factor=9.0)}
    assert store.all(DEEP_SHRINK)["4x"] == DEEP_SHRINK.presets["4x"]
    assert "nearest bound 9" in caplog.text and "'abc' is not a number" in caplog.text
    caplog.clear()
    store.all(DEEP_SHRINK)
    assert not caplog.text, "told once, not at every look"


def test_a_technique_that_is_gone_keeps_its_presets(store):
    write(store, {"of another version": {"a": {"b": 1}}})
    store.save(DEEP_SHRINK, "mine", MINE)
    assert json.loads(store.path.read_text())["of another version"] == {"a": {"b": 1}}


@profile(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=5), strategies.json_values) | strategies.json_values)
def test_no_content_raises(store, content):
    write(store, {"deep_shrink": content})
    for preset in store.all(DEEP_SHRINK).values():
        assert isinstance(preset, KIND)


def test_names_of_settings():
    presets = {"a": KIND(), "b": KIND(), "c": MINE}
    assert matching_name(presets, KIND()) == "a"
    assert matching_name(presets, KIND(), preferred="b") == "b"
    assert matching_name(presets, KIND(), preferred="c") == "a"
    assert matching_name(presets, KIND(factor=5.0)) is None
    assert matching_name(presets, None) is None
