"""A picture file in an API request, as the text of a painted map."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from lib_hires.painted_map import LONGEST_SIDE, WHITE, encode

_BEGINNINGS = ("data:", "iVBORw0KGgo", "/9j/")  # a data address; PNG and JPEG in base64
_LONGEST_TEXT = 32 * 2**20
_LONGEST_SIDE = 4096  # pixels of a square picture


class _TooLarge(Exception):
    """More pixels than are worth decoding for a map of a few cells."""


def as_map(raw: Any) -> Any:
    """The map of a PNG or JPEG in base64, with or without "data:image/png;base64," in front; all else as it is.

    White is 1, transparent counts as black. Raises ValueError where it is a picture that cannot be used.
    """
    if not isinstance(raw, str) or not raw.lstrip().startswith(_BEGINNINGS):
        return raw
    return encode(_levels(_grey(_bytes(raw))))


def _bytes(text: str) -> bytes:
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"the picture is longer than {_LONGEST_TEXT // 2**20} MiB")
    data = text.partition(",")[2] if text.lstrip().startswith("data:") else text
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError:
        raise ValueError("the picture is not base64") from None


def _grey(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as opened:
            if opened.width * opened.height > _LONGEST_SIDE**2:
                raise _TooLarge
            return _flat(ImageOps.exif_transpose(opened))
    except (_TooLarge, Image.DecompressionBombError):
        raise ValueError(f"the picture has more pixels than {_LONGEST_SIDE}x{_LONGEST_SIDE}") from None
    except Exception:  # a decoder of files may raise anything at a damaged one
        raise ValueError("the picture is not a whole PNG or JPEG") from None


def _flat(picture: Image.Image) -> Image.Image:
    """Grey on black, without transparency. Pillow cuts off all but the lowest of 16 bits, so these are scaled here."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8))
    opaque = picture.convert("RGBA")
    black = Image.new("RGBA", opaque.size, "black")
    return Image.alpha_composite(black, opaque).convert("L")


def _levels(grey: Image.Image) -> np.ndarray:
    scale = min(1.0, LONGEST_SIDE / max(grey.size))
    size = tuple(max(1, round(side * scale)) for side in grey.size)
    small = np.asarray(grey.resize(size, Image.Resampling.BOX), np.float32)
    return (small * WHITE / 255).round().astype(np.uint8)
