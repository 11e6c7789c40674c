"""How a model is sampled: what its raw output F means, and at which noise levels it is asked.

Tables and scalars are float64, tensors float32: sigma squared of a table with zero terminal SNR is 2e7, beyond half
precision. VE scaling throughout, x = x0 + sigma noise, except for flow models: x = (1 - sigma) x0 + sigma noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib_hires.noise import NoiseSchedule
from lib_hires.run import EPS, FLOW, IMG_TO_IMG, LCM, X0, V

ABAR_AT_ZERO_SNR = 4.8973451890853435e-08  # in place of 0, whose sigma would be infinite; sigma is 4518.76
LCM_LEVELS = 50
_LCM_DATA, _LCM_TIMESTEP = 0.5, 10.0  # sigma_data and timestep scaling of Latent Consistency Models (Luo et al. 2023)


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """The table rescaled so that its last level is pure noise (Lin et al. 2023, algorithm 1).

    sqrt(abar) is shifted to 0 at the end and scaled back to its first value; the last abar is a tiny number.
    """
    root = 1 / np.sqrt(1 + schedule.sigmas**2)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root**2
    abar[-1] = ABAR_AT_ZERO_SNR
    return NoiseSchedule.from_alphas_cumprod(abar)


def has_zero_snr(schedule: NoiseSchedule) -> bool:
    return schedule.sigma_max > 1000


def flow_schedule(shift: float, levels: int) -> NoiseSchedule:
    """sigma = shift t / (1 + (shift - 1) t) at t = 1/n ... 1 (Esser et al. 2024, eq. 23)."""
    t = np.arange(1, levels + 1, dtype=np.float64) / levels
    return NoiseSchedule(shift * t / (1 + (shift - 1) * t))


def shift_for_size(latent: tuple[int, int], base: float = 0.5, maximum: float = 1.15) -> float:
    """Flux's shift for a latent (h, w): exp(mu), mu linear in the number of 2x2 patches, from `base` at 256 patches
    (256 x 256 pixels) to `maximum` at 4096 (1024 x 1024)."""
    patches = latent[0] * latent[1] / 4
    return math.exp(base + (maximum - base) * (patches - 256) / (4096 - 256))


@dataclass(frozen=True)
class ModelSampling:
    """What is in force in one pass.

    `schedule` is the whole table, one level per training timestep. Samplers see `levels`: every `skip`-th of it,
    counted from the end. `shift` is that of a flow model.
    """

    prediction: str
    schedule: NoiseSchedule
    skip: int = 1
    shift: float = 1.0

    def thinned(self) -> ModelSampling:
        """With the 50 levels that a consistency model was distilled at."""
        return replace(self, skip=max(len(self.schedule.sigmas) // LCM_LEVELS, 1))

    @cached_property
    def levels(self) -> np.ndarray:
        """Noise levels, rising."""
        return self.schedule.sigmas[self.skip - 1 :: self.skip]

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar = 1 / (1 + sigma^2) for every training timestep."""
        return 1 / (1 + self.schedule.sigmas**2)

    def timestep(self, sigma: Tensor, quantize: bool = True) -> Tensor:
        """Training timestep of noise levels of any shape: that of the nearest level in log sigma, or in between.

        Thinned levels have no timesteps in between: the model has never seen any.
        """
        log_levels = self._log_levels(sigma.device)
        log_sigma = sigma.float().log().flatten()
        if quantize or self.skip > 1:
            nearest = (log_sigma - log_levels[:, None]).abs().argmin(dim=0)
            return (nearest * self.skip + self.skip - 1).view(sigma.shape)
        high = torch.searchsorted(log_levels, log_sigma).clamp(1, len(log_levels) - 1)
        low = high - 1
        weight = ((log_sigma - log_levels[low]) / (log_levels[high] - log_levels[low])).clamp(0, 1)
        return (low + weight).view(sigma.shape)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise level of training timesteps of any shape, log sigma linear between levels, clamped to them."""
        log_levels = self._log_levels(timestep.device)
        place = ((timestep.float() - (self.skip - 1)) / self.skip).clamp(0, len(log_levels) - 1)
        low, high, weight = place.floor().long(), place.ceil().long(), place.frac()
        return ((1 - weight) * log_levels[low] + weight * log_levels[high]).exp()

    def table(self, like: Tensor | None = None) -> Tensor:
        """The levels as a float32 tensor [n], on the device of `like`."""
        return torch.as_tensor(self.levels, dtype=torch.float32, device=None if like is None else like.device)

    def model_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What the network is shown for x [B, C, h, w] at sigma [B]: x / sqrt(sigma^2 + 1), or x itself."""
        if self.prediction in (FLOW, IMG_TO_IMG):
            return x
        return (x.float() / _root(_per_row(sigma, x))).to(x.dtype)

    def denoised(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """x0 [B, C, h, w] from the raw output F at the noisy latent x and sigma [B].

        eps and flow: x - sigma F. v: x / (sigma^2 + 1) - sigma F / sqrt(sigma^2 + 1). x0: F. LCM: the eps result as
        c_out x0 + c_skip x, the boundary condition of a consistency model.
        """
        output32, x32, sigma = output.float(), x.float(), _per_row(sigma, x)
        if self.prediction in (X0, IMG_TO_IMG):
            result = output32
        elif self.prediction == V:
            root = _root(sigma)
            result = (x32 / root - sigma * output32) / root
        else:
            result = x32 - sigma * output32
        if self.prediction == LCM:
            result = self._bounded(result, x32, sigma)
        return result.to(x.dtype)

    def eps(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The noise that F amounts to, where x is in VP scaling: sqrt(abar) x0 + sqrt(1 - abar) noise."""
        if self.prediction == EPS:
            return output
        row = _per_row(sigma, x)
        if self.prediction == V:
            return ((output.float() + row * x.float()) / _root(row)).to(x.dtype)
        ve = x.float() * _root(row)
        return ((ve - self.denoised(output.float(), ve, sigma)) / row).to(x.dtype)

    def noised(self, latent: Tensor, noise: Tensor, sigma: Tensor, from_pure_noise: bool = False) -> Tensor:
        """The noisy latent that sampling starts from at sigma (a scalar). `from_pure_noise` gives the noise the
        standard deviation sqrt(1 + sigma^2) that a noised latent has at a level that is not quite pure noise."""
        if self.prediction == FLOW:
            return sigma * noise + (1 - sigma) * latent
        return latent + noise * (_root(sigma) if from_pure_noise else sigma)

    def _bounded(self, denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        scaled = self.timestep(sigma).float() * _LCM_TIMESTEP
        total = scaled**2 + _LCM_DATA**2
        return denoised * (scaled / total.sqrt()) + x * (_LCM_DATA**2 / total)

    def _log_levels(self, device: Any) -> Tensor:
        return torch.as_tensor(np.log(self.levels), dtype=torch.float32, device=device)

    def run_levels(self, n: int, device: Any = None) -> Tensor:
        """Noise levels of a run of n steps [n + 1], falling, at even timesteps, with 0 at the end."""
        last = len(self.levels) * self.skip - 1
        levels = self.sigma(torch.linspace(last, self.skip - 1, n, device=device))
        return torch.cat([levels, levels.new_zeros(1)])


def model_sampling(prediction: str, schedule: NoiseSchedule) -> ModelSampling:
    """For a model that predicts eps, v, x0 ...; LCM has its 50 levels."""
    sampling = ModelSampling(prediction, schedule)
    return sampling.thinned() if prediction == LCM else sampling


class ScheduledDenoiser(nn.Module):
    """x and sigma to x0, around a model with `apply_model(x, timestep, **conditions)`.

    It has what schedulers and samplers of k-diffusion ask of a denoiser: sigmas, sigma_min, sigma_max, get_sigmas,
    sigma_to_t, t_to_sigma, inner_model.
    """

    sigmas: Tensor
    log_sigmas: Tensor

    def __init__(self, model: Any, sampling: ModelSampling, quantize: bool = False, like: Tensor | None = None) -> None:
        super().__init__()
        self.inner_model = model
        self.sampling = sampling
        self.quantize = quantize
        self.sigma_data = 1.0
        table = sampling.table(like)
        self.register_buffer("sigmas", table)
        self.register_buffer("log_sigmas", table.log())

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """Noise levels of a run of n steps, falling, with 0 at the end; all of them if n is None."""
        if n is None:
            return torch.cat([self.sigmas.flip(0), self.sigmas.new_zeros(1)])
        return self.sampling.run_levels(n, self.sigmas.device)

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        return self.sampling.timestep(sigma, self.quantize if quantize is None else quantize)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        return self.sampling.sigma(torch.as_tensor(t))

    def forward(self, x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        shown = self.sampling.model_input(x, sigma)
        return self.sampling.denoised(
            self.inner_model.apply_model(shown, self.sigma_to_t(sigma), **conditions), x, sigma
        )


class TimestepDenoiser(nn.Module):
    """x in VP scaling and training timesteps to eps, as DDIM, PLMS and UniPC of the WebUI want it."""

    def __init__(self, model: Any, sampling: ModelSampling) -> None:
        super().__init__()
        self.inner_model = model
        self.sampling = replace(sampling, skip=1)  # these samplers have their own timesteps

    def forward(self, x: Tensor, timesteps: Tensor, **conditions: Any) -> Tensor:
        sigma = self.sampling.sigma(timesteps)
        # scaled for the network, a latent is in VP scaling; only a type that scales nothing is shown x0 + sigma noise
        shown = x * _root(_per_row(sigma, x)).to(x.dtype) if self.sampling.prediction == IMG_TO_IMG else x
        return self.sampling.eps(self.inner_model.apply_model(shown, timesteps, **conditions), x, sigma)


def _per_row(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.float().view(-1, *[1] * (x.ndim - 1))


def _root(sigma: Tensor) -> Tensor:
    return (sigma.float() ** 2 + 1).sqrt()
