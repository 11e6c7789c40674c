"""Noise levels: sigma (VE scaling, x = x0 + sigma * noise) and training timestep, converted both ways on the host."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class NoiseSchedule:
    """The sigma table of a discrete model (eps, v): entry t is the noise level of training timestep t.

    Between entries log sigma is interpolated linearly in t, as k-diffusion's DiscreteSchedule does.
    Plain floats throughout: windows and plots never touch the device.
    """

    def __init__(self, sigmas: Iterable[float]):
        table = np.asarray(list(sigmas), dtype=np.float64)
        if table.ndim != 1 or len(table) < 2 or not (np.diff(table) > 0).all() or table[0] <= 0:
            raise ValueError("a sigma table is a rising list of at least two positive noise levels")
        self.sigmas = table
        self._log_sigmas = np.log(table)
        self._timesteps = np.arange(len(table), dtype=np.float64)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Iterable[float]) -> NoiseSchedule:
        """sigma = sqrt((1 - abar) / abar), abar the cumulated alphas of a DDPM (Ho et al. 2020, eq. 4)."""
        abar = np.asarray(list(alphas_cumprod), dtype=np.float64)
        return cls(np.sqrt((1 - abar) / abar))

    @classmethod
    def scaled_linear(cls) -> NoiseSchedule:
        """Stable Diffusion's own table: beta = linspace(sqrt(.00085), sqrt(.012), 1000) squared."""
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
        return cls.from_alphas_cumprod(np.cumprod(1 - betas))

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def timestep(self, sigma: float) -> float:
        """Training timestep of a noise level, fractional, clamped to the table."""
        if sigma <= 0:
            return 0.0
        return float(np.interp(np.log(sigma), self._log_sigmas, self._timesteps))

    def sigma(self, timestep: float) -> float:
        """Noise level of a (fractional) training timestep, clamped to the table."""
        return float(np.exp(np.interp(timestep, self._timesteps, self._log_sigmas)))
