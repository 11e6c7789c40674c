"""Fewer tokens of a map: every n-th one, or pooled, or something between. Tokens are [B, h*w, C], row major."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_hires.run import Size

AVG_1D, MAX_1D, AVG_2D, MAX_2D = "1D_AVG", "1D_MAX", "2D_AVG", "2D_MAX"
MODES = (AVG_2D, MAX_2D, AVG_1D, MAX_1D)
_ONE_DIMENSIONAL = (AVG_1D, MAX_1D)
_MAX = (MAX_1D, MAX_2D)


def steps(rate: float, size: Size) -> Size:
    """Rows and columns per kept token, for about one of `rate` tokens: ceil(sqrt(rate)) rows, the rest columns."""
    rows = min(max(math.ceil(math.sqrt(max(rate, 0.0))), 1), size[0])
    return rows, min(max(math.ceil(rate / rows), 1), size[1])


@dataclass(frozen=True)
class Reduction:
    """One token for every `stride` of a map, or the pool of `kernel` tokens from there on.

    The 1D modes see the tokens of the map as one line. As in the reference, only whole kernels count: tokens that are
    left over at the bottom or the right become no key.
    """

    mode: str
    size: Size
    kernel: Size
    stride: Size

    @classmethod
    def of(cls, mode: str, size: Size, kernel_rate: float, stride_rate: float) -> Reduction:
        """Pools of about `kernel_rate` tokens, one for every `stride_rate` of the map."""
        seen = (1, size[0] * size[1]) if mode in _ONE_DIMENSIONAL else size
        return cls(mode, seen, steps(kernel_rate, seen), steps(stride_rate, seen))

    @property
    def grid(self) -> Size:
        rows, columns = (
            (n - kernel) // stride + 1 for n, kernel, stride in zip(self.size, self.kernel, self.stride, strict=True)
        )
        return rows, columns

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]

    def __call__(self, tokens: Tensor, blend: float) -> Tensor:
        """[B, h*w, C] -> [B, count, C]: samples at blend 0, pools at blend 1, linear between."""
        samples = self._samples(tokens)
        if blend == 0 or self.kernel == (1, 1):
            return samples
        pools = self._pools(tokens)
        return pools if blend == 1 else torch.lerp(samples, pools, blend)

    def _samples(self, tokens: Tensor) -> Tensor:
        (rows, columns), (down, right) = self.grid, self.stride
        grid = tokens.unflatten(1, self.size)[:, : rows * down : down, : columns * right : right]
        return grid.flatten(1, 2)

    def _pools(self, tokens: Tensor) -> Tensor:
        pool = F.max_pool2d if self.mode in _MAX else F.avg_pool2d
        maps = tokens.unflatten(1, self.size).permute(0, 3, 1, 2)
        return pool(maps, self.kernel, self.stride).permute(0, 2, 3, 1).flatten(1, 2)


def reduced(key: Tensor, value: Tensor, reduction: Reduction, k_blend: float, v_blend: float) -> tuple[Tensor, Tensor]:
    """Both sources reduced; one tensor where both are made of the same tokens in the same way."""
    keys = reduction(key, k_blend)
    return keys, keys if value is key and v_blend == k_blend else reduction(value, v_blend)
