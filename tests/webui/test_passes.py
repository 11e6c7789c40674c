"""Hires fix, img2img and inpainting, batches, prompts and sizes of every shape, and the families of models."""

from __future__ import annotations

import pytest

from .client import distance, is_alive, same, shrink

WHOLE = {"end": 1.0, "gradual": 0.0}  # acts in every step
LONG = ", ".join(["a very tall old lighthouse on a cliff above a stormy green sea"] * 7)  # more than 75 tokens


class TestHires:
    @pytest.fixture(scope="class")
    def pictures(self, webui):
        off = webui.hires()
        by_choice = {choice: webui.hires(shrink(passes=choice)) for choice in ("First pass", "Hires pass", "Both")}
        return off, by_choice

    def test_each_choice_has_its_own_effect(self, pictures):
        off, by_choice = pictures
        seen = [off.picture, *(answer.picture for answer in by_choice.values())]
        for i, one in enumerate(seen):
            assert is_alive(one)
            for other in seen[:i]:
                assert distance(one, other) > 0.1

    def test_infotext_names_the_choice(self, pictures):
        _, by_choice = pictures
        assert all(answer.is_on for answer in by_choice.values())
        assert by_choice["First pass"].keys["DeepShrink Passes"] == "First pass"
        assert by_choice["Hires pass"].keys["DeepShrink Passes"] == "Hires pass"
        assert "DeepShrink Passes" not in by_choice["Both"].keys

    def test_hires_only_rests_without_hires(self, webui, plain):
        assert same(webui.txt2img(shrink(passes="Hires pass")).picture, plain)

    def test_afterwards_hires_is_plain_again(self, webui, pictures):
        off, _ = pictures
        again = webui.hires()
        assert same(again.picture, off.picture)
        assert not again.keys

    def test_upscaled_in_pixels(self, webui):
        request = {"hr_upscaler": "Lanczos"}
        off, on = webui.hires(**request), webui.hires(shrink(passes="Hires pass"), **request)
        assert on.is_on
        assert distance(on.picture, off.picture) > 0.1


def test_pass_choice_does_not_matter_in_img2img(webui):
    both = webui.img2img(shrink(passes="Both"))
    for choice in ("First pass", "Hires pass"):
        assert same(webui.img2img(shrink(passes=choice)).picture, both.picture)


def test_inpaint(webui, unharmed):
    off, on = webui.inpaint(), webui.inpaint(shrink(**WHOLE))
    assert on.is_on
    assert is_alive(on.picture)
    kept, repainted = (slice(None), slice(80, None)), (slice(None), slice(0, 48))
    assert same(on.picture[kept], off.picture[kept])
    assert distance(on.picture[repainted], off.picture[repainted]) > 0.5
    assert same(webui.inpaint().picture, off.picture)
    unharmed()


def test_a_batch_gives_the_pictures_of_its_seeds(webui):
    batch = webui.txt2img(shrink(), batch_size=2, n_iter=2, seed=20)
    assert len(batch.pictures) == 4
    for k, picture in enumerate(batch.pictures):
        single = webui.txt2img(shrink(), seed=20 + k)
        assert distance(picture, single.picture) < 0.5, f"picture {k}"


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a lighthouse AND a dog", "bad"),
        ("a lighthouse :1.1 AND a dog :0.6", "bad"),
        ("a lighthouse AND a dog AND the sea", "bad"),
        (LONG, "bad"),
        ("a lighthouse", LONG),
        ("", ""),
        ("[a lighthouse:a dog:0.5]", "bad"),
    ],
    ids=["AND", "AND with weights", "AND of three", "long prompt", "long negative", "empty", "prompt edit"],
)
def test_prompts(webui, unharmed, prompt, negative):
    request = {"prompt": prompt, "negative_prompt": negative, "batch_size": 2}
    off, on = webui.txt2img(**request), webui.txt2img(shrink(), **request)
    if not is_alive(off.picture):
        pytest.skip(f"{webui.host} makes no picture of this prompt, with or without us")
    assert on.is_on
    for k in range(2):
        assert is_alive(on.pictures[k])
        assert distance(on.pictures[k], off.pictures[k]) > 0.5
    unharmed()


def test_no_guidance(webui):
    off, on = webui.txt2img(cfg_scale=1), webui.txt2img(shrink(), cfg_scale=1)
    assert distance(on.picture, off.picture) > 0.5


@pytest.mark.parametrize(("width", "height"), [(136, 200), (264, 168), (128, 256), (152, 152)])
def test_sizes(webui, width, height):
    request = {"width": width, "height": height}
    off, on = webui.txt2img(**request), webui.txt2img(shrink(**WHOLE), **request)
    assert on.status == 200, on.body
    assert on.picture.shape == (height, width, 3)
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.5


def test_the_smallest_size(webui):
    """At 64 px the deep maps have one cell: nothing is left to shrink, and nothing may break."""
    answer = webui.txt2img(shrink(factor=9.0), width=64, height=64)
    assert answer.status == 200, answer.body
    assert is_alive(answer.picture)


def test_several_stages(webui, shrunk):
    answer = webui.txt2img(shrink(block=3, factor=1.5, more_stages="6:2:0-0.5; 1:1.3:0-0.2-0.6"), width=192, height=192)
    assert answer.is_on
    assert is_alive(answer.picture)
    assert answer.keys["DeepShrink More stages"] == "6:2:0-0.5; 1:1.3:0-0.2-0.6"


@pytest.mark.parametrize("method", ["bicubic", "bilinear", "nearest-exact", "area", "bislerp"])
def test_resize_methods(webui, plain, method):
    answer = webui.txt2img(shrink(downscale_method=method, upscale_method=method, antialias=True))
    assert is_alive(answer.picture)
    assert distance(answer.picture, plain) > 0.5


@pytest.mark.parametrize("family", ["sdxl", "v-prediction"])
def test_other_unets(on_family, family):
    webui = on_family(family)
    off, on = webui.txt2img(), webui.txt2img(shrink(**WHOLE))
    assert on.is_on
    assert is_alive(on.picture)
    assert distance(on.picture, off.picture) > 0.3
    again = webui.txt2img()
    assert same(again.picture, off.picture)
    assert not again.keys


def test_sdxl_refuses_a_block_that_it_lacks(on_family):
    webui = on_family("sdxl")
    answer = webui.txt2img(shrink(block=9))
    assert "block 9" in answer.note
    assert "1 to 8" in answer.note
    assert not answer.is_on


def test_a_transformer_is_refused_with_a_reason(on_family):
    webui = on_family("dit")
    request = {"scheduler": "Simple", "steps": 2}
    off, on = webui.txt2img(**request), webui.txt2img(shrink(), **request)
    assert on.status == 200, on.body
    assert same(on.picture, off.picture)
    assert not on.is_on
    assert "DeepShrink" in on.note
    assert "not a UNet" in on.note


def test_switching_models_leaves_nothing(webui, on_family, unharmed):
    webui.txt2img(shrink())
    on_family("sdxl").txt2img(shrink())
    title = webui.checkpoint("sd1")
    with webui.using_checkpoint(title):
        unharmed()
