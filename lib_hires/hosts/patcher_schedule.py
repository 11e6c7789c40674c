"""Prediction type and noise levels of one pass in Forge and its relatives.

The model computes in sigmas and asks one object for scalings and timesteps: `predictor`, in reForge and Classic
`model_sampling`. A changed copy stands in for it until the sampler returns. An object patch of the UNet patcher would
stay on the model until the host loads another clone, and the next sampler would be made with it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lib_hires.hosts.instance import instance_attribute, replaced
from lib_hires.model_sampling import LCM_LEVELS, ModelSampling
from lib_hires.run import EPS, FLOW, V
from lib_hires.technique import Refusal

_NAMES = {EPS: "epsilon", V: "v_prediction"}  # what hosts call the types that they know


def levels_name(model: Any) -> str:
    return "predictor" if getattr(model, "predictor", None) is not None else "model_sampling"


@contextmanager
def scheduled(sampler: Any, sd_model: Any, sampling: ModelSampling) -> Iterator[None]:
    """Model and sampler work with `sampling` until this closes."""
    unet = sd_model.forge_objects.unet
    name = levels_name(unet.model)
    if name in getattr(unet, "object_patches", {}):
        raise Refusal("another extension has replaced the model's sampling: switch one of the two off")
    own = getattr(unet.model, name)
    changed = _changed(own, sampling)
    with ExitStack() as stack:
        stack.callback(lambda: own.to(changed.sigmas.device))  # a model may have been moved with the copy in it
        stack.enter_context(replaced(unet.model, name, changed))
        for wrap in _wrappers(sampler):
            _link(stack, wrap, changed, sampling)
        if getattr(sampler.model_wrap_cfg, "classic_ddim_eps_estimation", False):
            device = sd_model.alphas_cumprod.device
            table = torch.as_tensor(sampling.alphas_cumprod, dtype=torch.float32, device=device)
            stack.callback(setattr, sd_model, "alphas_cumprod", sd_model.alphas_cumprod)  # the host moves it meanwhile
            sd_model.alphas_cumprod = table
        yield


def _changed(own: Any, sampling: ModelSampling) -> Any:
    """A copy of the host's own object with other levels, and for eps and its kin other formulas."""
    if getattr(own, "prediction_type", "") == "edm" or "EDM" in "".join(kind.__name__ for kind in type(own).__mro__):
        raise Refusal("this model is sampled in the way of EDM, which cannot be replaced: switch Model sampling off")
    changed = copy.deepcopy(own)
    changed.sigmas = sampling.table(own.sigmas)
    if hasattr(own, "log_sigmas"):
        changed.log_sigmas = changed.sigmas.log()
    if sampling.prediction == FLOW:
        _set_shift(changed, sampling.shift)
        return changed
    changed.prediction_type = _NAMES.get(sampling.prediction, "epsilon")
    changed.calculate_input = lambda sigma, noise: sampling.model_input(noise, sigma)
    changed.calculate_denoised = lambda sigma, output, x: sampling.denoised(output, x, sigma)
    changed.timestep = sampling.timestep
    changed.sigma = sampling.sigma
    return changed


def _set_shift(changed: Any, shift: float) -> None:
    if hasattr(changed, "shift"):
        changed.shift = shift
    elif hasattr(changed, "mu"):
        changed.mu = math.log(shift)
    else:
        raise Refusal("this WebUI does not say where it keeps the shift: set it there, and Shift to Model's own")


def _wrappers(sampler: Any) -> list[Any]:
    """The objects that give the sampler its levels; after a refiner switch the denoiser has another one."""
    own, current = sampler.model_wrap, sampler.model_wrap_cfg.inner_model
    return [own] if own is current else [own, current]


def _link(stack: ExitStack, wrap: Any, changed: Any, sampling: ModelSampling) -> None:
    if hasattr(wrap, "predictor"):
        stack.enter_context(replaced(wrap, "predictor", changed))
    if "sigmas" in getattr(wrap, "_buffers", {}):  # a table of its own: 50 levels in the LCM sampler
        thin = sampling.prediction != FLOW and len(wrap.sigmas) == LCM_LEVELS
        table = (sampling.thinned() if thin else sampling).table(wrap.sigmas)
        stack.enter_context(replaced(wrap, "sigmas", table))
        stack.enter_context(replaced(wrap, "log_sigmas", table.log()))
    elif sampling.skip > 1:  # the host's would count levels as timesteps
        levels = lambda n=None: _levels(sampling, n, changed.sigmas.device)  # noqa: E731
        stack.enter_context(instance_attribute(wrap, "get_sigmas", levels))


def _levels(sampling: ModelSampling, n: int | None, device: Any) -> torch.Tensor:
    return sampling.run_levels(len(sampling.levels) if n is None else n, device)
