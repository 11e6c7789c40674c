"""Prediction type and noise levels of one pass in A1111: other denoisers on the pass's own sampler.

The model, its alphas_cumprod and the options stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lib_hires.hosts.instance import replaced
from lib_hires.model_sampling import ModelSampling, ScheduledDenoiser, TimestepDenoiser
from lib_hires.run import EPS, FLOW, LCM
from lib_hires.technique import Refusal


@contextmanager
def scheduled(sampler: Any, sd_model: Any, sampling: ModelSampling) -> Iterator[None]:
    """The sampler and its CFG denoiser wrap the model anew until this closes."""
    denoiser = sampler.model_wrap_cfg
    with ExitStack() as stack:
        if counts_timesteps(denoiser):
            if sampling.prediction == FLOW:
                raise Refusal("DDIM, PLMS and UniPC have no shift here: choose another sampler")
            model = _ModelWithTable(sd_model, sampling)
            wrap: Any = TimestepDenoiser(model, sampling)
            stack.enter_context(replaced(denoiser, "alphas", model.alphas_cumprod))
        else:
            wrap = _sigma_denoiser(sampler.model_wrap, sd_model, sampling)
        for owner in (sampler, denoiser):
            stack.enter_context(replaced(owner, "model_wrap", wrap))
        yield


def start_latent(p: Any, steps: int | None, x: Tensor, noise: Tensor, sampling: ModelSampling) -> Tensor:
    """DDIM and its kin noise the picture by the model's own table. Theirs is VP scaling:
    x = sqrt(abar) (latent + sigma noise + what other extensions added)."""
    if not counts_timesteps(p.sampler.model_wrap_cfg):
        return x
    from modules.sd_samplers_common import setup_img2img_steps

    total, kept = setup_img2img_steps(p, steps)
    timestep = int(p.sampler.get_timesteps(p, total)[kept])
    own = p.sd_model.alphas_cumprod[timestep].double().item()
    wanted = float(sampling.alphas_cumprod[timestep])
    sigma_change = (1 / wanted - 1) ** 0.5 - (1 / own - 1) ** 0.5
    # as one sum: the factors of each part are below 1, whatever the table
    return x * (wanted / own) ** 0.5 + noise * (wanted**0.5 * sigma_change)


def counts_timesteps(denoiser: Any) -> bool:
    """DDIM, PLMS and UniPC hand the training timestep over as "sigma"."""
    from modules.sd_samplers_timesteps import CFGDenoiserTimesteps

    return isinstance(denoiser, CFGDenoiserTimesteps)


def _sigma_denoiser(own: Any, sd_model: Any, sampling: ModelSampling) -> Any:
    if sampling.prediction == FLOW:  # SD3 knows how to be called; only its noise levels are others
        wrap = sd_model.create_denoiser()
        wrap.sigmas = sampling.table(own.sigmas)
        wrap.log_sigmas = wrap.sigmas.log()
        return wrap
    if type(own).__name__ == "LCMCompVisDenoiser":  # that sampler's own: thinned levels, and eps means LCM
        kind = LCM if sampling.prediction == EPS else sampling.prediction
        sampling = replace(sampling, prediction=kind).thinned()
    return ScheduledDenoiser(sd_model, sampling, bool(getattr(own, "quantize", False)), own.sigmas)


class _ModelWithTable:
    """The model with another alphas_cumprod, which the functions of timestep samplers look up on it."""

    def __init__(self, sd_model: Any, sampling: ModelSampling) -> None:
        own = sd_model.alphas_cumprod
        self._sd_model = sd_model
        self.alphas_cumprod = torch.as_tensor(sampling.alphas_cumprod, dtype=torch.float32, device=own.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sd_model, name)
