"""Where a picture has detail: a soft map that lets techniques act differently over the picture."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from lib_hires.blur import gaussian_blur
from lib_hires.precision import working_dtype

_FINE = 1.0  # cells; what a blur of this sigma takes away counts as detail
_PLAIN, _DETAILED = 0.1, 0.9  # quantiles of local energy that become 0 and 1
_SMALLEST_SPREAD = 0.05  # of the highest: a picture with the same detail everywhere gets no map of its rounding errors
_SMALLEST_STRENGTH = 2e-3  # nor does one without any detail


def detail_map(latent: Tensor, softness: float) -> Tensor:
    """0 where a clean latent [B, C, h, w] is plain, 1 where it is full of detail; [B, 1, h, w], float32 at least.

    The root of the local energy of what a small blur removes, averaged over channels and over `softness` cells around
    (the width of the map's soft edges), between its lowest and highest tenth in the same picture.
    """
    z = latent.to(working_dtype(latent))
    fine = z - gaussian_blur(z, _FINE)
    energy = gaussian_blur(fine.square().mean(dim=1, keepdim=True), max(softness, _FINE))
    strength = energy.clamp(min=0).sqrt()
    low, high = (torch.quantile(strength.flatten(1), q, dim=1)[:, None, None, None] for q in (_PLAIN, _DETAILED))
    smallest = _SMALLEST_SPREAD * high.clamp(min=_SMALLEST_STRENGTH)
    return ((strength - low) / torch.maximum(high - low, smallest)).clamp(0, 1)


Mask = TypeVar("Mask", float, Tensor)


def between(outside: float, inside: float, mask: Mask) -> Mask:
    """A value for each of a mask: exactly `outside` at 0, exactly `inside` at 1."""
    return outside * (1 - mask) + inside * mask
