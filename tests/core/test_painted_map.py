"""A painted map as text: the same levels back, nothing accepted that is none, and what it becomes over a latent."""

import base64
import zlib

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from lib_hires.painted_map import LONGEST_SIDE, WHITE, check, decode, encode, grey_range, stretched

SIDES = st.integers(1, LONGEST_SIDE)
MAPS = st.tuples(SIDES, SIDES).flatmap(lambda shape: arrays(np.uint8, shape, elements=st.integers(0, WHITE)))


def text_of(size, data):
    return f"{size}.{base64.urlsafe_b64encode(data).decode().rstrip('=')}"


def a_blob(width=64, height=48):
    y, x = np.mgrid[:height, :width]
    return np.where(np.hypot(x - 30, y - 20) < 13, WHITE, 0)


@given(MAPS)
def test_round_trip(levels):
    text = encode(levels)
    assert np.array_equal(decode(text), levels)
    assert not set(text) & set(', :"\n\\'), "it goes into infotext without quotes"
    check(text)


def test_the_form_is_as_written_down():
    """By hand: 3x2 cells, levels 1 2 3 / 4 5 15, packed 12 34 5f."""
    assert np.array_equal(decode(text_of("3x2", zlib.compress(b"\x12\x34\x5f"))), [[1, 2, 3], [4, 5, 15]])
    assert np.array_equal(decode(text_of("1x3", zlib.compress(b"\x12\x30"))), [[1], [2], [3]])


def test_a_blob_is_short_and_the_worst_map_is_accepted():
    assert len(encode(a_blob())) < 200
    noise = np.random.default_rng(0).integers(0, 16, (LONGEST_SIDE, LONGEST_SIDE))
    assert np.array_equal(decode(encode(noise)), noise)


BLOB = encode(a_blob())
BAD = {
    "a word": ("nonsense", "at most 64x64 cells"),
    "no data": ("48x64.", "at most 64x64 cells"),
    "other digits": ("\u0664x4.eJwDAAAAAAE", "at most 64x64 cells"),
    "too wide": (text_of("65x2", zlib.compress(bytes(65))), "65x2 is not a size of 1x1 to 64x64"),
    "no height": (text_of("4x0", zlib.compress(b"")), "4x0 is not a size"),
    "huge": (text_of("999999999x999999999", zlib.compress(b"")), "is not a size"),
    "not deflated": (text_of("2x1", b"\x12\x34\x56"), "damaged"),
    "not base64": ("2x1.A", "damaged"),
    "truncated": (BLOB[:-8], "is not the 1536 bytes"),
    "too short": (text_of("8x8", zlib.compress(bytes(31))), "is not the 32 bytes"),
    "too long": (text_of("8x8", zlib.compress(bytes(33))), "is not the 32 bytes"),
    "without its checksum": (text_of("8x8", zlib.compress(bytes(32))[:-4]), "is not the 32 bytes"),
    "more behind it": (text_of("8x8", zlib.compress(bytes(32)) + b"more"), "is not the 32 bytes"),
    "a bomb": (text_of("8x8", zlib.compress(bytes(2_000_000))), "is not the 32 bytes"),
    "a long text": ("8x8." + "A" * 10_000_000, "at most 64x64 cells"),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_what_is_no_map_is_told(case):
    text, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        check(text)


def test_a_bomb_is_not_unfolded(monkeypatch):
    asked = []

    class Inflater:
        eof, unused_data = True, b""

        def decompress(self, data, most):
            asked.append(most)
            return bytes(most)

    monkeypatch.setattr(zlib, "decompressobj", Inflater)
    with pytest.raises(ValueError):
        decode("8x8.AAAA")
    assert asked == [33]


@given(st.text(max_size=60) | st.from_regex(r"[0-9]{1,3}x[0-9]{1,3}\.[A-Za-z0-9_-]{0,40}", fullmatch=True))
def test_any_text_is_read_or_refused(text):
    try:
        levels = decode(text)
    except ValueError:
        return
    assert levels.max() <= WHITE and max(levels.shape) <= LONGEST_SIDE


@given(MAPS)
def test_the_range_of_its_greys(levels):
    assert grey_range(encode(levels)) == (levels.min() / WHITE, levels.max() / WHITE)


@given(MAPS, st.integers(64, 150), st.integers(64, 150))
def test_over_a_larger_latent_it_is_linear_between_the_centres_of_its_cells(levels, height, width):
    sides = zip((height, width), levels.shape, strict=True)
    rows, columns = ((np.arange(new) + 0.5) * old / new - 0.5 for new, old in sides)
    grid = np.meshgrid(rows, columns, indexing="ij")
    want = ndimage.map_coordinates(levels / WHITE, grid, order=1, mode="nearest")
    got = stretched(encode(levels), (height, width))
    assert got.shape == (1, 1, height, width) and got.dtype == torch.float32
    np.testing.assert_allclose(got[0, 0].numpy(), want, atol=1e-5)


def triangles(old, new):
    """Antialiased linear reduction of one side, [new, old]: a triangle as wide as two of the new cells."""
    reach = old / new
    centres = (np.arange(new)[:, None] + 0.5) * reach
    weights = np.maximum(0, 1 - abs(np.arange(old) + 0.5 - centres) / reach)
    return weights / weights.sum(axis=1, keepdims=True)


@given(MAPS, SIDES, SIDES)
@example(np.arange(16, dtype=np.uint8)[:, None], 9, 1)
def test_over_a_smaller_latent_no_cell_is_passed_over(levels, height, width):
    small = tuple(min(sides) for sides in zip((height, width), levels.shape, strict=True))
    down, across = (triangles(old, new) for old, new in zip(levels.shape, small, strict=True))
    got = stretched(encode(levels), small)[0, 0].numpy()
    np.testing.assert_allclose(got, down @ (levels / WHITE) @ across.T, atol=1e-5)
