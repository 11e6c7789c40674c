"""Where a denoiser call stands, and how the latent of its sampler is scaled."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Level:
    """`sigma` of a call's latent in VE scaling, and the factor from the host's scaling to that."""

    sigma: float
    factor: float

    @property
    def returns_eps(self) -> bool:
        """Denoisers that take VP latents (factor sqrt(1 + sigma^2)) return eps, the others x0."""
        return self.factor != 1.0

    def denoised(self, x: Tensor, eps: Tensor) -> Tensor:
        """x0 for the eps that came back for a latent x in the host's scaling."""
        return (x.float() * self.factor - self.sigma * eps.float()).to(eps.dtype)
