"""Inpainting masks in a WebUI: kept grey, replaced in each call, at the end of a run and in the finished picture.

The hosts' denoisers carry `nmask` (1 = repaint), `mask` (1 - nmask) and the clean `init_latent`. While a call lasts
these are replaced by what the patches at `MaskBlend` ask for, so the host blends by itself, where and as often as it
does. Two of its habits are mended meanwhile, as a cell that wakes late must find a latent of the right noise level:

* A1111's DDIM family blends the noisy latent before the call with the clean `init_latent`. It gets that latent
  at the call's noise level, with the noise that the pass began with.
* Denoisers that return eps (the DDIM family in every host) leave what they return as it is. A held cell gets the eps
  that leads the sampler's own latent back to the picture, which is the x0 blend of the other samplers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from lib_hires.hosts import page_mask
from lib_hires.hosts.instance import instance_attribute
from lib_hires.hosts.level import Level
from lib_hires.run import Call, Start
from lib_hires.sites import MaskBlend

_HOSTS_OWN = "hires_plus_hosts_own_mask"  # on p while its masks are kept grey: its mask_round and image_mask


def keep_grey(p: Any) -> None:
    """Before the host makes the masks of p (in `process`): no rounding to black and white."""
    if hasattr(p, "mask_round") and not hasattr(p, _HOSTS_OWN):
        setattr(p, _HOSTS_OWN, (p.mask_round, p.image_mask))
        p.mask_round = False
        p.image_mask = page_mask.unrounded(p.image_mask) or p.image_mask


def restore_rounding(p: Any) -> None:
    """After the host made its masks. Copies of p carry the mark with them, so each restores its own."""
    if hasattr(p, _HOSTS_OWN):
        p.mask_round, p.image_mask = getattr(p, _HOSTS_OWN)
        delattr(p, _HOSTS_OWN)


def repaint_mask(p: Any) -> Tensor | None:
    """The mask [1, C, h, w] of p, 1 = repaint; None where it has none."""
    nmask = getattr(p, "nmask", None)
    if nmask is None or getattr(p, "mask", None) is None:
        return None
    return nmask if nmask.ndim == 4 else nmask[None]


class MaskedCall:
    """One call with the masks in force, at the sampler's own noisy latent x [B, C, h, w] in the host's scaling."""

    def __init__(self, denoiser: Any, nmask: Tensor, x: Tensor, level: Level, start: Start | None) -> None:
        self._denoiser, self._nmask = denoiser, nmask
        self._x, self._level, self._start = x, level, start
        self._clean = denoiser.init_latent
        self._seen: tuple[Tensor, float] | None = None

    def see(self, params: Any) -> None:
        """The noisy latent that the model gets, from the host's callback after its blend."""
        self._seen = (params.x, float(params.sigma[0]))

    @contextmanager
    def open(self) -> Iterator[None]:
        """The denoiser's masks, replaced until the call ends."""
        with ExitStack() as stack:
            stack.enter_context(instance_attribute(self._denoiser, "nmask", self._nmask))
            stack.enter_context(instance_attribute(self._denoiser, "mask", 1 - self._nmask))
            if self._blends_clean and self._start is not None:
                noisy = self._noised(self._clean, self._start.noise)
                stack.enter_context(instance_attribute(self._denoiser, "init_latent", noisy))
            yield

    def finish(self, out: Tensor) -> Tensor:
        """What the sampler gets for what the denoiser returned: x0 as it is, eps with held cells led to the picture."""
        if not self._level.returns_eps:
            return out
        held = self._eps_of_held()
        # CFG++ takes its direction from the uncond eps, which the host keeps beside
        if getattr(self._denoiser, "last_noise_uncond", None) is not None:
            self._denoiser.last_noise_uncond = self._mixed(self._denoiser.last_noise_uncond, held)
        return self._mixed(out, held) if self._blends_clean else self._of_own_latent(out)

    @property
    def _blends_clean(self) -> bool:
        """Whether the host blends only before the model, with a clean latent: A1111's timestep samplers."""
        return bool(getattr(self._denoiser, "mask_before_denoising", False))

    def _mixed(self, eps: Tensor, held: Tensor) -> Tensor:
        return (eps * self._nmask + held * (1 - self._nmask)).to(eps.dtype)

    def _eps_of_held(self) -> Tensor:
        """What joins m eps, weighted by 1 - m, so that the sampler's own x comes to x0 = m x0(y) + (1 - m) picture.

        y = m x + (1 - m) n is what the model saw, n the picture at this noise level, all in VE scaling. Then
        (x - x0) / sigma = m eps + (1 - m) (x - picture + m (x - n)) / sigma.
        """
        own, sigma = self._x.float() * self._level.factor, self._level.sigma
        held = own - self._clean.float()
        if self._blends_clean and self._start is not None:
            held = held + self._nmask * (held - sigma * self._start.noise.to(held))
        return held / sigma

    def _of_own_latent(self, eps: Tensor) -> Tensor:
        """eps for the sampler's own latent. Forge counts it from the latent that it blended with fresh noise: the held
        cells of the sampler would keep the noise that they began with, to the end."""
        if self._seen is None:
            return eps
        blended, sigma = self._seen
        own = self._x * (1 + sigma**2) ** 0.5
        return (eps + (own - blended) / sigma).to(eps.dtype) if blended.shape == own.shape else eps

    def _noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """The picture at this call's noise level, in the host's scaling."""
        noisy = clean.float() + self._level.sigma * noise.to(clean.device).float()
        return (noisy / self._level.factor).to(clean.dtype)


def masked_call(
    denoiser: Any, patches: Sequence[MaskBlend], x: Tensor, call: Call, level: Level, start: Start | None
) -> MaskedCall | None:
    """The masks in force in a call; None where they are the host's own."""
    whole = denoiser.nmask
    if not patches or whole is None or denoiser.mask is None:
        return None
    given = whole if whole.ndim == 4 else whole[None]
    mask = given
    for patch in patches:
        mask = patch.in_force(mask, call)
    if mask is given:
        return None
    return MaskedCall(denoiser, mask if whole.ndim == 4 else mask[0], x, level, start)


def blend_at_end(patches: Sequence[MaskBlend], blend: Any) -> None:
    """The host's last blend in latent space (its MaskBlendArgs). Cells of mask 0 are the picture's, bit for bit."""
    given = mask = blend.nmask
    for patch in patches:
        mask = patch.at_end(mask)
    if mask is not given:
        mixed = blend.current_latent * mask + blend.init_latent * (1 - mask)
        blend.blended_latent = torch.where(mask > 0, mixed, blend.init_latent.to(mixed.dtype))


def show_result(patches: Sequence[MaskBlend], p: Any, overlay: Any) -> None:
    """The original pixels that the host lays over the result (its PostProcessMaskOverlayArgs): less of them, where the
    patches say so. For a whole picture the host shows min(1, 2 mask) of the new one, for "Only masked" mask itself."""
    if not patches or overlay.overlay_image is None or overlay.mask_for_overlay is None:
        return
    usual = torch.from_numpy(np.array(overlay.mask_for_overlay.convert("L"), dtype=np.float32) / 255)
    mask = usual if getattr(p, "paste_to", None) is not None else usual / 2
    shown = usual
    for patch in patches:
        shown = patch.shown(mask, shown)
    if shown is usual:
        return
    opacity = Image.fromarray((shown * 255).round().byte().numpy())
    covered = overlay.overlay_image.copy()
    covered.putalpha(ImageChops.darker(covered.getchannel("A"), ImageChops.invert(opacity).resize(covered.size)))
    overlay.mask_for_overlay, overlay.overlay_image = opacity, covered
