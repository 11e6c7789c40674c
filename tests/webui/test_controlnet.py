"""ControlNet and DeepShrink together, with Forge's built-in ControlNet and a model from random_controlnet.py."""

from __future__ import annotations

import pytest

from .client import FORGE, distance, encode, is_alive, scene, shrink

WHOLE = {"end": 1.0, "gradual": 0.0}


@pytest.fixture(scope="module")
def control(webui):
    if webui.host != FORGE:
        pytest.skip("this host has no ControlNet of its own")
    names = [name for name in webui.get("/controlnet/model_list")["model_list"] if "random" in name]
    if not names:
        pytest.skip("needs the model that tests/webui/random_controlnet.py makes (docs/testing.md)")

    def unit(weight):
        settings = {"model": names[0], "module": "None", "weight": weight, "image": encode(scene())}
        return {"ControlNet": {"args": [{"enabled": True, "resize_mode": "Just Resize", **settings}]}}

    return unit


@pytest.mark.parametrize("values", [WHOLE, {**WHOLE, "after_skip": False}, {**WHOLE, "block": 1}], ids=str)
def test_control_reaches_the_shrunk_maps(webui, control, server_log, values):
    without = webui.txt2img(shrink(**values), alwayson_scripts=control(0.0))
    with_control = webui.txt2img(shrink(**values), alwayson_scripts=control(1.0))
    assert with_control.is_on
    assert is_alive(with_control.picture)
    assert distance(with_control.picture, without.picture) > 1
    assert "control could not be applied" not in server_log()


def test_control_without_shrinking_is_untouched(webui, control):
    """At a factor of 1 the residuals go their ordinary way."""
    plain = webui.txt2img(alwayson_scripts=control(1.0))
    neutral = webui.txt2img(shrink(factor=1.0), alwayson_scripts=control(1.0))
    assert distance(plain.picture, neutral.picture) == 0


def test_control_after_the_shrinking_is_the_ordinary_one(webui, control):
    """A window that is over after the first call: the residuals of later calls fit again."""
    answer = webui.txt2img(shrink(end=0.1, gradual=0.0), alwayson_scripts=control(1.0), steps=4)
    without = webui.txt2img(shrink(end=0.1, gradual=0.0), alwayson_scripts=control(0.0), steps=4)
    assert distance(answer.picture, without.picture) > 1


@pytest.mark.parametrize("plugin", [{"pag": {}}, {"sag": {"scale": 2.0}}, {"pag": {}, **shrink(**WHOLE)}], ids=str)
def test_control_and_further_predictions(webui, control, server_log, plugin):
    """PAG's rows ride in the controlled evaluation, SAG takes one of its own: both are controlled like the rest."""
    off = webui.txt2img(alwayson_scripts=control(1.0))
    without = webui.txt2img(plugin, alwayson_scripts=control(0.0))
    on = webui.txt2img(plugin, alwayson_scripts=control(1.0))
    assert on.acted(*plugin) and is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1
    assert distance(on.picture, without.picture) > 1
    assert "control could not be applied" not in server_log()


def test_afterwards_control_is_plain_again(webui, control, unharmed):
    before = webui.txt2img(alwayson_scripts=control(1.0))
    webui.txt2img(shrink(**WHOLE), alwayson_scripts=control(1.0))
    after = webui.txt2img(alwayson_scripts=control(1.0))
    assert distance(before.picture, after.picture) == 0
    unharmed()
