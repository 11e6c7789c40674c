"""Resizing of feature maps and latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_hires.run import Size

BICUBIC, BILINEAR, NEAREST_EXACT, AREA, BISLERP = "bicubic", "bilinear", "nearest-exact", "area", "bislerp"
METHODS = (BICUBIC, BILINEAR, NEAREST_EXACT, AREA, BISLERP)

_PARALLEL = 1 - 1e-5  # cosine beyond which two vectors count as parallel or opposed


def map_size(h: Tensor) -> Size:
    """(height, width) of a map [..., h, w]."""
    return int(h.shape[-2]), int(h.shape[-1])


def resize(x: Tensor, size: Size, method: str, antialias: bool = False) -> Tensor:
    """Resize maps [B, C, h, w] to `size` (height, width), in the dtype of x.

    `antialias` low-passes before shrinking (bicubic and bilinear only). A map that has the size already is returned
    as it is.
    """
    if map_size(x) == size:
        return x
    if method == BISLERP:
        return _bislerp(x, size)
    if antialias and method in (BICUBIC, BILINEAR):
        return _antialiased(x, size, method)
    return F.interpolate(x, size=size, mode=method)


def _antialiased(x: Tensor, size: Size, method: str) -> Tensor:
    if size[1] == 1 and size[0] > 1:
        # torch (2.13, CPU) passes over rows where the result is a single column; a single row it gets right
        return _antialiased(x.transpose(-1, -2), (1, size[0]), method).transpose(-1, -2)
    # the antialiased kernels know float32 on every device, half precision only on some
    return F.interpolate(x.float(), size=size, mode=method, antialias=True).to(x.dtype)


def _bislerp(x: Tensor, size: Size) -> Tensor:
    """Channel vectors interpolated on the sphere and their lengths linearly, along the width, then the height."""
    wide = _slerp_last_axis(x.float(), size[1])
    return _slerp_last_axis(wide.transpose(-1, -2), size[0]).transpose(-1, -2).to(x.dtype)


def _slerp_last_axis(x: Tensor, length: int) -> Tensor:
    old = x.shape[-1]
    position = (torch.arange(length, device=x.device, dtype=x.dtype) + 0.5) * (old / length) - 0.5
    position = position.clamp(0, old - 1)
    left = position.floor()
    right = (left + 1).clamp(max=old - 1)
    return _slerp(x[..., left.long()], x[..., right.long()], position - left)


def _slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation of the vectors along dim 1 (Shoemake 1985), lengths interpolated linearly."""
    length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    unit_a = torch.where(length_a > 0, a / length_a, 0.0)
    unit_b = torch.where(length_b > 0, b / length_b, 0.0)
    cosine = (unit_a * unit_b).sum(dim=1, keepdim=True)
    angle = cosine.clamp(-1, 1).acos()
    arc = (((1 - t) * angle).sin() * unit_a + (t * angle).sin() * unit_b) / angle.sin()
    result = arc * (length_a * (1 - t) + length_b * t)
    result = torch.where(cosine > _PARALLEL, a, result)
    return torch.where(cosine < -_PARALLEL, a * (1 - t) + b * t, result)


def scaled_length(length: int, scale: float, multiple: int = 1) -> int:
    """Cells along one side after scaling, half to even, as a multiple of `multiple` and at least one of it.

    Deeper levels halve the map: a side that stays divisible comes back from them without a cell too many or too few.
    A shrink never enlarges, whatever the rounding says, and scale 1 keeps the side as it is.
    """
    if scale == 1:
        return length
    scaled = max(1, round(length * scale / multiple)) * multiple
    return min(scaled, length) if scale < 1 else scaled
