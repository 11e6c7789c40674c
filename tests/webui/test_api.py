"""The API: by name, by position, by preset; what comes back."""

from __future__ import annotations

import pytest

from .client import TITLE, distance, is_alive, same, shrink

# every parameter in the order of the panel, at the defaults but for the resolution gate
POSITIONAL = [True, 3, 2.0, 0.0, 0.35, 0.6, True, "bicubic", "bicubic", False, "", False, "Both"]


@pytest.mark.parametrize("is_img2img", [False, True], ids=["txt2img", "img2img"])
def test_listed_in_both_tabs(webui, is_img2img):
    listed = [s for s in webui.scripts if s["name"] == TITLE.lower() and s["is_img2img"] == is_img2img]
    assert len(listed) == 1
    assert listed[0]["is_alwayson"]


def test_enabled_changes_the_picture(plain, shrunk):
    assert shrunk.status == 200
    assert is_alive(shrunk.picture)
    assert distance(shrunk.picture, plain) > 1


def test_infotext_tells_what_was_enabled_and_differs_from_its_default(shrunk):
    assert shrunk.keys == {"DeepShrink": "on", "DeepShrink Only above native size": "off"}


def test_by_name_and_by_position_are_the_same(webui, shrunk):
    by_position = webui.txt2img(POSITIONAL)
    assert same(by_position.picture, shrunk.picture)
    assert by_position.keys == shrunk.keys


def test_the_same_request_gives_the_same_picture(webui, shrunk):
    assert same(webui.txt2img(shrink()).picture, shrunk.picture)


def test_omitted_names_are_at_their_defaults(webui, shrunk):
    spelled_out = shrink(block=3, factor=2.0, start=0, end=0.35, gradual=0.6, after_skip=True, passes="Both")
    assert same(webui.txt2img(spelled_out).picture, shrunk.picture)


def test_a_short_list_is_filled_with_defaults(webui):
    short = webui.txt2img([True, 3, 2.0])
    by_name = webui.txt2img({"deep_shrink": {}})
    assert short.status == by_name.status == 200
    assert short.keys == by_name.keys
    assert same(short.picture, by_name.picture)


def test_each_value_matters(webui, shrunk):
    for values in ({"factor": 3.0, "block": 1}, {"block": 2}, {"after_skip": False}, {"upscale_method": "area"}):
        changed = webui.txt2img(shrink(**values))
        assert not same(changed.picture, shrunk.picture), values


def test_disabled_is_off(webui, plain):
    for plugin in (shrink(enabled=False), [False, 3, 2.0], {}, []):
        answer = webui.txt2img(plugin)
        assert same(answer.picture, plain), plugin
        assert not answer.keys, plugin


def test_preset_by_name(webui):
    preset = webui.txt2img(shrink(preset="2x, composition first"))
    by_hand = webui.txt2img(shrink(end=0.5, gradual=0.75))
    assert preset.is_on
    assert same(preset.picture, by_hand.picture)
    assert preset.keys == by_hand.keys


def test_a_value_beside_a_preset_wins(webui):
    preset = webui.txt2img(shrink(preset="4x", factor=2.0))
    assert same(preset.picture, webui.txt2img(shrink(end=0.5, gradual=0.75)).picture)


def test_the_gate_keeps_it_off_at_native_size(webui, plain):
    gated = webui.txt2img({"deep_shrink": {}})
    assert same(gated.picture, plain)


def test_a_factor_of_one_is_identity(webui, plain):
    assert same(webui.txt2img(shrink(factor=1.0)).picture, plain)


def test_img2img(webui):
    off, on = webui.img2img(), webui.img2img(shrink())
    assert on.is_on
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.5
