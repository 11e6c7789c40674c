"""The bench's small latent diffusion model: SD 1.5's topology at a tenth of its width.

This module is the one place that holds the architecture; training, loading and checkpoint assembly all use it.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lib_hires.hosts.bench.ldm_import import import_ldm
from lib_hires.hosts.bench.text import HIDDEN_SIZE, TextEncoder

WEIGHTS_DIR = Path(__file__).parent / "weights"
NATIVE_SIZE = 128
LATENT_FACTOR = 8
TRAIN_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012

# SD 1.5's blocks and attention levels. Its group norms have 32 groups too: at width 32, a channel a group, the network
# cannot see or predict the mean of a latent channel at all, and every picture gets a random tint. Width 64 can; equal
# widths below keep the weights small.
UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 1, 1, 2],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": HIDDEN_SIZE,
    "use_checkpoint": False,
    "legacy": False,
}
# The autoencoder normalises in 32 groups. With one channel a group every channel's mean, and so absolute colour, is
# lost; 64 channels at all levels keep it, and no blocks beside the decoder's obligatory ones make that affordable.
VAE_CONFIG: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 64,
    "ch_mult": [1, 1, 1, 1],
    "num_res_blocks": 0,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def build_unet(config: dict[str, Any] | None = None) -> nn.Module:
    """Build the real `UNetModel`, freshly initialised; its zero-initialised output layers make it return 0."""
    return import_ldm().UNetModel(**(config or UNET_CONFIG))


def build_autoencoder(config: dict[str, Any] | None = None) -> nn.Module:
    """Build the real `AutoencoderKL`, freshly initialised."""
    ldm = import_ldm()
    with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints
        return ldm.AutoencoderKL(ddconfig=config or VAE_CONFIG, embed_dim=4, lossconfig={"target": "torch.nn.Identity"})


def alphas_cumprod() -> Tensor:
    """SD's scaled-linear noise schedule, (1000,) float32."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


class Vae:
    """The autoencoder with images in 0..1 and latents scaled to unit standard deviation."""

    def __init__(self, autoencoder: nn.Module, scale_factor: float):
        self.autoencoder: Any = autoencoder
        self.scale_factor = scale_factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode (B,3,H,W) images in 0..1 to the mean latents (B,4,H/8,W/8)."""
        return self.autoencoder.encode(images * 2 - 1).mode() * self.scale_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B,4,h,w) latents to (B,3,8h,8w) images in 0..1."""
        return (self.autoencoder.decode(latents / self.scale_factor) / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class BenchModels:
    """The trained model, ready for sampling on the CPU in float32."""

    unet: nn.Module
    vae: Vae
    text: TextEncoder
    alphas_cumprod: Tensor
    native_size: int = NATIVE_SIZE


def load_weights(module: nn.Module, path: Path) -> nn.Module:
    """Load half-precision weights into a float32 module and freeze it."""
    module.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return module.eval().requires_grad_(False)


def load_vae(weights_dir: Path = WEIGHTS_DIR) -> Vae:
    """Load the autoencoder alone."""
    scale_factor = json.loads((weights_dir / "config.json").read_text())["scale_factor"]
    return Vae(load_weights(build_autoencoder(), weights_dir / "vae.safetensors"), scale_factor)


def load_models(weights_dir: str | Path = WEIGHTS_DIR) -> BenchModels:
    """Load UNet, autoencoder and text encoder from a weights folder."""
    folder = Path(weights_dir)
    return BenchModels(
        unet=load_weights(build_unet(), folder / "unet.safetensors"),
        vae=load_vae(folder),
        text=TextEncoder(),
        alphas_cumprod=alphas_cumprod(),
    )
