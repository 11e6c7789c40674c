"""What a row of the bench gave: its pictures and what they cost, and what is measured on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lib_hires.hosts.bench.counter import count_objects
from lib_hires.hosts.bench.hires_metrics import (
    cross_scale_psnr,
    grain,
    high_band_ratio,
    power_spectra,
    shown_attributes,
    spectrum_distance,
    true_spectrum,
)
from lib_hires.hosts.bench.scenes import CAPTIONS


def prompt(index: int) -> str:
    """Balanced over all captions; the seed of picture `index` is `index` in every row, so rows are paired."""
    return CAPTIONS[(index * 7) % len(CAPTIONS)]


def attributes(index: int) -> tuple[str, str]:
    """(shape, colour) of the captioned object."""
    colour, shape = prompt(index).split()[-2:]
    return shape, colour


@dataclass(frozen=True)
class Batch:
    """Pictures [B, H, W, 3] uint8 that were drawn together, and what that took."""

    indices: tuple[int, ...]
    pictures: np.ndarray
    seconds: float  # of the processor
    unet_calls: int
    operations: int  # floating-point operations of the UNet; 0 where they were not counted


@dataclass
class Outcome:
    """All batches of a row. `add` them in any order."""

    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    unet_calls: int = 0
    operations_per_picture: float = 0.0

    def add(self, batch: Batch) -> None:
        self.seconds += batch.seconds
        self.unet_calls += batch.unet_calls * len(batch.indices)
        if batch.operations:
            self.operations_per_picture = batch.operations / len(batch.indices)
        for index, picture in zip(batch.indices, batch.pictures, strict=True):
            self.pictures[index] = picture
            self.counts[index] = count_objects(picture, attributes(index)[1]).count

    @property
    def errors(self) -> int:
        return sum(count != 1 for count in self.counts.values())

    @property
    def saturation(self) -> float:
        """Mean of (max - min) / max over the colours of all pixels, as in HSV; black counts as 0."""
        return float(np.mean([_saturation(picture) for picture in self.pictures.values()]))

    @property
    def clipped(self) -> float:
        """Share of pixels with a channel at the end of its range: burnt highlights and drowned shadows."""
        return float(np.mean([((p == 0) | (p == 255)).any(-1).mean() for p in self.pictures.values()]))


def _saturation(picture: np.ndarray) -> float:
    high, low = picture.max(-1).astype(np.float64), picture.min(-1)
    return float(np.divide(high - low, high, out=np.zeros_like(high), where=high > 0).mean())


@dataclass(frozen=True)
class Enlarged:
    """Large pictures beside the small ones of the same prompts and seeds, and true renders of the large size.

    Arrays are per picture, in the order of the indices.
    """

    outcome: Outcome
    small: Outcome

    @cached_property
    def indices(self) -> list[int]:
        return sorted(self.outcome.pictures)

    @property
    def _pictures(self) -> list[np.ndarray]:
        return [self.outcome.pictures[index] for index in self.indices]

    @cached_property
    def wrong(self) -> np.ndarray:
        """[n] bool: not exactly one object."""
        return np.array([self.outcome.counts[index] != 1 for index in self.indices])

    @cached_property
    def right_before(self) -> np.ndarray:
        """[n] bool: the small picture holds one object."""
        return np.array([self.small.counts[index] == 1 for index in self.indices])

    @cached_property
    def drawn_as_asked(self) -> np.ndarray:
        """[n] bool: shape and colour of the largest object are those of the prompt."""
        return np.array([shown_attributes(self.outcome.pictures[index]) == attributes(index) for index in self.indices])

    @cached_property
    def psnr(self) -> np.ndarray:
        """[n] dB against the small picture, at its size."""
        pairs = ((self.outcome.pictures[index], self.small.pictures[index]) for index in self.indices)
        return np.array([cross_scale_psnr(large, small) for large, small in pairs])

    @cached_property
    def grain(self) -> np.ndarray:
        """[n] grey levels."""
        return np.array([grain(picture) for picture in self._pictures])

    @cached_property
    def spectra(self) -> np.ndarray:
        """[n, rings]"""
        return power_spectra(self._pictures)

    @cached_property
    def true(self) -> np.ndarray:
        """[rings]: of true renders of the same captions."""
        height, width = self._pictures[0].shape[:2]
        return true_spectrum(tuple(attributes(index) for index in self.indices), height, width)

    def detail(self, sample: np.ndarray | slice = slice(None)) -> float:
        """dB between the mean spectrum of a sample of the pictures and the true one."""
        return spectrum_distance(self.spectra[sample].mean(0), self.true)

    @property
    def high_band(self) -> float:
        return high_band_ratio(self.spectra.mean(0), self.true)
