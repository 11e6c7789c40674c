"""Make the LDM UNet accept any latent size, the way A1111 does.

LDM's Upsample always doubles, so at odd sizes a map can be one cell larger than the skip it is joined with, and the
plain UNet fails. A1111 replaces the `th` name in that module so that `th.cat` resizes the map to the skip (nearest).
The bench does the same, in its own words, so that an odd size means the same thing here and there.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _TorchWithFittingCat:
    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def cat(tensors: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if len(tensors) == 2:
            h, skip = tensors
            if h.shape[-2:] != skip.shape[-2:]:
                tensors = [F.interpolate(h, size=skip.shape[-2:], mode="nearest"), skip]
        return torch.cat(tensors, *args, **kwargs)


def install() -> None:
    """Idempotent. Call after lib_hires.hosts.bench.ldm_import.import_ldm()."""
    module: Any = importlib.import_module("ldm.modules.diffusionmodules.openaimodel")
    if not isinstance(module.th, _TorchWithFittingCat):
        module.th = _TorchWithFittingCat()
