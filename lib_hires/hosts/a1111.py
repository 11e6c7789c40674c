"""AUTOMATIC1111 WebUI: an LDM or SGM UNet at sd_model.model.diffusion_model, k-diffusion and timestep samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor

from lib_hires.guidance import GuidancePipeline
from lib_hires.hosts import others
from lib_hires.hosts.a1111_guidance import DenoisedSpace, EpsSpace, GuidedCall
from lib_hires.hosts.a1111_rows import UnetRows, rows_of_callback
from lib_hires.hosts.a1111_schedule import counts_timesteps, scheduled, start_latent
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.hosts.webui import native_size, planned_sigmas
from lib_hires.model_sampling import ModelSampling
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan
from lib_hires.run import EPS, FLOW, Call, ModelFacts, V
from lib_hires.sites import SelfAttention
from lib_hires.topology import unet_topology


class A1111:
    name = "A1111"

    def model_facts(self, sd_model: Any) -> ModelFacts:
        family, native = _family(sd_model)
        network = self.unet_identity(sd_model)
        topology, reason = unet_topology(network), "this model is not a UNet"
        if _replaced_unet():
            topology, reason = None, "a compiled UNet (sd_unet) replaces the model's own"
        schedule = NoiseSchedule.from_alphas_cumprod(sd_model.alphas_cumprod.float().cpu().tolist())
        edits = getattr(sd_model, "cond_stage_key", None) == "edit"
        return ModelFacts(
            family,
            native_size(native),
            schedule,
            topology,
            reason,
            prediction=_prediction(sd_model),
            no_guidance_reason="this InstructPix2Pix model mixes three predictions" if edits else "",
            trained_schedule=_trained_schedule(sd_model),
        )

    def unet_identity(self, sd_model: Any) -> Any:
        return getattr(getattr(sd_model, "model", None), "diffusion_model", None)

    def call_sigma(self, params: Any, facts: ModelFacts) -> float:
        level = float(params.sigma[0])
        return facts.schedule.sigma(level) if counts_timesteps(params.denoiser) else level

    def counts_timesteps(self, denoiser: Any) -> bool:
        return counts_timesteps(denoiser)

    def sigmas(self, sampler: Any, arguments: Mapping[str, Any], facts: ModelFacts) -> tuple[float, ...]:
        return planned_sigmas(arguments, facts.schedule.sigma)

    def other_attention(self, sd_model: Any) -> list[str]:
        return others.on_modules(self.unet_identity(sd_model))

    def installation(self, sd_model: Any, plan: Plan) -> Callable[[Call, Any], Any]:
        network = self.unet_identity(sd_model)
        unet, pipeline = HookedUnet(network, plan, _with_hypernetworks), GuidancePipeline(plan)
        differs_by_seed = bool(plan.at(SelfAttention)) and len(set(plan.run.seeds)) > 1

        @contextmanager
        def open_call(call: Call, params: Any) -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(unet.open(call))
                if pipeline:
                    space = EpsSpace(call.sigma) if counts_timesteps(params.denoiser) else DenoisedSpace()
                    guided = GuidedCall(pipeline, params, call, space, _may_skip_uncond(params.denoiser))
                    stack.enter_context(guided.open(network))
                elif differs_by_seed:
                    stack.enter_context(UnetRows(call, rows_of_callback(params)).open(network))
                yield

        return open_call

    def scheduled(self, p: Any, sampling: ModelSampling) -> AbstractContextManager[None]:
        return scheduled(p.sampler, p.sd_model, sampling)

    def start_latent(self, p: Any, steps: int | None, x: Any, noise: Any, sampling: ModelSampling) -> Any:
        return start_latent(p, steps, x, noise, sampling)


ADAPTER = A1111()


def _prediction(sd_model: Any) -> str:
    if getattr(sd_model, "is_sd3", False):
        return FLOW
    return V if getattr(sd_model, "parameterization", "eps") == "v" else EPS


def _may_skip_uncond(denoiser: Any) -> bool:
    """Not where the host itself looks at the uncond rows: DDIM CFG++, and the live preview of the negative prompt."""
    from modules import shared

    needed = getattr(denoiser, "need_last_noise_uncond", False)
    return not needed and shared.opts.live_preview_content != "Negative prompt"


def _family(sd_model: Any) -> tuple[str, int]:
    """(name, native latent side). SD 2.x models that predict v were trained at 768 px."""
    if getattr(sd_model, "is_sdxl", False):
        return "SDXL", 128
    if getattr(sd_model, "is_sd3", False):
        return "SD3", 128
    if getattr(sd_model, "is_sd2", False):
        return "SD 2.x", 96 if getattr(sd_model, "parameterization", "eps") == "v" else 64
    return "SD 1.x", 64


def _trained_schedule(sd_model: Any) -> NoiseSchedule | None:
    """The table before the user's setting "Noise schedule" changed it, where it did."""
    own = getattr(sd_model, "alphas_cumprod_original", None)
    if own is None or own is sd_model.alphas_cumprod:
        return None
    return NoiseSchedule.from_alphas_cumprod(own.float().cpu().tolist())


def _with_hypernetworks(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What every attention of the host makes K and V from."""
    from modules import shared
    from modules.hypernetworks import hypernetwork

    return hypernetwork.apply_hypernetworks(shared.loaded_hypernetworks, tokens)


def _replaced_unet() -> bool:
    from modules import sd_unet

    return sd_unet.current_unet is not None
