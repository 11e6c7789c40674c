"""Nothing outlives a generation: after faults, interrupts and skips at any call the next picture is whole."""

from __future__ import annotations

import pytest

from lib_hires.registry import TECHNIQUES

from .client import same, shrink

pytestmark = pytest.mark.usefixtures("faults")

WHOLE = {"end": 1.0, "gradual": 0.0}
EVERYTHING = {technique.name: {} for technique in TECHNIQUES} | {
    "deep_shrink": WHOLE,
    "model_sampling": {"prediction": "v"},
}


def clean(residue):
    return not (residue["hooks"] or residue["shadowed_forwards"])


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM++ SDE", "DDIM", "UniPC"])
def test_a_fault_inside_the_unet(webui, unharmed, sampler):
    answer = webui.txt2img(shrink(**WHOLE), fault=("raise", 3), steps=5, sampler_name=sampler)
    assert answer.status == 500
    assert "a fault made by the test extension" in answer.body
    assert clean(webui.residue())
    unharmed()


@pytest.mark.parametrize("kind", ["interrupt", "skip"])
def test_interrupt_and_skip(webui, unharmed, kind):
    answer = webui.txt2img(shrink(**WHOLE), fault=(kind, 3), steps=5)
    assert answer.status == 200, answer.body
    assert clean(webui.residue())
    unharmed()


def test_skip_inside_a_batch_count(webui, unharmed):
    answer = webui.txt2img(shrink(**WHOLE), fault=("skip", 2), steps=4, n_iter=2, seed=5)
    assert answer.status == 200, answer.body
    assert same(answer.pictures[-1], webui.txt2img(shrink(**WHOLE), steps=4, seed=6).picture)
    unharmed()


def test_a_fault_in_the_hires_pass(webui, unharmed):
    plain = webui.hires()
    answer = webui.hires(shrink(**WHOLE), fault=("raise", 3))  # the first pass has two calls
    assert answer.status == 500
    assert same(webui.hires().picture, plain.picture)
    unharmed()


def test_a_fault_in_img2img(webui, unharmed):
    plain = webui.img2img()
    answer = webui.img2img(shrink(**WHOLE), fault=("raise", 2))
    assert answer.status == 500
    assert same(webui.img2img().picture, plain.picture)
    unharmed()


@pytest.fixture
def small_native_size(webui):
    """So that the tests' small pictures are above the native size for every technique."""
    webui.set_options(hires_plus_native_size=64)
    yield
    webui.set_options(hires_plus_native_size=0)


@pytest.mark.usefixtures("small_native_size")
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
@pytest.mark.parametrize(
    ("kind", "call"), [("txt2img", 3), ("txt2img", 6), ("hires", 3), ("hires", 12), ("inpaint", 3), ("inpaint", 6)]
)
def test_a_fault_with_everything_on(webui, unharmed, kind, call, sampler):
    generate, request = getattr(webui, kind), {"sampler_name": sampler, "steps": 6, "denoising_strength": 1.0}
    plain = generate(**request)
    answer = generate(EVERYTHING, fault=("raise", call), **request)
    assert answer.status == 500 and "a fault made by the test extension" in answer.body
    assert clean(webui.residue())
    assert same(generate(**request).picture, plain.picture)
    unharmed()


def test_shrunk_again_after_a_fault(webui, shrunk):
    assert webui.txt2img(shrink(**WHOLE), fault=("raise", 1)).status == 500
    assert same(webui.txt2img(shrink()).picture, shrunk.picture)


def test_objects_do_not_pile_up(webui):
    counts = []
    for _ in range(3):
        webui.txt2img(shrink())
        counts.append(webui.residue(count_objects=True)["alive"])
    assert counts[1] == counts[2]


def test_a_run_dies_with_its_generation(webui):
    webui.txt2img(shrink())
    webui.txt2img()
    alive = webui.residue(count_objects=True)["alive"]
    assert not {"SamplingRun", "Plan", "DeepShrinkPatch", "FeatureMapWalk"} & set(alive), alive
