"""A small grey picture as text: a map that a user paints travels in infotext, presets and requests without a file.

"48x64.eJx..." is width x height, at most 64 cells each, and the grey levels 0 (black) to 15 (white) of the rows from
the top: two to a byte, the left one in the high half, deflated (zlib), in URL-safe base64 without padding. None of its
characters needs quotes in infotext. The empty text is no map. The browser has javascript/hires_plus_map.js for it.
"""

from __future__ import annotations

import base64
import re
import zlib

import numpy as np
import torch
from torch import Tensor

from lib_hires.resize import BILINEAR, resize
from lib_hires.run import Size

LONGEST_SIDE = 64
WHITE = 15
ACCEPTS = f"a painted map of at most {LONGEST_SIDE}x{LONGEST_SIDE} cells"

_FORM = re.compile(r"(\d{1,9})x(\d{1,9})\.([A-Za-z0-9_-]+)", re.ASCII)
_LONGEST_TEXT = 4096  # the largest map takes 2048 bytes where nothing can be deflated


def encode(levels: np.ndarray) -> str:
    """The text of grey levels [h, w], whole numbers 0 to 15."""
    height, width = levels.shape
    flat = np.append(levels.astype(np.uint8).ravel(), np.zeros(levels.size % 2, np.uint8))
    packed = (flat[::2] << 4 | flat[1::2]).tobytes()
    data = base64.urlsafe_b64encode(zlib.compress(packed, 9)).decode().rstrip("=")
    return f"{width}x{height}.{data}"


def decode(text: str) -> np.ndarray:
    """The grey levels [h, w] of a text. Raises ValueError with what is wrong; `text` may come from anywhere."""
    matched = _FORM.fullmatch(text) if len(text) <= _LONGEST_TEXT else None
    if matched is None:
        raise ValueError(f"this is not {ACCEPTS}, such as {encode(np.array([[0, WHITE]]))}")
    width, height = int(matched[1]), int(matched[2])
    if not (1 <= width <= LONGEST_SIDE and 1 <= height <= LONGEST_SIDE):
        raise ValueError(f"{width}x{height} is not a size of 1x1 to {LONGEST_SIDE}x{LONGEST_SIDE} cells")
    cells = width * height
    packed = _inflated(matched[3], (cells + 1) // 2)
    return np.stack([packed >> 4, packed & WHITE], axis=1).ravel()[:cells].reshape(height, width)


def check(text: str) -> None:
    """Raises ValueError unless this is a map or empty."""
    if text:
        decode(text)


def grey_range(text: str) -> tuple[float, float]:
    """The darkest and the lightest grey of a map, 0 is black and 1 white."""
    levels = decode(text)
    return int(levels.min()) / WHITE, int(levels.max()) / WHITE


def stretched(text: str, size: Size) -> Tensor:
    """A map over a latent of `size` (height, width), whatever its own proportions: [1, 1, h, w] in 0..1, float32."""
    grey = torch.from_numpy(decode(text)).float()[None, None] / WHITE
    return resize(grey, size, BILINEAR, antialias=True).clamp(0, 1)


def _inflated(data: str, size: int) -> np.ndarray:
    try:
        deflated = base64.urlsafe_b64decode(data + "=" * (-len(data) % 4))
        inflater = zlib.decompressobj()
        # never more than one byte too many, whatever the data would unfold to
        packed = inflater.decompress(deflated, size + 1)
    except (ValueError, zlib.error):
        raise ValueError("the map's data is damaged") from None
    if len(packed) != size or not inflater.eof or inflater.unused_data:
        raise ValueError(f"the map's data is not the {size} bytes that a map of its size has")
    return np.frombuffer(packed, np.uint8)
