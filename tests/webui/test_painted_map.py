"""Iterative mixing with a painted map: it acts where it is painted, as text or as a picture file, and comes back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lib_hires.painted_map import WHITE, decode, encode

from .client import distance, half_mask, is_alive, same
from .client import encode as encoded_picture

HIRES = {"width": 64, "height": 64, "hr_scale": 2}
LEFT = encode(np.repeat([[WHITE] * 8 + [0] * 8], 16, axis=0))  # white on the left half
MAP_KEY = "Iterative mixing Painted map"


def painted(painting, **values):
    """Free where the map is white, a copy of the small picture where it is black."""
    values = {"alpha": 20.0, "plain_alpha": 0.0, "space": "Denoised", "softness": 0.0, **values}
    return {"iterative_mixing": {"detail": "Painted", "painting": painting, **values}}


def halves(a, b):
    """Distance of two pictures on the left and on the right, away from the border between."""
    width = a.shape[1]
    return distance(a[:, : width * 3 // 8], b[:, : width * 3 // 8]), distance(
        a[:, width * 5 // 8 :], b[:, width * 5 // 8 :]
    )


def uniform(level):
    return encode(np.full((5, 7), level))


def test_only_what_is_painted_is_let_free(webui, unharmed):
    black, white = webui.hires(painted(uniform(0)), **HIRES), webui.hires(painted(uniform(WHITE)), **HIRES)
    answer = webui.hires(painted(LEFT), **HIRES)
    assert answer.acted("iterative_mixing") and answer.keys[MAP_KEY] == LEFT and is_alive(answer.picture)
    # the decoder looks at the whole picture, so no half is quite that of the other picture
    kept_left, kept_right = halves(answer.picture, black.picture)
    free_left, free_right = halves(answer.picture, white.picture)
    assert kept_right < 0.6 * free_right and free_left < 0.8 * kept_left
    assert not same(answer.picture, black.picture) and not same(answer.picture, white.picture)
    unharmed()


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM++ 2M", "DDIM"])
@pytest.mark.parametrize(("level", "alpha"), [(0, 0.4), (WHITE, 3.0)], ids=["black", "white"])
def test_one_shade_is_a_number(webui, sampler, level, alpha):
    request = HIRES | {"sampler_name": sampler}
    block = painted(uniform(level), alpha=3.0, plain_alpha=0.4, space="Auto")
    assert same(
        webui.hires(block, **request).picture,
        webui.hires({"iterative_mixing": {"alpha": alpha}}, **request).picture,
    )


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_a_picture_file_is_the_map_that_it_shows(webui, unharmed, prefix):
    by_file = webui.hires(painted(prefix + encoded_picture(half_mask(16, 16))), **HIRES)
    assert np.array_equal(decode(by_file.keys[MAP_KEY]), decode(LEFT))
    assert same(by_file.picture, webui.hires(painted(LEFT), **HIRES).picture)
    unharmed()


@pytest.mark.parametrize(
    ("painting", "words"),
    [
        ("nonsense", ("nonsense", "at most 64x64 cells")),
        ("65x1.eJwDAAAAAAE", ("65x1", "1x1 to 64x64")),
        (LEFT[:-6], ("128 bytes",)),
        (LEFT.replace("16x16", "64x64"), ("2048 bytes",)),
        (encoded_picture(half_mask())[:60], ("not a whole PNG or JPEG",)),
        ("data:image/png;base64,####", ("not base64",)),
        ("/etc/passwd", ("at most 64x64 cells",)),
        (5, ("5 is not text",)),
        (["x"], ("is not text",)),
        ("", ("the painted map is empty", "paint or upload")),
    ],
    ids=["word", "too wide", "truncated", "too short", "cut picture", "no base64", "path", "number", "list", "empty"],
)
def test_bad_maps_are_told(webui, unharmed, painting, words):
    plain = webui.hires(**HIRES)
    answer = webui.hires(painted(painting), **HIRES)
    assert answer.status == 200 and same(answer.picture, plain.picture)
    for word in ("Iterative mixing", *words):
        assert word in answer.note
    assert MAP_KEY not in answer.keys
    unharmed()


def test_the_infotext_gives_the_same_picture_again(webui):
    # A1111's API does not understand the words that its own infotext reader puts there for "as the first pass"
    request = HIRES | {"hr_sampler_name": "Euler", "hr_scheduler": "Normal", "hr_checkpoint_name": None}
    first = webui.hires(painted(LEFT), **request)
    again = webui.hires(**request, infotext=first.infotext)
    assert same(again.picture, first.picture) and again.keys == first.keys


def test_batches_share_the_map(webui):
    # upscaled latents: the encoding of pictures takes random numbers that depend on batch mates
    batch = webui.hires(painted(LEFT), **HIRES, batch_size=2, seed=20)
    assert len(batch.pictures) == 2
    for k, picture in enumerate(batch.pictures):
        assert distance(picture, webui.hires(painted(LEFT), **HIRES, seed=20 + k).picture) < 0.5


def test_stages_and_other_proportions(webui):
    request = {"width": 64, "height": 96, "hr_scale": 3}
    answer = webui.hires({"cascade": {"largest": 1.75}, **painted(LEFT)}, **request)
    assert answer.acted("cascade", "iterative_mixing") and answer.picture.shape == (288, 192, 3)


def test_img2img(webui):
    webui.img2img()  # Forge's first picture of a size differs from its later ones in the last bits
    free, kept = (webui.img2img(painted(uniform(level))).picture for level in (WHITE, 0))
    answer = webui.img2img(painted(LEFT))
    assert answer.acted("iterative_mixing")
    (free_left, free_right), (kept_left, kept_right) = halves(answer.picture, free), halves(answer.picture, kept)
    assert free_left < free_right and kept_right < kept_left


def test_an_axis_of_maps(webui):
    axis = webui.axis("[Hires Plus] Iterative mixing Painted map")
    values = f"{LEFT}, {uniform(0)}"
    script = [axis, values, [], 0, "", [], 0, "", [], False, True, False, False, False, False, False, 0, True]
    answer = webui.hires(painted(uniform(WHITE)), **HIRES, script_name="x/y/z plot", script_args=script)
    assert answer.status == 200, answer.body


def test_a_very_large_picture_is_refused_at_once(webui, unharmed):
    large = encoded_picture(Image.new("1", (5000, 5000)))
    assert "more pixels than 4096x4096" in webui.hires(painted(large), **HIRES).note
    unharmed()
