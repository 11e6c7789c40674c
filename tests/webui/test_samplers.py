"""Every family of samplers: DeepShrink acts, the picture is whole, and the sampler is as it was afterwards."""

from __future__ import annotations

import pytest

from .client import distance, is_alive, same, shrink

SAMPLERS = [
    ("Euler", "Normal", 3),
    ("Euler a", "Normal", 3),
    ("DPM++ 2M", "Karras", 3),
    ("DPM++ SDE", "Karras", 3),
    ("DPM++ 3M SDE", "Exponential", 4),
    ("Heun", "Normal", 3),
    ("LMS", "Normal", 3),
    ("DPM adaptive", "Normal", 3),
    ("DPM fast", "Normal", 4),
    ("Restart", "Karras", 20),  # restarts begin at 20 steps
    ("LCM", "Normal", 3),
    ("DDIM", "Normal", 4),
    ("PLMS", "Normal", 4),
    ("UniPC", "Normal", 4),
    ("Euler", "SGM Uniform", 3),
    ("Euler", "Polyexponential", 3),
]
SLOW = ("DPM adaptive", "Restart")


@pytest.mark.parametrize(("sampler", "scheduler", "steps"), SAMPLERS, ids=str)
def test_sampler(webui, unharmed, sampler, scheduler, steps):
    if sampler not in webui.samplers:
        pytest.skip(f"{webui.host} has no {sampler}")
    request = {"sampler_name": sampler, "scheduler": scheduler, "steps": steps}
    if sampler in SLOW:
        request["cfg_scale"] = 1
    off, on = webui.txt2img(**request), webui.txt2img(shrink(end=0.5, gradual=0.8), **request)
    assert on.status == 200, on.body
    assert on.is_on
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.5
    if sampler in SLOW:
        unharmed()
    else:
        again = webui.txt2img(**request)
        assert same(again.picture, off.picture)
        assert not again.keys


@pytest.mark.parametrize("sampler", ["Euler a", "DDIM", "UniPC"])
def test_sampler_in_img2img(webui, sampler):
    request = {"sampler_name": sampler, "steps": 5}
    off, on = webui.img2img(**request), webui.img2img(shrink(end=0.8, gradual=0.9), **request)
    assert on.is_on
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.3
    assert same(webui.img2img(**request).picture, off.picture)
