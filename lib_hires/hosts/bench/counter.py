"""Count the objects in an image of a one-object scene.

Objects are saturated and backgrounds are grey, so a blob of the captioned hue is an object. Duplicates that touch form
one blob: it is split where the distance to its edge has separate peaks with a clear pass between them. All thresholds
come from true renders, mosaics of them and autoencoder reconstructions (tests/bench_model), never from the output of a
technique under test. Sizes are absolute pixels, because duplicates have the size of training objects at any resolution.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from lib_hires.hosts.bench.scenes import COLOURS

MIN_SATURATION = 0.45
MIN_CHROMA = 0.20
HUE_TOLERANCE = 28 / 360
# 0.3 of the smallest training object: a ring of radius 0.17 at 128 px covers about 1170 px.
MIN_OBJECT_PIXELS = 350
# Under half the inner radius (17 px) of the smallest training object, its hole filled.
MIN_PEAK_PIXELS = 8.0
# A pass between two peaks lower than this part of the lower peak separates two objects.
MAX_PASS_RATIO = 0.8
CLOSING_PIXELS = 2
SPLIT_LEVELS = 24
MIN_HOLE_PIXELS = 40


@dataclass(frozen=True)
class CountResult:
    """What the counter saw; areas are fractions of the frame, centres (y, x) fractions of height and width."""

    count: int
    any_colour_count: int
    area: float
    total_area: float
    holes: int
    solidity: float
    centre: tuple[float, float] | None

    @property
    def is_single(self) -> bool:
        """Whether the image shows one object of the captioned hue."""
        return self.count == 1


def hue_saturation_chroma(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue (0..1, red at 0), HSV saturation and chroma of an (H,W,3) uint8 image."""
    red, green, blue = np.moveaxis(image.astype(np.float32) / 255, -1, 0)
    high, low = image.max(axis=-1) / np.float32(255), image.min(axis=-1) / np.float32(255)
    chroma = high - low
    hue = np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi) % 1
    return hue, chroma / np.maximum(high, 1e-3), chroma


def saturated_mask(image: np.ndarray) -> np.ndarray:
    """Pixels of any object, (H,W) bool."""
    _, saturation, chroma = hue_saturation_chroma(image)
    return (saturation > MIN_SATURATION) & (chroma > MIN_CHROMA)


def colour_mask(image: np.ndarray, colour: str) -> np.ndarray:
    """Pixels of an object of the named colour, (H,W) bool."""
    hue, _, _ = hue_saturation_chroma(image)
    wanted = colorsys.rgb_to_hsv(*COLOURS[colour])[0]
    distance = np.abs((hue - wanted + 0.5) % 1 - 0.5)
    return saturated_mask(image) & (distance < HUE_TOLERANCE)


def blobs(mask: np.ndarray) -> list[np.ndarray]:
    """Connected regions of object size, largest first, each an (H,W) bool mask."""
    reach = slice(-CLOSING_PIXELS, CLOSING_PIXELS + 1)
    disc = np.hypot(*np.ogrid[reach, reach]) <= CLOSING_PIXELS
    padded = np.pad(mask, CLOSING_PIXELS)
    closed = ndimage.binary_closing(padded, disc)[CLOSING_PIXELS:-CLOSING_PIXELS, CLOSING_PIXELS:-CLOSING_PIXELS]
    labels, _ = ndimage.label(closed)
    sizes = np.bincount(labels.ravel())[1:]
    chosen = [index for index in np.argsort(-sizes) if sizes[index] >= MIN_OBJECT_PIXELS]
    return [labels == index + 1 for index in chosen]


def depth(blob: np.ndarray) -> np.ndarray:
    """Smoothed distance in pixels to the blob's outer edge, cropped to the blob; holes count as inside."""
    rows, columns = ndimage.find_objects(blob.astype(np.uint8))[0]
    filled = np.pad(ndimage.binary_fill_holes(blob[rows, columns]), 1)
    distance = ndimage.distance_transform_edt(filled)
    return np.where(filled, ndimage.gaussian_filter(distance, 1.0), 0.0)


def count_peaks(height: np.ndarray, level: float = 0.0) -> int:
    """Number of peaks of a height map above `level` that passes lower than `MAX_PASS_RATIO` separate."""
    top = float(height.max())
    for pass_height in np.linspace(level, top * MAX_PASS_RATIO, SPLIT_LEVELS):
        labels, number = ndimage.label(height > pass_height)
        needed = max(MIN_PEAK_PIXELS, pass_height / MAX_PASS_RATIO)
        tops = ndimage.maximum(height, labels, range(1, number + 1)) if number > 1 else []
        parts = [index + 1 for index, peak in enumerate(tops) if peak >= needed]
        if len(parts) > 1:
            return sum(count_peaks(np.where(labels == part, height, 0.0), pass_height) for part in parts)
    return 1


def count_in_mask(mask: np.ndarray) -> int:
    """Number of objects in a mask, touching ones told apart."""
    return sum(count_peaks(depth(blob)) for blob in blobs(mask))


def count_holes(blob: np.ndarray) -> int:
    """Number of holes of visible size in a blob."""
    labels, _ = ndimage.label(ndimage.binary_fill_holes(blob) & ~blob)
    return int((np.bincount(labels.ravel())[1:] >= MIN_HOLE_PIXELS).sum())


def solidity(blob: np.ndarray) -> float:
    """Area of the blob, holes filled, over the area of its convex hull; 1 for a convex shape."""
    filled = ndimage.binary_fill_holes(blob)
    corners = np.argwhere(filled & ~ndimage.binary_erosion(filled))
    # A pixel is a square: hull over its corners, not its centre.
    offsets = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]])
    try:
        hull = ConvexHull((corners[:, None] + offsets).reshape(-1, 2))
    except QhullError:
        return 1.0
    return float(filled.sum() / hull.volume)


def count_objects(image: np.ndarray, colour: str) -> CountResult:
    """Count the objects of the captioned colour, and of any colour, in an (H,W,3) uint8 image."""
    mask = colour_mask(image, colour)
    found = blobs(mask)
    any_colour = count_in_mask(saturated_mask(image))
    if not found:
        return CountResult(0, any_colour, 0.0, float(mask.mean()), 0, 0.0, None)
    main = found[0]
    y, x = ndimage.center_of_mass(main)
    return CountResult(
        count=sum(count_peaks(depth(blob)) for blob in found),
        any_colour_count=any_colour,
        area=float(main.mean()),
        total_area=float(sum(blob.mean() for blob in found)),
        holes=count_holes(main),
        solidity=solidity(main),
        centre=((y + 0.5) / mask.shape[0], (x + 0.5) / mask.shape[1]),
    )


def wilson_interval(errors: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a rate of `errors` in `n` trials."""
    if n == 0:
        return 0.0, 1.0
    rate = errors / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)
