"""Forge and its relatives: a UNet patcher at sd_model.forge_objects.unet, re-read by the host at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lib_hires.hosts.instance import instance_attribute
from lib_hires.hosts.patcher_unet import PatchedUnet
from lib_hires.hosts.webui import native_size, planned_sigmas
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan
from lib_hires.run import Call, ModelFacts
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
        return ModelFacts(family, native_size(native), _schedule(unet.model), topology, reason)

    def unet_identity(self, sd_model: Any) -> Any:
        return sd_model.forge_objects.unet.model.diffusion_model

    def call_sigma(self, params: Any, facts: ModelFacts) -> float:
        return float(params.sigma[0])  # Forge has turned timesteps into sigmas by now

    def sigmas(self, sampler: Any, arguments: Mapping[str, Any], facts: ModelFacts) -> tuple[float, ...]:
        return planned_sigmas(arguments, facts.schedule.sigma)

    def installation(self, sd_model: Any, plan: Plan) -> Callable[[Call], Any]:
        patched = PatchedUnet(sd_model.forge_objects.unet, plan)

        @contextmanager
        def open_call(call: Call) -> Iterator[None]:
            with instance_attribute(sd_model.forge_objects, "unet", patched.patcher):
                patched.open(call)
                try:
                    yield
                finally:
                    patched.close()

        return open_call


ADAPTER = Forge()


def _family(sd_model: Any) -> tuple[str, int]:
    for flag, name, native in _FAMILIES:
        if getattr(sd_model, flag, False):
            return name, native
    return type(sd_model).__name__, 128


def _schedule(model: Any) -> NoiseSchedule:
    """Forge and Neo keep the sigma table in `predictor`, reForge and Classic in `model_sampling`."""
    levels = getattr(model, "predictor", None) or model.model_sampling
    return NoiseSchedule(levels.sigmas.float().cpu().tolist())
