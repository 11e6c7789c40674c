"""Unsampling: the reference noised to any level of a run, made when it is asked for and never kept.

With z the clean reference, n one unit noise for all levels, and mu an offset that is 0 unless asked for:

    z'(sigma) = z + sigma n - mu                 (VE: eps and v models)
    z'(sigma) = (1 - sigma) z + sigma n - mu     (flow models)

One noise for all levels makes the levels one path: latents on it can be mixed without losing noise. Independent noise
per level, as in ComfyUI's Batch Unsampler, loses up to half the variance where two latents are mixed.

mu is the "normalize fraction" of that node's description, which its code never had: the mean of each picture's noisiest
levels, which takes the colour cast out of the noise that sampling begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from lib_hires.precision import working_dtype


class NoisedReference(Sequence[Tensor]):
    """The reference at the levels of a run, the least noisy first; `at` gives it at any other level too.

    `latent` and `noise` are [B, C, h, w], or [1, C, h, w] for all pictures of a batch; `offset` is [B, 1, 1, 1]. The
    levels are float32 at least.
    """

    def __init__(
        self,
        latent: Tensor,
        noise: Tensor,
        sigmas: Sequence[float],
        flow: bool = False,
        offset: Tensor | None = None,
    ) -> None:
        self.sigmas = tuple(sigmas)
        self._latent = latent.to(working_dtype(latent))
        self._noise = noise.to(self._latent)
        self._flow = flow
        self._offset = offset
        self.clean = self.at(0.0)

    def at(self, sigma: float) -> Tensor:
        """z'(sigma), [B, C, h, w]."""
        if sigma == 0 and self._offset is None:
            return self._latent
        z = self._latent if not self._flow else self._latent * (1 - sigma)
        z = torch.add(z, self._noise, alpha=sigma)
        return z if self._offset is None else z - self._offset

    def mean_of(self, sigmas: Sequence[float]) -> Tensor:
        """Mean of each picture over channels, cells and the given levels, [B, 1, 1, 1], without making the levels."""
        sigma = sum(sigmas) / len(sigmas)  # they are linear in sigma
        z, n = (x.mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64) for x in (self._latent, self._noise))
        return ((z * (1 - sigma) if self._flow else z) + sigma * n).to(self._latent.dtype)

    def __len__(self) -> int:
        return len(self.sigmas)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> NoisedReference: ...

    def __getitem__(self, index: int | slice) -> Tensor | NoisedReference:
        if isinstance(index, slice):
            return NoisedReference(self._latent, self._noise, self.sigmas[index], self._flow, self._offset)
        return self.at(self.sigmas[index])


def unsample(
    latent: Tensor,
    noise: Tensor,
    sigmas: Sequence[float],
    *,
    flow: bool = False,
    start_step: int = 0,
    end_step: int | None = None,
    normalize_fraction: float = 0.0,
) -> NoisedReference:
    """The noised references of a run with noise levels `sigmas`, as a sampler lists them: falling, perhaps ending in 0.

    `start_step` and `end_step` choose sigmas[start:end]; an empty choice gives an empty sequence. `normalize_fraction`
    above 0 takes the mean of this share of the noisiest chosen levels, one at least, off every level, per picture.
    """
    chosen = sorted(sigma for sigma in sigmas[start_step:end_step] if sigma > 0)
    levels = NoisedReference(latent, noise, chosen, flow)
    if not normalize_fraction or not chosen:
        return levels
    noisiest = chosen[-max(1, round(normalize_fraction * len(chosen))) :]
    return NoisedReference(latent, noise, chosen, flow, levels.mean_of(noisiest))
