"""What a technique needs to know of the sampler that runs it."""

from __future__ import annotations

from dataclasses import dataclass

# They evaluate the model once a step, at the latent that they go on from, and add no noise unless told to
_SINGLE_STEP = {
    "sample_euler",
    "sample_dpmpp_2m",
    "sample_lms",
    "sample_ipndm",
    "sample_ipndm_v",
    "sample_deis",
    "ddim",
}


@dataclass(frozen=True)
class Sampler:
    """A sampler by the name of its function, with the two settings that make a deterministic one add noise."""

    name: str = ""
    eta: float = 0.0
    churn: float = 0.0

    @property
    def keeps_latent(self) -> bool:
        """Whether it goes on from the very latent that each call sees, without fresh noise: what is written into the
        latent before a call is then neither lost nor renoised."""
        return self.name in _SINGLE_STEP and not (self.name == "ddim" and self.eta) and not self.churn
