"""The bench as a host: prompt in, pictures out, with the same plan and sites as in a WebUI."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_hires.generation import Generation
from lib_hires.guidance import GuidancePipeline
from lib_hires.hosts.bench import samplers, webui_ldm
from lib_hires.hosts.bench.blend import HARD, Inpainting, latent_mask
from lib_hires.hosts.bench.model import LATENT_FACTOR, BenchModels
from lib_hires.hosts.bench.operations import Counted
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.model_sampling import ScheduledDenoiser
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan, make_plan, prepare_plan, schedules
from lib_hires.registry import BY_NAME
from lib_hires.run import (
    COND,
    FIRST_PASS,
    HIRES_PASS,
    IMG2IMG_PASS,
    PERTURBED,
    UNCOND,
    Call,
    ModelFacts,
    Row,
    Run,
    Size,
    Start,
)
from lib_hires.samplers import Sampler
from lib_hires.sites import Ending, MaskBlend, NoisyLatent, Predictions, Schedule
from lib_hires.stage_plan import in_stage, plan_stages
from lib_hires.stages import HiresPass, Stage
from lib_hires.topology import unet_topology

log = logging.getLogger("hires_plus")

Levels = Callable[[Any], Tensor]  # the model as it is sampled -> the noise levels of a pass


@dataclass(frozen=True)
class Request:
    """What to draw. Sizes in pixels, multiples of 8; one picture per prompt and seed pair."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    width: int = 128
    height: int = 128
    steps: int = 20
    cfg_scale: float = 3.0
    sampler: str = "Euler"
    schedule: str = "Normal"
    negative: str = ""
    init_images: Tensor | None = None  # [B, 3, H, W] in 0..1: makes it img2img
    denoise: float = 1.0  # of img2img
    mask: Tensor | None = None  # [B or 1, 1, H, W] in 0..1, 1 = repaint: makes img2img inpainting
    blend: str = HARD  # how it is blended, see blend.py
    hires_scale: float = 1.0  # above 1: a second pass at this multiple of the size
    hires_denoise: float = 0.6
    hires_steps: int = 0  # 0: as `steps`

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.seeds):
            raise ValueError(f"{len(self.prompts)} prompts but {len(self.seeds)} seeds")
        for name in ("width", "height"):
            pixels = getattr(self, name)
            if pixels % LATENT_FACTOR or pixels < LATENT_FACTOR:
                raise ValueError(f"{name} = {pixels} is not a positive multiple of {LATENT_FACTOR}")


@dataclass
class Result:
    """Pictures [B, 3, H, W] in 0..1, and what it took."""

    images: Tensor
    latents: Tensor
    seconds: float
    unet_calls: int
    plans: list[Plan] = field(default_factory=list)

    @property
    def pictures(self) -> np.ndarray:
        """The images as [B, H, W, 3] uint8."""
        return (self.images.permute(0, 2, 3, 1) * 255).round().byte().numpy()


class _Ended(Exception):
    """A patch ended the run with this latent."""

    def __init__(self, latent: Tensor) -> None:
        self.latent = latent


class Interrupted(Exception):
    """Raised by a progress callback to stop; the bench's counterpart of a WebUI's Interrupt button."""


class Bench:
    """The embedded host. `after_call` is called after every denoiser call with (step, of)."""

    def __init__(self, models: BenchModels, after_call: Callable[[int, int], None] = lambda step, of: None) -> None:
        webui_ldm.install()
        self.models = models
        self.after_call = after_call
        self.unet_calls = 0
        self.unet = Counted(models.unet)
        self._wrapper = samplers.import_k_diffusion().external.CompVisDenoiser(_Eps(self, models.alphas_cumprod))
        native = models.native_size // LATENT_FACTOR
        schedule = NoiseSchedule.from_alphas_cumprod(models.alphas_cumprod.tolist())
        self._facts = ModelFacts("SD 1.x (bench)", (native, native), schedule, unet_topology(models.unet))

    @torch.inference_mode()
    def generate(self, request: Request, generation: Generation | None = None) -> Result:
        """Draw all pictures of a request, through the hires pass if it asks for one."""
        generation = generation or Generation()
        result = Result(torch.empty(0), torch.empty(0), 0.0, 0)
        started, calls_before = time.perf_counter(), self.unet_calls
        if request.init_images is None:
            latents = self._text_pass(request, generation, result)
        else:
            levels = partial(_image_levels, request)
            latents = self._image_pass(request, request.init_images, IMG2IMG_PASS, levels, generation, result)
        if request.hires_scale > 1:
            latents = self._hires_pass(request, latents, generation, result)
        result.latents = latents
        result.images = self.models.vae.decode(latents)
        result.seconds = time.perf_counter() - started
        result.unet_calls = self.unet_calls - calls_before
        return result

    def _text_pass(self, request: Request, generation: Generation, result: Result) -> Tensor:
        height, width = request.height // LATENT_FACTOR, request.width // LATENT_FACTOR
        scheduled = self._scheduled(request, FIRST_PASS, (height, width), generation)
        sigmas = samplers.noise_levels(scheduled.wrapper, request.schedule, request.steps)
        x = samplers.seeded_noise((4, height, width), request.seeds) * sigmas[0]
        return self._sample(request, x, sigmas, scheduled, generation, result)

    def _image_pass(
        self, request: Request, images: Tensor, pass_name: str, levels: Levels, generation: Generation, result: Result
    ) -> Tensor:
        """Noise the encoded pictures to the first of these levels, and sample from there."""
        clean = self.models.vae.encode(images)
        size = (int(clean.shape[-2]), int(clean.shape[-1]))
        scheduled = self._scheduled(request, pass_name, size, generation)
        sigmas = levels(scheduled.wrapper)
        noise = samplers.seeded_noise(tuple(clean.shape[1:]), request.seeds)
        x = clean + noise * sigmas[0]
        inpainting = _inpainting(request, clean, generation) if pass_name == IMG2IMG_PASS else None
        return self._sample(request, x, sigmas, scheduled, generation, result, Start(clean, noise), inpainting)

    def _hires_pass(self, request: Request, latents: Tensor, generation: Generation, result: Result) -> Tensor:
        height, width = (
            round(side * request.hires_scale / LATENT_FACTOR) * LATENT_FACTOR
            for side in (request.height, request.width)
        )
        asked = HiresPass(
            (request.height, request.width),
            (height, width),
            generation.first,
            request.hires_steps or None,
            native=(self.models.native_size, self.models.native_size),
        )
        stages = plan_stages(generation, asked)
        for number, stage in enumerate(stages):
            with in_stage(generation, number, stages):
                latents = self._hires_stage(request, latents, stage, generation, result)
        return latents

    def _hires_stage(
        self, request: Request, latents: Tensor, stage: Stage, generation: Generation, result: Result
    ) -> Tensor:
        """From the latents of the stage before, through the picture, to those of this stage."""
        images = F.interpolate(self.models.vae.decode(latents), size=stage.size, mode="bicubic").clamp(0, 1)
        steps = stage.steps or request.hires_steps or request.steps
        denoise = request.hires_denoise if stage.denoise is None else stage.denoise
        cfg_scale = request.cfg_scale if stage.cfg_scale is None else stage.cfg_scale
        request = replace(request, steps=steps, cfg_scale=cfg_scale)
        levels = partial(_hires_levels, request, denoise)
        return self._image_pass(request, images, HIRES_PASS, levels, generation, result)

    def _sample(
        self,
        request: Request,
        x: Tensor,
        sigmas: Tensor,
        scheduled: _Scheduled,
        generation: Generation,
        result: Result,
        start: Start | None = None,
        inpainting: Inpainting | None = None,
    ) -> Tensor:
        run = replace(
            scheduled.run,
            model=scheduled.model,
            sigmas=samplers.planned_levels(request.sampler, sigmas),
            start=start,
            mask=None if inpainting is None else inpainting.mask,
        )
        with _planned(run, generation, result, scheduled.plan) as plan:
            denoiser = _Denoiser(self, request, plan, scheduled.wrapper, len(sigmas) - 1, inpainting)
            try:
                out = samplers.run_sampler(request.sampler, denoiser, x, sigmas, request.seeds, denoiser.count_step)
            except _Ended as ended:
                out = ended.latent
            return out if inpainting is None else inpainting.at_end(out, plan.at(MaskBlend))

    def _scheduled(self, request: Request, pass_name: str, latent: Size, generation: Generation) -> _Scheduled:
        """What a pass is sampled with, decided before its noise levels are made."""
        levels = self._facts.schedule.sigmas
        run = Run(
            host="bench",
            pass_name=pass_name,
            model=self._facts,
            latent=latent,
            sigmas=(float(levels[-1]), float(levels[0])),
            seeds=request.seeds,
            sampler=Sampler(samplers.SAMPLERS[request.sampler]),
            hires_follows=pass_name == FIRST_PASS and request.hires_scale > 1,
            stage=generation.stage,
        )
        if not schedules(generation.current):
            return _Scheduled(run, self._facts, self._wrapper, None)
        plan = prepare_plan(generation.current, run)
        model, wrapper = self._facts, self._wrapper
        for patch in plan.at(Schedule):
            sampling = patch.model_sampling()
            model = replace(self._facts, prediction=sampling.prediction, schedule=sampling.schedule)
            wrapper = ScheduledDenoiser(self._wrapper.inner_model, sampling)
        return _Scheduled(run, model, wrapper, plan)


@dataclass(frozen=True)
class _Scheduled:
    """A pass that is about to be sampled: its facts, the model as it is sampled, and what has been decided."""

    run: Run
    model: ModelFacts
    wrapper: Any
    plan: Plan | None


def _inpainting(request: Request, clean: Tensor, generation: Generation) -> Inpainting | None:
    if request.mask is None:
        return None
    grey = any(BY_NAME[name].grey_mask for name in generation.selection)
    size = (int(clean.shape[-2]), int(clean.shape[-1]))
    mask = latent_mask(request.mask, size, rounded=request.blend == HARD and not grey)
    return Inpainting(mask, clean, request.blend)


@contextmanager
def _planned(run: Run, generation: Generation, result: Result, prepared: Plan | None) -> Iterator[Plan]:
    plan = make_plan(generation.current, run, prepared)
    result.plans.append(plan)
    if generation.selection:
        log.info(plan.report())
    try:
        yield plan
    finally:
        generation.finish_run(plan)


def _image_levels(request: Request, wrapper: Any) -> Tensor:
    """img2img: `denoise` of the steps are left."""
    skipped = min(int(request.steps * (1 - request.denoise)), request.steps - 1)
    return samplers.noise_levels(wrapper, request.schedule, request.steps)[skipped:]


def _hires_levels(request: Request, denoise: float, wrapper: Any) -> Tensor:
    """Hires. fix: all steps, on the last part of a longer schedule."""
    total = max(int(request.steps / max(min(denoise, 0.999), 1e-3)), request.steps)
    return samplers.noise_levels(wrapper, request.schedule, total)[total - request.steps :]


class _Denoiser:
    """CFG around the model: x [B, 4, h, w] at sigma [B] to the guided x0."""

    def __init__(
        self, bench: Bench, request: Request, plan: Plan, wrapper: Any, steps: int, inpainting: Inpainting | None
    ) -> None:
        self._bench = bench
        self._inpainting = inpainting
        self._mask_patches = plan.at(MaskBlend)
        self._unet = HookedUnet(bench.models.unet, plan)
        self._pipeline = GuidancePipeline(plan)
        self._latent_patches = plan.at(NoisyLatent)
        self._ending = plan.at(Ending)
        self._wrapper = wrapper
        self._scale = request.cfg_scale
        self._steps = steps
        self._step = 0
        text = bench.models.text
        cond, uncond = text.encode(list(request.prompts)), text.encode([request.negative] * len(request.seeds))
        self._context = {COND: cond, PERTURBED: cond, UNCOND: uncond}

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        call = Call(float(sigma[0]), self._step)
        changed = x
        for patch in self._latent_patches:
            changed = patch.before_call(changed, call)
        if changed is not x:
            x.copy_(changed)  # the sampler goes on from it
        with self._unet.open(call):
            denoised = self._denoised(x, sigma, call)
        if self._inpainting is not None:
            denoised = self._inpainting.in_call(denoised, call, self._mask_patches)
        self._bench.after_call(self._step, self._steps)
        if any(patch.ends_after(call) for patch in self._ending):
            raise _Ended(denoised)
        return denoised

    def _denoised(self, x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        wanted = [COND, *([PERTURBED] if self._pipeline.wants_perturbed(call) else [])]
        wanted += [] if self._pipeline.skips_uncond(call) else [UNCOND]
        made = self._predictions(x, sigma, call, wanted)
        cond, uncond = made[COND], made.get(UNCOND)
        raw = Predictions(
            x=x,
            cond=cond,
            uncond=uncond,
            scale=self._scale,
            call=call,
            perturbed=made.get(PERTURBED),
            predict=lambda noisy, kind: self._predictions(noisy, sigma, call, [kind])[kind],
        )
        return self._pipeline.guide(raw, cond if uncond is None else self._mix(cond, uncond), self._mix)

    def _mix(self, cond: Tensor, uncond: Tensor) -> Tensor:
        return uncond + self._scale * (cond - uncond)

    def _predictions(self, x: Tensor, sigma: Tensor, call: Call, kinds: list[str]) -> dict[str, Tensor]:
        """x0 of every kind, from one UNet evaluation."""
        call.rows = tuple(Row(kind, picture) for kind in kinds for picture in range(len(x)))
        context = torch.cat([self._context[kind] for kind in kinds])
        out = self._wrapper(torch.cat([x] * len(kinds)), torch.cat([sigma] * len(kinds)), cond=context)
        return dict(zip(kinds, out.chunk(len(kinds)), strict=True))

    def count_step(self, state: dict[str, Any]) -> None:
        self._step = state["i"] + 1


class _Eps:
    """The interface that k-diffusion's CompVisDenoiser expects of a latent diffusion model."""

    def __init__(self, bench: Bench, alphas_cumprod: Tensor) -> None:
        self._bench = bench
        self.alphas_cumprod = alphas_cumprod

    def apply_model(self, x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        self._bench.unet_calls += 1
        return self._bench.unet(x, timestep, context=cond)
