"""Infotext: what is written comes back as the same picture, and a text without our keys switches us off."""

from __future__ import annotations

import pytest

from .client import BASE, same, shrink

ROUND_TRIPS = {
    "defaults": {},
    "numbers": {"block": 1, "factor": 2.15, "start": 0.05, "end": 0.45, "gradual": 0.7},
    "choices": {"downscale_method": "bislerp", "upscale_method": "nearest-exact", "antialias": True},
    "switches": {"after_skip": False, "passes": "First pass"},
    "stages": {"factor": 2.25, "more_stages": "1:1.3:0-0.2-0.6; 2:1.2:0-0.5"},
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_the_infotext_gives_the_picture_again(webui, name):
    first = webui.txt2img(shrink(**ROUND_TRIPS[name]), steps=4)
    assert first.is_on
    again = webui.txt2img(infotext=first.infotext, steps=4)
    assert same(again.picture, first.picture)
    assert again.keys == first.keys


def test_a_request_of_nothing_but_an_infotext(webui):
    """Prompt, size, seed and sampler come from the text as well."""
    first = webui.txt2img(shrink(factor=1.5), seed=77)
    response = webui.post("/sdapi/v1/txt2img", {"infotext": first.infotext, "styles": []})
    again = webui.read(response)
    assert same(again.picture, first.picture)


def test_in_img2img(webui):
    first = webui.img2img(shrink(factor=1.5, end=0.8, gradual=0.9))
    assert first.is_on
    again = webui.img2img(infotext=first.infotext)
    assert same(again.picture, first.picture)


def test_in_hires(webui):
    same_sampler = {"hr_sampler_name": "Euler"}  # or the hosts read their own "Use same sampler" and fail
    first = webui.hires(shrink(passes="Hires pass", factor=1.5), **same_sampler)
    again = webui.hires(infotext=first.infotext, **same_sampler)
    assert same(again.picture, first.picture)
    assert again.keys == first.keys


def test_a_plain_infotext_is_off(quick, quick_plain):
    infotext = quick().infotext
    again = quick(infotext=infotext)
    assert same(again.picture, quick_plain)
    assert not again.keys


def test_settings_without_the_switch_are_off(quick, quick_plain):
    """A text that names a parameter but not "DeepShrink: on" does not switch it on."""
    infotext = "a lighthouse\nSteps: 1, DeepShrink Downscale factor: 3, DeepShrink Only above native size: off"
    answer = quick(infotext=infotext)
    assert same(answer.picture, quick_plain)
    assert not answer.is_on


def test_a_broken_infotext_does_no_harm(quick, quick_plain, quick_unharmed):
    for text in (
        "DeepShrink",
        "DeepShrink: ",
        "DeepShrink: perhaps",
        'DeepShrink: "',
        "\x00",
        "a\nSteps: 1, DeepShrink:",
    ):
        answer = quick(infotext=text)
        assert answer.status == 200, (text, answer.body)
        assert same(answer.picture, quick_plain), text
    quick_unharmed()


def test_explicit_arguments_win_over_the_infotext(quick, quick_plain):
    """As for every other field of the hosts: what the request sets itself is not taken from the text."""
    infotext = quick(shrink()).infotext
    answer = quick(shrink(factor=3.0), infotext=infotext)
    assert same(answer.picture, quick(shrink(factor=3.0)).picture)
    off = quick(shrink(enabled=False), infotext=infotext)
    assert same(off.picture, quick_plain)


def test_png_info_shows_our_keys(webui, shrunk):
    """The keys are read by the host's own parser, as PNG info and Send to use it."""
    encoded = webui.post("/sdapi/v1/txt2img", {**BASE, "alwayson_scripts": {"Hires Plus": {"args": [shrink()]}}})
    answer = webui.post("/sdapi/v1/png-info", {"image": encoded.json()["images"][0]}).json()
    assert answer["parameters"]["DeepShrink"] == "on"
    assert answer["parameters"]["DeepShrink Only above native size"] == "off"


def test_no_key_of_an_earlier_picture_stays(quick):
    quick(shrink(factor=3.0, more_stages="1:1.3:0-0.2"))
    assert set(quick(shrink()).keys) == {"DeepShrink", "DeepShrink Only above native size"}
    assert not quick().keys


def test_every_picture_of_a_batch_has_the_keys(quick):
    answer = quick(shrink(), batch_size=2, n_iter=2)
    assert len(answer.infotexts) == 4
    assert all("DeepShrink: on" in text for text in answer.infotexts)
