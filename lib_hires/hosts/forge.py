"""Forge and its relatives: a UNet patcher at sd_model.forge_objects.unet, re-read by the host at every call."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lib_hires.guidance import GuidancePipeline
from lib_hires.hosts import others
from lib_hires.hosts.instance import instance_attribute
from lib_hires.hosts.patcher_guidance import install_guidance
from lib_hires.hosts.patcher_schedule import levels_name, scheduled
from lib_hires.hosts.patcher_unet import PatchedUnet
from lib_hires.hosts.webui import native_size, planned_sigmas
from lib_hires.model_sampling import ModelSampling
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan
from lib_hires.run import EPS, FLOW, Call, ModelFacts, V
from lib_hires.topology import unet_topology

_FAMILIES = (  # flag on sd_model, name, native latent side
    ("is_sdxl", "SDXL", 128),
    ("is_sd3", "SD3", 128),
    ("is_sd2", "SD 2.x", 64),
    ("is_sd1", "SD 1.x", 64),
)


class Forge:
    name = "Forge"

    def model_facts(self, sd_model: Any) -> ModelFacts:
        unet = sd_model.forge_objects.unet
        family, native = _family(sd_model)
        topology = unet_topology(unet.model.diffusion_model)
        reason = f"{type(unet.model.diffusion_model).__name__} is not a UNet"
        prediction = _prediction(unet.model)
        return ModelFacts(
            family,
            native_size(native),
            _schedule(unet.model),
            topology,
            reason,
            prediction,
            trained_schedule=_trained_schedule(sd_model),
        )

    def unet_identity(self, sd_model: Any) -> Any:
        return sd_model.forge_objects.unet.model.diffusion_model

    def call_sigma(self, params: Any, facts: ModelFacts) -> float:
        return float(params.sigma[0])  # Forge has turned timesteps into sigmas by now

    def counts_timesteps(self, denoiser: Any) -> bool:
        return bool(getattr(denoiser, "classic_ddim_eps_estimation", False))

    def sigmas(self, sampler: Any, arguments: Mapping[str, Any], facts: ModelFacts) -> tuple[float, ...]:
        return planned_sigmas(arguments, facts.schedule.sigma)

    def other_attention(self, sd_model: Any) -> list[str]:
        return others.on_patcher(sd_model.forge_objects.unet)

    def installation(self, sd_model: Any, plan: Plan) -> Callable[[Call, Any], Any]:
        functions = _host_functions()
        patched = PatchedUnet(sd_model.forge_objects.unet, plan, functions.attention, functions.fits)
        pipeline = GuidancePipeline(plan)
        if pipeline:
            install_guidance(patched.patcher, patched.cell, pipeline, functions.evaluate)

        @contextmanager
        def open_call(call: Call, params: Any) -> Iterator[None]:
            with instance_attribute(sd_model.forge_objects, "unet", patched.patcher), patched.open(call):
                yield

        return open_call

    def scheduled(self, p: Any, sampling: ModelSampling) -> AbstractContextManager[None]:
        return scheduled(p.sampler, p.sd_model, sampling)

    def start_latent(self, p: Any, steps: int | None, x: Any, noise: Any, sampling: ModelSampling) -> Any:
        return x  # noised by the table in force


ADAPTER = Forge()


def _family(sd_model: Any) -> tuple[str, int]:
    for flag, name, native in _FAMILIES:
        if getattr(sd_model, flag, False):
            return name, native
    return type(sd_model).__name__, 128


def _levels(model: Any) -> Any:
    """Forge and Neo keep sigma table and prediction type in `predictor`, reForge and Classic in `model_sampling`."""
    return getattr(model, levels_name(model))


def _schedule(model: Any) -> NoiseSchedule:
    return NoiseSchedule(_levels(model).sigmas.float().cpu().tolist())


def _trained_schedule(sd_model: Any) -> NoiseSchedule | None:
    """The table before the user's setting rescaled it to zero terminal SNR. Forge rescales `sigmas` of its predictor
    and leaves `alphas_cumprod` there as it was; reForge keeps the old table on the engine, as A1111 does."""
    levels = _levels(sd_model.forge_objects.unet.model)
    abar = getattr(levels, "alphas_cumprod", None)
    if abar is None:
        abar = getattr(sd_model, "alphas_cumprod_original", None)
    return None if abar is None else NoiseSchedule.from_alphas_cumprod(abar.float().cpu().tolist())


def _prediction(model: Any) -> str:
    """Forge names the type; in reForge and Classic it is one of the classes that model_sampling derives from."""
    levels = _levels(model)
    names = {getattr(levels, "prediction_type", "")} | {kind.__name__ for kind in type(levels).__mro__}
    if names & {"const", "CONST"}:
        return FLOW
    return V if names & {"v_prediction", "V_PREDICTION"} else EPS


@dataclass(frozen=True)
class _HostFunctions:
    """What our patches call back."""

    attention: Callable[..., Tensor]  # (q, k, v, heads)
    evaluate: Callable[..., tuple[Tensor, Tensor]]
    free_memory: Callable[[Any], float]

    def fits(self, model: Any, shape: Sequence[int], device: Any) -> bool:
        """The host's own test before it batches conditions."""
        return model is None or model.memory_required(list(shape)) < self.free_memory(device)


def _host_functions() -> _HostFunctions:
    if importlib.util.find_spec("backend") is not None:
        from backend import memory_management
        from backend.attention import attention_function
        from backend.sampling.sampling_function import calc_cond_uncond_batch

        return _HostFunctions(attention_function, calc_cond_uncond_batch, memory_management.get_free_memory)
    from ldm_patched.ldm.modules.attention import optimized_attention
    from ldm_patched.modules import model_management
    from ldm_patched.modules.samplers import calc_cond_uncond_batch

    return _HostFunctions(optimized_attention, calc_cond_uncond_batch, model_management.get_free_memory)
