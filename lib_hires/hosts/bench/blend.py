"""How the bench inpaints: the blends that hosts do in latent space, with the patches at `MaskBlend` between.

* HARD: the mask is rounded to black and white, as WebUIs do by default. A technique that reads grey gets it soft.
* SOFT: the soft mask itself, in every call and at the end.
* SOFT_INPAINTING: what the hosts' built-in Soft Inpainting documents, at its defaults. In a call at sigma the mask is
  m^(0.5 sigma); the latents are mixed by it, and the mix gets the length (per cell, over channels) that their lengths
  have as a power mean of exponent 4. At the end the sampler's latent is taken as it is. Its composite in pixels is not
  modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_hires.run import Call
from lib_hires.sites import MaskBlend

HARD, SOFT, SOFT_INPAINTING = "hard mask", "plain soft mask", "soft inpainting"

_SCHEDULE_BIAS, _PRESERVATION, _CONTRAST = 1.0, 0.5, 4.0


@dataclass(frozen=True)
class Inpainting:
    """A run's mask [B or 1, 1, h, w], 1 = repaint, and the clean latent [B, C, h, w] that it keeps."""

    mask: Tensor
    picture: Tensor
    kind: str = HARD

    def in_call(self, denoised: Tensor, call: Call, patches: Sequence[MaskBlend]) -> Tensor:
        """The denoised latent of one call, blended."""
        mask = self.mask
        for patch in patches:
            mask = patch.in_force(mask, call)
        if self.kind == SOFT_INPAINTING:
            return _soft_inpainting(self.picture, denoised, mask, call.sigma)
        return denoised * mask + self.picture * (1 - mask)

    def at_end(self, latent: Tensor, patches: Sequence[MaskBlend]) -> Tensor:
        """The run's result, blended. Cells of mask 0 are the picture's, bit for bit."""
        if self.kind == SOFT_INPAINTING:
            return latent
        mask = self.mask
        for patch in patches:
            mask = patch.at_end(mask)
        return torch.where(mask > 0, latent * mask + self.picture * (1 - mask), self.picture)


def latent_mask(mask: Tensor, size: tuple[int, int], rounded: bool) -> Tensor:
    """A mask in pixels [B, 1, H, W] at latent size: means over cells."""
    small = F.interpolate(mask.float(), size=size, mode="area")
    return small.round() if rounded else small


def _soft_inpainting(picture: Tensor, denoised: Tensor, mask: Tensor, sigma: float) -> Tensor:
    share = mask ** (sigma**_SCHEDULE_BIAS * _PRESERVATION)
    mixed = picture * (1 - share) + denoised * share
    length = (_length(picture) ** _CONTRAST * (1 - share) + _length(denoised) ** _CONTRAST * share) ** (1 / _CONTRAST)
    return mixed * length / (_length(mixed) + 1e-5)


def _length(latent: Tensor) -> Tensor:
    return latent.norm(dim=1, keepdim=True)
