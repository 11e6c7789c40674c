"""What acts inside the UNet, in a running WebUI: FreeU, dilation, and the attention techniques, alone and together."""

from __future__ import annotations

from typing import Any

import pytest

from .client import FORGE, distance, is_alive, same
from .test_samplers import SAMPLERS

# settings that act visibly within two steps
ALONE: dict[str, dict[str, Any]] = {
    "dilation": {},
    "freeu": {},
    "scale_fusion": {},
    "near_sighted_tile": {"base_tile_size": 16, "peak_tile_size": 16},
    "near_sighted_attention": {},
    "slothful": {},
}
# others leave alone what Near-sighted Attention has reduced and tiled already
ALL = tuple(name for name in ALONE if name != "near_sighted_attention")
LARGE = {"width": 256, "height": 192}  # four times the tests' native size and more
COMBINATIONS = {
    "FreeU with DeepShrink": ("freeu", "deep_shrink"),
    "dilation with scale fusion": ("dilation", "scale_fusion"),
    "Slothful with PAG and SAG": ("slothful", "pag", "sag"),
    "Near-sighted Attention with PAG in the middle": ("near_sighted_attention", "pag"),
    "all windows": ("scale_fusion", "near_sighted_tile", "slothful"),
    "everything": (*ALL, "deep_shrink", "apg", "pag", "sag"),
}
LONG = ", ".join(["a very tall old lighthouse on a cliff above a stormy green sea"] * 7)


@pytest.fixture(autouse=True, scope="module")
def small_native_size(webui):
    """A native size of 64 px, so that the tests' small pictures are four times as large."""
    webui.set_options(hires_plus_native_size=64)
    yield
    webui.set_options(hires_plus_native_size=0)


def asking(*names: str) -> dict[str, Any]:
    return {name: ALONE.get(name, {}) for name in names}


@pytest.mark.parametrize("name", ALONE)
def test_each_alone(webui, name):
    request = LARGE
    off, on = webui.txt2img(**request), webui.txt2img(asking(name), **request)
    assert on.status == 200, on.body
    assert on.acted(name) and not on.note, on.infotext
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1
    assert same(webui.txt2img(asking(name), **request).picture, on.picture), "the same seed, another picture"
    again = webui.txt2img(**request)
    assert same(again.picture, off.picture) and not again.keys


@pytest.mark.parametrize(
    "name", ["dilation", "scale_fusion", "near_sighted_tile", "near_sighted_attention", "slothful"]
)
def test_at_native_size_they_step_aside(webui, name):
    request = {"width": 64, "height": 64}
    assert same(webui.txt2img(asking(name), **request).picture, webui.txt2img(**request).picture)


@pytest.mark.parametrize("title", COMBINATIONS)
def test_together(webui, title):
    names, request = COMBINATIONS[title], {"width": 192, "height": 256}
    off, on = webui.txt2img(**request), webui.txt2img(asking(*names), **request)
    assert on.status == 200, on.body
    assert on.acted(*names), on.infotext
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1
    assert same(webui.txt2img(**request).picture, off.picture)


@pytest.mark.parametrize(("sampler", "scheduler", "steps"), [s for s in SAMPLERS if s[0] in ("Heun", "DDIM", "UniPC")])
def test_samplers(webui, sampler, scheduler, steps):
    request = {"sampler_name": sampler, "scheduler": scheduler, "steps": steps, **LARGE}
    names = ("freeu", "dilation", "near_sighted_tile")
    off, on = webui.txt2img(**request), webui.txt2img(asking(*names), **request)
    assert on.acted(*names) and is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1
    assert same(webui.txt2img(**request).picture, off.picture)


@pytest.mark.parametrize("tab", ["hires", "img2img", "inpaint"])
def test_passes(webui, tab):
    names = ALL

    def make(plugin=None):
        return getattr(webui, tab)(plugin, **({} if tab == "hires" else LARGE))

    if webui.host == FORGE:
        make()  # its first picture of a size differs from the later ones in the last bits, with or without us
    off, on = make(), make(asking(*names))
    assert on.status == 200, on.body
    assert on.acted(*names), on.infotext
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1
    # Forge noises the kept part of an inpainting anew from a global generator, with or without us
    again, almost = make().picture, tab == "inpaint" and webui.host == FORGE
    assert distance(again, off.picture) < 0.01 if almost else same(again, off.picture)


@pytest.mark.parametrize("prompt", ["a lighthouse AND a dog :0.6", LONG], ids=["AND", "long"])
def test_prompts_in_batches(webui, prompt):
    names = ALL
    on = webui.txt2img(asking(*names), batch_size=2, seed=20, prompt=prompt, **LARGE)
    assert on.status == 200, on.body
    assert on.acted(*names)
    for k in range(2):
        assert is_alive(on.pictures[k])
        single = webui.txt2img(asking(*names), seed=20 + k, prompt=prompt, **LARGE)
        assert distance(on.pictures[k], single.picture) < 0.5, f"picture {k} depends on its batch mate"


@pytest.mark.parametrize("prompt", ["a lighthouse", "a lighthouse AND a dog :0.6"], ids=["one", "AND"])
@pytest.mark.parametrize("name", ["scale_fusion", "near_sighted_tile", "near_sighted_attention"])
def test_windows_and_tiles_lie_by_each_pictures_own_seed(webui, name, prompt):
    tiles = {} if name == "scale_fusion" else {"base_tile_size": 16, "peak_tile_size": 16}
    request = {"prompt": prompt, "width": 248, "height": 184}  # tiles of 16 have room in maps of 31x23
    batch = webui.txt2img({name: tiles}, batch_size=2, seed=20, **request)
    assert batch.status == 200 and batch.acted(name), batch.body
    for k in range(2):
        single = webui.txt2img({name: tiles}, seed=20 + k, **request)
        assert distance(batch.pictures[k], single.picture) < 0.02, f"picture {k} depends on its batch mate"


@pytest.mark.parametrize("size", [(136, 200), (264, 168), (152, 152)], ids=str)
def test_sizes(webui, size):
    width, height = size
    names = ALL
    on = webui.txt2img(asking(*names, "deep_shrink"), width=width, height=height)
    assert on.status == 200, on.body
    assert on.picture.shape == (height, width, 3) and is_alive(on.picture)
    assert on.acted("freeu", "deep_shrink")


@pytest.mark.parametrize("family", ["sdxl", "v-prediction"])
def test_other_unets(on_family, family):
    webui = on_family(family)
    # SDXL's attention begins a level deeper, where this picture fits into one tile
    names = tuple(name for name in ALL if family != "sdxl" or name != "near_sighted_tile")
    off, on = webui.txt2img(**LARGE), webui.txt2img(asking(*names), **LARGE)
    assert on.status == 200, on.body
    assert on.acted(*names), on.infotext
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1
    assert same(webui.txt2img(**LARGE).picture, off.picture)


def test_a_transformer_is_refused_with_a_reason(on_family):
    webui = on_family("dit")
    request = {"scheduler": "Simple", "steps": 2}
    off, on = webui.txt2img(**request), webui.txt2img(asking(*ALONE), **request)
    assert on.status == 200, on.body
    assert same(on.picture, off.picture) and not on.acted("freeu")
    assert on.note.count("not a UNet") >= 1


@pytest.mark.usefixtures("faults")
def test_a_fault_inside_the_unet(webui, unharmed):
    answer = webui.txt2img(asking(*ALONE, "deep_shrink", "pag"), fault=("raise", 2))
    assert answer.status == 500 and "a fault made by the test extension" in answer.body
    unharmed()
