"""Differential Diffusion in img2img: grey says how much changes, black keeps its pixels, nothing of it stays."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from .client import FORGE, distance, encode, is_alive, same, scene

SIZE, BANDS = 128, 8
SOFT = "Soft Inpainting"
SOFT_VALUES = [True, 1, 0.5, 4, 0, 0.5, 2]


def differential(**values):
    return {"differential_diffusion": values}


def ramp(shift=0):
    """Vertical bands from black to white, rolled by `shift` bands."""
    levels = np.roll(np.linspace(0, 255, BANDS).round(), shift).repeat(SIZE // BANDS)
    return Image.fromarray(np.broadcast_to(levels, (SIZE, SIZE)).astype(np.uint8))


def paint(webui, plugin=None, mask=None, **overrides):
    request = {"mask_blur": 0, "steps": 10, "denoising_strength": 1.0, "inpaint_full_res": False}
    mask = ramp() if mask is None else mask
    return webui.inpaint(plugin, **{"mask": encode(mask), "cfg_scale": 1, **request, **overrides})


def original(webui):
    return np.asarray(scene().convert("RGB"))


def change_by_value(pictures, masks, before):
    """Mean |change| of a pixel, for every mask value from black to white."""
    grey = np.stack([np.asarray(mask) for mask in masks])
    differs = np.stack([np.abs(picture.astype(float) - before).mean(-1) for picture in pictures])
    return [differs[grey == value].mean() for value in np.unique(grey)]


def test_the_darker_the_less_changes(webui, unharmed):
    """The masks put every value at every place: random weights paint some places more than others."""
    masks = [ramp(shift) for shift in range(BANDS)]
    answers = [paint(webui, differential(), mask) for mask in masks]
    assert all(answer.acted("differential_diffusion") and is_alive(answer.picture) for answer in answers)
    change = change_by_value([answer.picture for answer in answers], masks, original(webui))
    assert change[0] == 0, "black pixels are the original's"
    assert change == sorted(change), change
    assert change[-1] > change[1] + 5
    unharmed()


def test_grey_is_no_longer_black_or_white(webui):
    off, on = paint(webui), paint(webui, differential())
    assert not off.keys and on.acted("differential_diffusion")
    dark = (slice(None), slice(SIZE // 4, SIZE // 2))  # rounded to black without us
    assert distance(on.picture[dark], original(webui)[dark]) > distance(off.picture[dark], original(webui)[dark]) + 1
    assert same(paint(webui).picture, off.picture)


@pytest.mark.parametrize(
    "sampler",
    ["Euler", "Euler a", "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "Heun", "LMS", "LCM", "DPM fast", "DPM adaptive",
     "Restart", "DDIM", "DDIM CFG++", "PLMS", "UniPC"],
)  # fmt: skip
def test_every_sampler(webui, sampler):
    if sampler not in webui.samplers:
        pytest.skip(f"{webui.host} has no {sampler}")
    request = {"sampler_name": sampler, "steps": 6, "cfg_scale": 2}
    off = paint(webui, **request)
    if not is_alive(off.picture):
        pytest.skip(f"{webui.host} makes no picture with {sampler}, with or without us")
    on = paint(webui, differential(), **request)
    assert on.acted("differential_diffusion") and is_alive(on.picture)
    black, dark = ((slice(None), slice(SIZE * k // BANDS, SIZE * (k + 1) // BANDS)) for k in (0, 1))
    before, free = original(webui), paint(webui, None, Image.new("L", (SIZE, SIZE), 255), **request).picture
    assert same(on.picture[black], before[black])
    assert distance(on.picture[dark], free[dark]) > 1 and distance(on.picture[dark], before[dark]) > 1
    # Forge itself repeats its first picture with some samplers in all but the last bits
    assert distance(paint(webui, **request).picture, off.picture) < (0.1 if webui.host == FORGE else 1e-9)


def test_a_batch_and_several_in_turn(webui):
    """As like to single pictures as the host's own masks are, hard or soft: A1111 encodes the original with noise that
    is another one in a batch, and Forge blends with such noise at every step."""
    request = {"batch_size": 2, "n_iter": 2, "seed": 30, "steps": 4}
    plugins = differential(), differential(strength=0.0), None
    batches = [paint(webui, plugin, **request) for plugin in plugins]
    assert len(batches[0].pictures) == 4
    for k in (0, 3):
        singles = [paint(webui, plugin, seed=30 + k, steps=4).picture for plugin in plugins]
        ours, *usual = (distance(batch.pictures[k], one) for batch, one in zip(batches, singles, strict=True))
        assert ours < 2 * max(usual) + 0.5
        assert k or webui.host == FORGE or ours < 0.01, "the first of a batch has the noise that it has alone"
    black = (slice(None), slice(0, SIZE // BANDS))
    assert all(same(picture[black], original(webui)[black]) for picture in batches[0].pictures)


def test_only_masked(webui):
    """A grey square in one corner: only its surroundings are sampled, at full size."""
    grey = Image.new("L", (SIZE, SIZE), 0)
    grey.paste(150, (16, 16, 64, 64))
    request = {"mask": grey, "inpaint_full_res": True, "inpaint_full_res_padding": 8, "steps": 6}
    paint(webui, **request)  # Forge itself repeats the first picture of a kind in all but the last bits
    off, on = paint(webui, **request), paint(webui, differential(), **request)
    assert on.acted("differential_diffusion")
    outside = np.asarray(grey) == 0
    assert same(on.picture[outside], original(webui)[outside])
    assert distance(on.picture[~outside], original(webui)[~outside]) > 1
    assert same(paint(webui, **request).picture, off.picture)


@pytest.mark.parametrize("request_", [{"inpainting_mask_invert": 1}, {"mask_blur": 8}, {"inpainting_fill": 2}], ids=str)
def test_the_hosts_own_options(webui, request_):
    off, on = paint(webui, **request_), paint(webui, differential(), **request_)
    assert on.acted("differential_diffusion") and is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.1
    if "inpainting_mask_invert" in request_:
        white = (slice(None), slice(-SIZE // BANDS, None))
        assert same(on.picture[white], original(webui)[white])
    assert same(paint(webui, **request_).picture, off.picture)


@pytest.mark.parametrize("axis", ["Noise level", "Step"])
def test_each_axis_has_its_own_effect(webui, axis):
    assert distance(paint(webui, differential(axis=axis), scheduler="Karras").picture,
                    paint(webui, differential(), scheduler="Karras").picture) > 0.05  # fmt: skip


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_strength_0_is_the_hosts_soft_mask(webui, sampler):
    """Where the mask is white rounding makes no difference, and nor may we; a grey one is mixed evenly."""
    white = Image.new("L", (SIZE, SIZE), 255)
    request = {"sampler_name": sampler, "steps": 4}
    soft = paint(webui, differential(strength=0.0), white, **request)
    assert same(soft.picture, paint(webui, None, white, **request).picture)
    grey = paint(webui, differential(strength=0.0), **request)
    full = paint(webui, differential(), **request)
    assert distance(grey.picture, full.picture) > 0.1


def test_beside_soft_inpainting_it_refuses(webui):
    if not webui.has_script(SOFT):
        pytest.skip("the host has no Soft Inpainting")
    theirs = {SOFT: {"args": SOFT_VALUES}}
    alone = paint(webui, steps=4, alwayson_scripts=theirs)
    both = paint(webui, differential(), steps=4, alwayson_scripts=theirs)
    assert same(both.picture, alone.picture)
    assert "Soft Inpainting is on" in both.note and not both.acted("differential_diffusion")


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M SDE", "DDIM"])
def test_an_inpainting_checkpoint(on_family, webui, sampler):
    """The model sees the mask as well; the host makes it, from the same grey picture."""
    server = on_family("inpainting")
    request = {"sampler_name": sampler, "steps": 5}
    off, on = paint(server, **request), paint(server, differential(), **request)
    assert on.acted("differential_diffusion") and is_alive(on.picture)
    black, dark = ((slice(None), slice(SIZE * k // BANDS, SIZE * (k + 1) // BANDS)) for k in (0, 2))
    assert same(on.picture[black], original(server)[black])
    assert distance(on.picture[dark], original(server)[dark]) > distance(off.picture[dark], original(server)[dark])
    repeated = distance(paint(server, **request).picture, off.picture)
    assert repeated < (0.1 if server.host == FORGE else 1e-9)


def test_a_sketch_with_transparent_colour(webui):
    """Inpaint sketch: the painted picture, and a mask that is grey where the colour is transparent."""
    sketch = scene().convert("RGB")
    sketch.paste((200, 40, 40), (32, 32, 96, 96))
    grey = Image.new("L", (SIZE, SIZE), 0)
    grey.paste(128, (32, 32, 96, 96))
    request = {"init_images": [encode(sketch)], "mask_blur": 4}
    off, on = paint(webui, mask=grey, **request), paint(webui, differential(), grey, **request)
    assert on.acted("differential_diffusion") and is_alive(on.picture) and not same(on.picture, off.picture)
    outside = np.ones((SIZE, SIZE), bool)
    outside[16:112, 16:112] = False  # beyond what the blur reaches
    assert same(on.picture[outside], np.asarray(sketch)[outside])


def test_without_a_mask_it_rests(webui):
    off, on = webui.img2img(), webui.img2img(differential())
    assert same(on.picture, off.picture) and not on.acted("differential_diffusion")


def test_in_txt2img_it_rests(webui, plain):
    on = webui.txt2img(differential())
    assert same(on.picture, plain) and not on.acted("differential_diffusion")


@pytest.mark.parametrize("kind", ["raise", "interrupt"])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_after_a_fault_inpainting_is_plain(webui, faults, unharmed, kind, sampler):
    request = {"sampler_name": sampler, "steps": 5}
    plain = paint(webui, **request)
    broken = paint(webui, differential(), fault=(kind, 3), **request)
    assert broken.status == (500 if kind == "raise" else 200)
    assert same(paint(webui, **request).picture, plain.picture)
    unharmed()


def test_cells_of_a_grid_keep_their_own_mask(webui):
    """Strength 0, 1 and off in one grid: rounding is off only where the technique is on."""
    axis = webui.axis("[Hires Plus] Differential Diffusion Strength", "img2img")
    arguments = [axis, "0, 1", [], 0, "", [], 0, "", [], False, True, False, False, False, False, False, 0, False]
    grid = paint(webui, differential(), steps=3, script_name="x/y/z plot", script_args=arguments)
    assert grid.status == 200, grid.body
    plain = paint(webui, steps=3)
    cells = grid.pictures[-2:]
    assert distance(*cells) > 0.1 and not plain.keys
    assert same(cells[1], paint(webui, differential(), steps=3).picture)


def test_prompt_pairs_and_guidance_beside_it(webui):
    both = {**differential(), "apg": {}, "pag": {}}
    on = paint(webui, both, prompt="a lighthouse AND a dog :0.6", cfg_scale=5, steps=4)
    assert on.acted("differential_diffusion", "apg", "pag") and is_alive(on.picture)
    black = (slice(None), slice(0, SIZE // BANDS))
    assert same(on.picture[black], original(webui)[black])


def test_a_flow_model(on_family, webui):
    server = on_family("dit")
    if server.host != FORGE:
        pytest.skip("needs Forge")
    on = paint(server, differential(), scheduler="Simple", steps=4)
    if not is_alive(paint(server, scheduler="Simple", steps=4).picture):
        pytest.skip("the host makes no picture")
    assert on.acted("differential_diffusion")
    black = (slice(None), slice(0, SIZE // BANDS))
    assert same(on.picture[black], original(server)[black])
