"""What a hires pass did to a picture: kept what the small one shows, drew what was asked, grew detail and no grain.

Pictures are [H, W, 3] uint8. Detail is judged against true renders of the same captions at the same size, which a
procedural scene has at any resolution.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from lib_hires.hosts.bench.counter import blobs, count_holes, hue_saturation_chroma, saturated_mask
from lib_hires.hosts.bench.scenes import COLOURS, render, sample_scene

# Half way between the shares of its bounding box that a shape fills: diamond 1/2, disc pi/4, square 1.
_DIAMOND_DISC, _DISC_SQUARE = (1 / 2 + math.pi / 4) / 2, (math.pi / 4 + 1) / 2
_MEDIAN_OF_NORMAL = 0.6745  # of the size of a value with standard deviation 1
_LUMA = np.array([0.299, 0.587, 0.114])
_BINS = 32
_HIGH_BAND = 0.25  # cycles per pixel: what a picture of half the size cannot hold
_FLOOR = 1e-12  # power of a picture without any; eight bits round at about 1e-6
_RENDERS = 4  # true renders per caption
_RENDER_SEED = 90_000


def shown_attributes(picture: np.ndarray) -> tuple[str, str] | None:
    """(shape, colour) of the largest object, None where there is none."""
    found = blobs(saturated_mask(picture))
    if not found:
        return None
    return _shape(found[0]), _colour(picture, found[0])


def _shape(blob: np.ndarray) -> str:
    if count_holes(blob):
        return "ring"
    rows, columns = (np.flatnonzero(blob.any(axis=axis)) for axis in (1, 0))
    filled = blob.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    return "diamond" if filled < _DIAMOND_DISC else "disc" if filled < _DISC_SQUARE else "square"


def _colour(picture: np.ndarray, blob: np.ndarray) -> str:
    """The colour whose hue is nearest to the mean hue of the object's saturated pixels."""
    hue = hue_saturation_chroma(picture)[0][blob & saturated_mask(picture)]
    mean = np.angle(np.exp(2j * np.pi * hue).mean()) / (2 * np.pi)
    return min(COLOURS, key=lambda name: abs((mean - colorsys.rgb_to_hsv(*COLOURS[name])[0] + 0.5) % 1 - 0.5))


def cross_scale_psnr(picture: np.ndarray, base: np.ndarray) -> float:
    """PSNR in dB of a large picture, averaged down to the size of the small one that it grew from, against that."""
    large = torch.from_numpy(picture / 255).permute(2, 0, 1)[None]
    small = F.interpolate(large, size=base.shape[:2], mode="area")[0].permute(1, 2, 0).numpy()
    error = float(np.square(small - base / 255).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def grain(picture: np.ndarray) -> float:
    """Noise of a picture's plain areas in grey levels (standard deviation, if it is white).

    The median size of the diagonal Haar details, which edges and stripes hardly move (Donoho and Johnstone 1994).
    """
    height, width = (side // 2 * 2 for side in picture.shape[:2])
    light = picture[:height, :width] @ _LUMA
    diagonal = light[::2, ::2] - light[::2, 1::2] - light[1::2, ::2] + light[1::2, 1::2]
    return float(np.median(np.abs(diagonal)) / 2 / _MEDIAN_OF_NORMAL)


def radial_spectrum(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of `power_spectra`: [_BINS]."""
    return np.mean(power_spectra(pictures), axis=0)


def power_spectra(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Power of luminance per ring of spatial frequency, [pictures, _BINS], from 0 to half a cycle per pixel.

    A Hann window keeps the picture's edges, which do not meet, out of the high frequencies.
    """
    return np.stack([_power(picture) for picture in pictures])


def _power(picture: np.ndarray) -> np.ndarray:
    light = picture @ _LUMA / 255
    window = np.outer(*(np.hanning(n + 2)[1:-1] for n in light.shape))
    power = np.abs(np.fft.fft2((light - light.mean()) * window)) ** 2 / (window**2).sum()
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in light.shape), indexing="ij"))
    ring = (frequency * 2 * _BINS).astype(int)
    within = ring < _BINS  # the corners beyond half a cycle per pixel are left out
    count = np.bincount(ring[within], minlength=_BINS)
    return np.bincount(ring[within], power[within], minlength=_BINS) / np.maximum(count, 1)


def spectrum_distance(spectrum: np.ndarray, true: np.ndarray) -> float:
    """Root mean square over the rings of the difference of two spectra in dB."""
    difference = 10 * np.log10(np.maximum(spectrum, _FLOOR) / np.maximum(true, _FLOOR))
    return float(np.sqrt(np.square(difference).mean()))


def high_band_ratio(spectrum: np.ndarray, true: np.ndarray) -> float:
    """Energy above `_HIGH_BAND` relative to the true one: above 1 is grain or ringing, below 1 blur."""
    rings = (np.arange(_BINS) + 0.5) / (2 * _BINS)
    high = rings > _HIGH_BAND
    return float((spectrum * rings)[high].sum() / max((true * rings)[high].sum(), _FLOOR))  # rings grow with radius


@lru_cache(maxsize=8)
def true_spectrum(captions: Sequence[tuple[str, str]], height: int, width: int) -> np.ndarray:
    """The spectrum of true renders of (shape, colour) captions at a size."""
    scenes = [
        sample_scene(_RENDER_SEED + _RENDERS * index + draw, shape, colour)
        for index, (shape, colour) in enumerate(captions)
        for draw in range(_RENDERS)
    ]
    return radial_spectrum((render(s, height, width).permute(1, 2, 0) * 255).round().byte().numpy() for s in scenes)
