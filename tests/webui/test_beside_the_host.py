"""Beside what the host itself does to the network and the run: HyperTile, token merging, the refiner."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest

from .client import FORGE, distance, is_alive, same, shrink

SIZE = {"width": 256, "height": 256}
REDUCED = {"slothful": {"only_above_native": False}}


@contextmanager
def options(webui, **values):
    before = webui.get("/sdapi/v1/options")
    webui.set_options(**values)
    try:
        yield
    finally:
        webui.set_options(**{name: before[name] for name in values})


def told(server_log, words):
    if os.environ.get("HIRES_WEBUI_LOG"):
        assert words in server_log(), f"the log does not say {words!r}"


def test_hypertile_is_named_and_acts_where_we_do_not(webui, unharmed, server_log):
    if "hypertile_enable_unet" not in webui.get("/sdapi/v1/options"):
        pytest.skip("the host has no HyperTile")
    with options(webui, hypertile_enable_unet=True, hypertile_max_depth_unet=0, hypertile_max_tile_unet=64):
        tiled = webui.txt2img(**SIZE).picture
        between = {"slothful": {**REDUCED["slothful"], "start": 0.4, "end": 0.6}}  # of two steps none lies there
        idle = webui.txt2img(between, **SIZE).picture
        both = webui.txt2img(REDUCED, **SIZE)
        told(server_log, "HyperTile acts in the layers and steps where no technique of this plugin does")
        assert both.acted("slothful") and is_alive(both.picture)
        assert same(idle, tiled), "where we do not act, HyperTile is untouched"
        assert same(webui.txt2img(**SIZE).picture, tiled)
    assert distance(tiled, webui.txt2img(**SIZE).picture) > 0, "HyperTile acted at all"
    unharmed()


@pytest.mark.parametrize("plugin", [REDUCED, {"deep_shrink": {"only_above_native": False}}, {"apg": {}}], ids=str)
def test_token_merging_is_named_and_goes_on(webui, unharmed, server_log, plugin):
    with options(webui, token_merging_ratio=0.5):
        merged = webui.txt2img(**SIZE).picture
        both = webui.txt2img(plugin, **SIZE)
        if plugin is REDUCED:
            told(server_log, "token merging (ToMe) has merged the tokens")
        else:
            assert both.acted(*plugin)
        assert is_alive(both.picture)
        assert same(webui.txt2img(**SIZE).picture, merged)
    if same(merged, webui.txt2img(**SIZE).picture):
        pytest.skip(f"token merging changes nothing in {webui.host}")
    unharmed()


@pytest.fixture
def refined(webui):
    """A request whose second half another checkpoint samples."""
    first = webui.checkpoint("sd1")
    others = [m["title"] for m in webui.get("/sdapi/v1/sd-models") if "second" in m["title"]]
    if not others:
        pytest.skip('no checkpoint with "second" in its name is installed')
    return {"refiner_checkpoint": others[0], "refiner_switch_at": 0.5, "steps": 4}, first


@pytest.mark.parametrize(
    "plugin",
    [
        {"deep_shrink": {"only_above_native": False, "end": 1.0}},
        {"apg": {}, "rescale_cfg": {}},
        {"pag": {}},
        {"freeu": {}, "slothful": {"only_above_native": False}},
        {"model_sampling": {"prediction": "v"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_the_refiner_takes_over(webui, refined, unharmed, plugin, sampler):
    request, _ = refined
    request = {**request, "sampler_name": sampler}
    plain, one_model = webui.txt2img(**request), webui.txt2img(steps=4, sampler_name=sampler)
    assert distance(plain.picture, one_model.picture) > 0.5, "the refiner changed the model"
    both = webui.txt2img(plugin, **request)
    assert both.acted(*plugin) and is_alive(both.picture)
    assert distance(both.picture, plain.picture) > 0.05
    assert same(both.picture, webui.txt2img(plugin, **request).picture)
    assert same(webui.txt2img(**request).picture, plain.picture)
    unharmed()


def test_a_technique_that_ends_before_the_refiner_leaves_it_alone(webui, refined):
    """One whose window ends before the switch: the steps after it are the refiner's own, from another latent."""
    request, _ = refined
    early = {"deep_shrink": {"only_above_native": False, "end": 0.3, "gradual": 0.3}}
    on, off = webui.txt2img(early, **request), webui.txt2img(**request)
    assert on.acted("deep_shrink") and is_alive(on.picture) and not same(on.picture, off.picture)


def test_the_refiner_with_a_hires_pass(webui, refined, unharmed):
    request, _ = refined
    plugin = {"iterative_mixing": {}, "low_band_lock": {}}
    plain = webui.hires(**request).picture
    both = webui.hires(plugin, **request)
    assert both.acted(*plugin) and is_alive(both.picture)
    again = webui.hires(**request).picture
    # Forge itself repeats its first picture of a size in all but the last bits
    assert distance(again, plain) < (0.1 if webui.host == FORGE else 1e-9)
    unharmed()


TWINS = {
    "Kohya HRFix Integrated": (shrink(), [True, 3, 2.0, 0, 1, True, "bicubic", "bicubic"]),
    "FreeU Integrated (SD 1.x, SD 2.x, SDXL)": ({"freeu": {}}, [True, 1.01, 1.02, 0.99, 0.95, 0, 1]),
    "PerturbedAttentionGuidance Integrated": ({"pag": {}}, [True, 3, 0, 0, 1]),
    "SelfAttentionGuidance Integrated (SD 1.x, SD 2.x, SDXL)": ({"sag": {}}, [True, 0.5, 2, 1]),
}  # fmt: skip


@pytest.mark.parametrize("title", TWINS)
def test_the_hosts_own_form_of_a_technique_is_named(webui, unharmed, title):
    if not webui.has_script(title):
        pytest.skip(f"the host has no {title}")
    plugin, arguments = TWINS[title]
    twin = {"alwayson_scripts": {title: {"args": arguments}}}
    both, ours = webui.txt2img(plugin, **twin), webui.txt2img(plugin)
    # the host's own DeepShrink comes first, and leaves nothing to shrink
    assert is_alive(both.picture) and ours.acted(*plugin) and both.acted(*plugin) is not title.startswith("Kohya")
    assert f"{title} is on as well" in both.note and "is on as well" not in ours.note
    unharmed()
