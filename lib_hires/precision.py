"""Arithmetic in the precision of its tensors, whatever mode the host samples in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_AUTOCAST_DEVICES = ("cuda", "cpu", "xpu")  # elsewhere no host samples under autocast, and older torch refuses to ask


def working_dtype(x: Tensor) -> torch.dtype:
    """Sums over many cells or tokens are made in float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Hosts sample under autocast, which would do a float32 matrix product in half precision."""
    if x.device.type in _AUTOCAST_DEVICES:
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
