"""The low frequencies of a latent: what a coarser picture of the same scene would hold."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from lib_hires.blur import gaussian_blur
from lib_hires.precision import working_dtype

_SIGMA_PER_CELL = 0.3  # a Gaussian of 0.3 b cells halves the power where the mean of b cells does


def haar_low(x: Tensor, level: int) -> Tensor:
    """The Haar low band of maps [B, C, h, w] after `level` halvings, brought back to full size; same dtype.

    That is, exactly, the mean over each block of 2^level by 2^level cells, in place of each of its cells. Blocks that
    the lower or right edge cuts are averaged over the cells that they have, so any size will do.
    """
    if level == 0:
        return x
    height, width = x.shape[-2:]
    block = 2**level
    means = F.avg_pool2d(x.to(working_dtype(x)), _within(block, height, width), ceil_mode=True)
    rows, columns = _within(block, height, width)
    spread = means.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return spread[..., :height, :width].to(x.dtype)


def _within(block: int, height: int, width: int) -> tuple[int, int]:
    return min(block, height), min(block, width)  # a block beyond the map is the whole map


def haar_level(cells: float) -> int:
    """The level whose blocks come nearest to `cells` cells a side, by ratio; 1 at least, where it changes something."""
    return max(1, round(math.log2(max(cells, 1.0))))


def gaussian_low(x: Tensor, cells: float) -> Tensor:
    """A Gaussian blur of maps [B, C, h, w] that passes about as much as the mean of blocks of `cells` cells a side."""
    return gaussian_blur(x, _SIGMA_PER_CELL * cells)
