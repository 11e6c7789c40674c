"""Import Stability's `ldm` package without its training dependencies."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import torch


def stub_lightning() -> None:
    """Stand in for pytorch_lightning, of which `ldm` needs only a base class, unless the real one is installed."""
    name = "pytorch_lightning"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    module = types.ModuleType(name)
    module.LightningModule = torch.nn.Module  # type: ignore[attr-defined]
    # Libraries probe optional packages with find_spec, which rejects a module without a spec.
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    sys.modules[name] = module


def import_ldm() -> types.SimpleNamespace:
    """Return the real `UNetModel`, `AutoencoderKL` and attention classes of the `ldm` package by name."""
    stub_lightning()
    attention: Any = importlib.import_module("ldm.modules.attention")
    unet: Any = importlib.import_module("ldm.modules.diffusionmodules.openaimodel")
    autoencoder: Any = importlib.import_module("ldm.models.autoencoder")
    return types.SimpleNamespace(
        UNetModel=unet.UNetModel,
        AutoencoderKL=autoencoder.AutoencoderKL,
        CrossAttention=attention.CrossAttention,
        BasicTransformerBlock=attention.BasicTransformerBlock,
        SpatialTransformer=attention.SpatialTransformer,
    )
