"""Picture files in requests: what they show becomes a map, and no file fails a request."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib_hires.painted_map import WHITE, decode, encode
from lib_hires.request import read_request
from lib_hires.techniques.hires.iterative_mixing import PAINTED
from lib_hires.uploaded_map import as_map


def half(width=64, height=32, mode="L"):
    """White on the left half."""
    picture = Image.new("L", (width, height))
    picture.paste(255, (0, 0, width // 2, height))
    return picture.convert(mode)


def sent(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def png_of_size(width, height):
    """A header that promises a size, and nothing behind it."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(b"")]
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(framed)).decode()


def asked(painting):
    return read_request([{"iterative_mixing": {"detail": PAINTED, "painting": painting}}])


LEFT = np.repeat([[WHITE, 0]], 32, axis=1).repeat(32, axis=0)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", " \n"])
def test_a_png_is_the_map_that_it_shows(mode, prefix):
    generation = asked(prefix + sent(half(mode=mode)))
    assert not generation.notes
    assert np.array_equal(decode(generation.selection["iterative_mixing"].painting), LEFT)


def test_a_jpeg_is_read_and_lies_as_the_camera_says():
    turned = half(32, 64).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert np.array_equal(decode(as_map(sent(half(32, 64), "JPEG"))), np.repeat([[15] * 16 + [0] * 16], 64, axis=0))
    assert np.array_equal(decode(as_map(sent(turned, "JPEG", exif=exif))), decode(as_map(sent(half(32, 64), "JPEG"))))


def test_16_bits_and_transparency():
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.array_equal(decode(as_map(sent(deep))), [[0, 8, 15]])
    clear = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    clear.putpixel((1, 0), (255, 255, 255, 128))
    assert np.array_equal(decode(as_map(sent(clear))), [[0, 8]])


@pytest.mark.parametrize(
    ("size", "cells"), [((640, 480), (64, 48)), ((3000, 2), (64, 1)), ((5, 9), (5, 9)), ((1, 640), (1, 64))]
)
def test_large_pictures_shrink_to_the_longest_side_and_small_ones_stay(size, cells):
    assert decode(as_map(sent(Image.new("L", size, 255)))).shape == cells[::-1]


BAD = {
    "not base64": ("data:image/png;base64,####", ["not base64"]),
    "an empty address": ("data:", ["not a whole PNG or JPEG"]),
    "a cut picture": (sent(half(640, 480))[: 4 * 60], ["not a whole PNG or JPEG"]),
    "another format": ("data:image/gif;base64," + sent(half(), "GIF"), ["not a whole PNG or JPEG"]),
    "too many pixels": (png_of_size(4097, 4097), ["more pixels than 4096x4096"]),
    "a bomb": (png_of_size(60000, 60000), ["more pixels than 4096x4096"]),
    "a long text": ("iVBORw0KGgo" + "A" * (33 * 2**20), ["longer than 32 MiB"]),
    "a file name": ("/etc/hostname.png", ["not a painted map", "'/etc/hostname.png'"]),
    "an address": ("http://127.0.0.1/a.png", ["not a painted map"]),
    "a number": (5, ["5 is not text"]),
    "a list": (["x"], ["is not text"]),
    "a map of the wrong length": (encode(np.zeros((4, 4), int)).replace("4x4", "9x9"), ["41 bytes"]),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_used_is_told_and_only_switches_off(case):
    value, words = BAD[case]
    generation = asked(value)
    assert not generation.selection
    (note,) = generation.notes
    assert len(note) <= 400
    for word in ["Iterative mixing is off: Painted map = ", *words]:
        assert word in note
    assert isinstance(value, (int, list)) or "at most 64x64 cells" in note or "bytes" in note


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"]))
def test_any_bytes_are_a_note(data, head):
    generation = asked("data:image/png;base64," + base64.b64encode(head + data).decode())
    assert not generation.selection and len(generation.notes) == 1


def test_a_value_without_a_note_passes_as_it_is():
    for value in ("", "2x1.abc", 3, None, ["data:"]):
        assert as_map(value) is value
