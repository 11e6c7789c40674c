"""Norms, deviations and products of latents, one result per picture, and the scaling of a latent by them.

Sums run in float64: a noisy latent at sigma 4519 is a thousand times the picture in it, and what float32 would lose
there is the picture. A result never depends on the other pictures of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = frozenset({"mps", "privateuseone", "xpu"})  # Metal, DirectML, some Arc: float32 has to do
_NOTHING = 1e-8  # latents are of unit scale: a norm or deviation below this is rounding


def wide(x: Tensor) -> Tensor:
    """`x` in the widest floating type that its device sums in."""
    return x.float() if x.device.type in _WITHOUT_FLOAT64 else x.double()


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over everything but the batch: [B, ...] x [B, ...] -> wide [B, 1, ...]."""
    return _each(torch.dot, a, b)


def norm(x: Tensor) -> Tensor:
    """Euclidean length over everything but the batch: [B, ...] -> wide [B, 1, ...]."""
    return inner(x, x).sqrt()


def channel_norm(x: Tensor) -> Tensor:
    """Euclidean length of each cell's channels: [B, C, h, w] -> wide [B, 1, h, w]."""
    return wide(x).square().sum(dim=1, keepdim=True).sqrt()


def deviation(x: Tensor) -> Tensor:
    """Standard deviation over everything but the batch: [B, ...] -> wide [B, 1, ...]. 0 for a single element."""
    return _each(_deviation, x)


def _deviation(row: Tensor) -> Tensor:
    centred = row - row.mean()
    return (torch.dot(centred, centred) / row.numel()).sqrt()


def _each(measure: Callable[..., Tensor], *latents: Tensor) -> Tensor:
    """A measure of every picture as one wide row, shaped [B, 1, ...]. One at a time: a wide copy of a whole batch
    costs more than the loop, and pictures cannot meet."""
    measures = [measure(*(wide(row).flatten() for row in rows)) for rows in zip(*latents, strict=True)]
    return torch.stack(measures).view(-1, *[1] * (latents[0].ndim - 1))


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator of two sizes, and 1 where the denominator vanishes: nothing there to be scaled."""
    vanishes = denominator <= _NOTHING
    return torch.where(vanishes, 1.0, numerator / denominator.masked_fill(vanishes, 1.0))


def times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor in the type of `x`; a wide factor does not make the latent wide."""
    return x * factor.to(x.dtype)


def scaled_about(x: Tensor, anchor: Tensor | float, change: Tensor) -> Tensor:
    """anchor + (1 + change) (x - anchor), written so that a change of 0 gives back `x` itself."""
    return x + times(x - anchor, change)


def velocity_anchor(x: Tensor, sigma: float) -> Tensor:
    """The x0 whose velocity is 0, for a noisy latent `x` in VE scaling: v is proportional to anchor - x0.

    With alpha = 1 / sqrt(sigma^2 + 1), v = (alpha^2 x - x0) / (alpha sigma) (Salimans & Ho 2022, sec. 4).
    """
    return x / (sigma * sigma + 1)
