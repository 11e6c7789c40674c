"""Gaussian blur of maps at any size and any sigma, as one small matrix product per axis.

Along an axis of length n the blur is out = M x with M [n, n]: row i holds the Gaussian around cell i. Beyond the edge
the map goes on as in a mirror that stands on the edge cell ("reflect": c b a b c), which makes the line periodic with
period 2 (n - 1). The kernel is folded over that period first, so a radius far beyond the map is exact and costs nothing
more, where padding would fail as soon as the radius reaches the size of the map.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lib_hires.precision import full_precision, working_dtype

_LONGEST = 100_000  # taps on one side; beyond, the folded kernel is flat to 1e-5 on every map that can be sampled


def gaussian_blur(x: Tensor, sigma: float, radius: int | None = None) -> Tensor:
    """Blur maps [B, C, h, w] with a Gaussian of standard deviation `sigma`, in cells; same shape and dtype.

    `radius` is the number of taps on each side, ceil(3 sigma) unless given. The kernel is normalised over its taps.
    sigma 0 returns `x` itself. sigma infinity is the mean over the map, which is not quite the limit of the mirrored
    blur: there the edge cells, which the mirror does not repeat, count half. Raises ValueError for a negative sigma.
    """
    if not sigma >= 0:
        raise ValueError(f"a blur needs a sigma of at least 0, not {sigma}")
    if sigma == 0:
        return x
    if math.isinf(sigma):
        return x.mean(dim=(-2, -1), keepdim=True, dtype=working_dtype(x)).to(x.dtype).expand_as(x)
    if radius is None:
        radius = math.ceil(min(3 * sigma, _LONGEST))
    dtype = working_dtype(x)
    rows, columns = (_matrix(n, sigma, radius).to(dtype).to(x.device) for n in x.shape[-2:])
    with full_precision(x):
        return (rows @ x.to(dtype) @ columns.T).to(x.dtype)


@lru_cache(maxsize=32)
def _matrix(n: int, sigma: float, radius: int) -> Tensor:
    """The blur of a line of n cells as a matrix [n, n], float64, each row with sum 1."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    period = 2 * (n - 1)
    folded = _folded_kernel(period, sigma, radius)
    cells = np.arange(n)
    distance = cells[None, :] - cells[:, None]
    matrix = folded[distance % period]
    inner = slice(1, n - 1)  # every cell but the two edges has a twin in the mirror
    matrix[:, inner] += folded[(-cells[None, inner] - cells[:, None]) % period]
    return torch.from_numpy(matrix)


def _folded_kernel(period: int, sigma: float, radius: int) -> np.ndarray:
    """exp(-k^2 / (2 sigma^2)) for |k| <= radius, normalised, and summed over all k that are equal modulo `period`."""
    taps = np.arange(-radius, radius + 1)
    with np.errstate(over="ignore"):  # a tiny sigma: the neighbours' weight is exp(-infinity) = 0
        weights = np.exp(-0.5 * np.square(taps / sigma))
    return np.bincount(taps % period, weights / weights.sum(), minlength=period)
