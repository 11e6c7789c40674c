"""Run ldm's UNet the way A1111 runs it, in our own words, so that the bench means the same thing.

* Any latent size: LDM's Upsample always doubles, so at odd sizes a map can be one cell larger than the skip it is
  joined with, and the plain UNet fails. A1111 replaces the name `th` in that module so that `th.cat` resizes the map.
* Attention through torch's scaled_dot_product_attention instead of an explicit softmax over all tokens; also the one
  in the autoencoder, whose matrix of scores would otherwise be most of the memory of a large picture.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_hires.resize import map_size


class _TorchWithFittingCat:
    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def cat(tensors: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if len(tensors) == 2:
            h, skip = tensors
            if map_size(h) != map_size(skip):
                tensors = [F.interpolate(h, size=map_size(skip), mode="nearest"), skip]
        return torch.cat(tensors, *args, **kwargs)


def _attend(self: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """CrossAttention.forward: tokens [B, N, C], context [B, M, D] or None for self-attention."""
    source = x if context is None else context
    q, k, v = (_split_heads(t, self.heads) for t in (self.to_q(x), self.to_k(source), self.to_v(source)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return self.to_out(out.transpose(1, 2).flatten(2))


def _attend_in_autoencoder(self: Any, x: Tensor) -> Tensor:
    """AttnBlock.forward: a map [B, C, h, w], one head of all channels over all cells."""
    h = self.norm(x)
    # contiguous: the fused kernel takes no other layout, and without it the scores are there again
    q, k, v = (layer(h).flatten(2).transpose(1, 2).contiguous().unsqueeze(1) for layer in (self.q, self.k, self.v))
    out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
    projected: Tensor = self.proj_out(out.transpose(1, 2).unflatten(2, x.shape[-2:]))
    return x + projected


def _split_heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def install() -> None:
    """Idempotent. Call after lib_hires.hosts.bench.ldm_import.import_ldm()."""
    unet: Any = importlib.import_module("ldm.modules.diffusionmodules.openaimodel")
    attention: Any = importlib.import_module("ldm.modules.attention")
    autoencoder: Any = importlib.import_module("ldm.modules.diffusionmodules.model")
    if not isinstance(unet.th, _TorchWithFittingCat):
        unet.th = _TorchWithFittingCat()
    attention.CrossAttention.forward = _attend
    autoencoder.AttnBlock.forward = _attend_in_autoencoder
