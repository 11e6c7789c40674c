"""A Gaussian blur of token maps [B, h*w, C] along their rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_hires.run import Size


def gaussian(taps: int, sigma: float) -> list[float]:
    """Normalised weights of an odd number of taps, exp(-x^2 / (2 sigma^2))."""
    offsets = torch.arange(taps, dtype=torch.float64) - taps // 2
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    return (weights / weights.sum()).tolist()


def blur(
    tokens: Tensor, size: Size, weights: list[float], *, channels: bool = False, zero_borders: bool = False
) -> Tensor:
    """Blur a map, in float32; `channels` blurs along those too. Borders repeat, or count as zero."""
    axes = (1, 2, 3) if channels else (1, 2)
    grid = tokens.unflatten(1, size).float()
    for axis in axes:
        grid = _blurred_along(axis, grid, weights, zero_borders)
    return grid.flatten(1, 2).to(tokens.dtype)


def _blurred_along(axis: int, grid: Tensor, weights: list[float], zero_borders: bool) -> Tensor:
    length, reach = grid.shape[axis], len(weights) // 2
    out = grid * weights[reach]
    for offset in range(1, reach + 1):
        weight = weights[reach + offset]
        for before, first, last in ((True, 0, max(length - offset, 0)), (False, min(offset, length), length)):
            inside = grid.narrow(axis, first, last - first)
            outside = length - (last - first)
            target = out.narrow(axis, outside if before else 0, last - first)
            target.add_(inside, alpha=weight)
            if not zero_borders:
                border = grid.narrow(axis, 0 if before else length - 1, 1)
                out.narrow(axis, 0 if before else last - first, outside).add_(border, alpha=weight)
    return out
