"""The bench as a host: prompt in, pictures out, with the same plan and sites as in a WebUI."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan, make_plan
from lib_hires.registry import BY_NAME
from lib_hires.run import COND, FIRST_PASS, HIRES_PASS, IMG2IMG_PASS, PERTURBED, UNCOND, Call, ModelFacts, Run, Start
from lib_hires.samplers import Sampler
from lib_hires.sites import MaskBlend, NoisyLatent, Predictions
from lib_hires.topology import unet_topology

log = logging.getLogger("hires_plus")


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


class Interrupted(Exception):
    """Raised by a progress callback to stop; the bench's counterpart of a WebUI's Interrupt button."""


class Bench:
    """The embedded host. `after_call` is called after every denoiser call with (step, of)."""

    def __init__(self, models: BenchModels, after_call: Callable[[int, int], None] = lambda step, of: None) -> None:
        webui_ldm.install()
        self.models = models
        self.after_call = after_call
        self.unet_calls = 0
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
            latents = self._image_pass(request, request.init_images, IMG2IMG_PASS, request.denoise, generation, result)
        if request.hires_scale > 1:
            latents = self._hires_pass(request, latents, generation, result)
        result.latents = latents
        result.images = self.models.vae.decode(latents)
        result.seconds = time.perf_counter() - started
        result.unet_calls = self.unet_calls - calls_before
        return result

    def _text_pass(self, request: Request, generation: Generation, result: Result) -> Tensor:
        size = (4, request.height // LATENT_FACTOR, request.width // LATENT_FACTOR)
        sigmas = samplers.noise_levels(self._wrapper, request.schedule, request.steps)
        x = samplers.seeded_noise(size, request.seeds) * sigmas[0]
        return self._sample(request, x, sigmas, FIRST_PASS, generation, result)

    def _image_pass(
        self, request: Request, images: Tensor, pass_name: str, denoise: float, generation: Generation, result: Result
    ) -> Tensor:
        """Noise the encoded pictures to where `denoise` of the steps are left, and sample from there."""
        clean = self.models.vae.encode(images)
        skipped = min(int(request.steps * (1 - denoise)), request.steps - 1)
        sigmas = samplers.noise_levels(self._wrapper, request.schedule, request.steps)[skipped:]
        noise = samplers.seeded_noise(tuple(clean.shape[1:]), request.seeds)
        x = clean + noise * sigmas[0]
        inpainting = _inpainting(request, clean, generation) if pass_name == IMG2IMG_PASS else None
        return self._sample(request, x, sigmas, pass_name, generation, result, Start(clean, noise), inpainting)

    def _hires_pass(self, request: Request, latents: Tensor, generation: Generation, result: Result) -> Tensor:
        height, width = (
            round(side * request.hires_scale / LATENT_FACTOR) * LATENT_FACTOR
            for side in (request.height, request.width)
        )
        images = F.interpolate(self.models.vae.decode(latents), size=(height, width), mode="bicubic").clamp(0, 1)
        request = replace(request, steps=request.hires_steps or request.steps)
        return self._image_pass(request, images, HIRES_PASS, request.hires_denoise, generation, result)

    def _sample(
        self,
        request: Request,
        x: Tensor,
        sigmas: Tensor,
        pass_name: str,
        generation: Generation,
        result: Result,
        start: Start | None = None,
        inpainting: Inpainting | None = None,
    ) -> Tensor:
        run = Run(
            host="bench",
            pass_name=pass_name,
            model=self._facts,
            latent=(int(x.shape[-2]), int(x.shape[-1])),
            sigmas=samplers.planned_levels(request.sampler, sigmas),
            seed=request.seeds[0],
            sampler=Sampler(samplers.SAMPLERS[request.sampler]),
            start=start,
            mask=None if inpainting is None else inpainting.mask,
        )
        with _planned(run, generation, result) as plan:
            denoiser = _Denoiser(self, request, plan, self._wrapper, len(sigmas) - 1, inpainting)
            out = samplers.run_sampler(request.sampler, denoiser, x, sigmas, request.seeds, denoiser.count_step)
            return out if inpainting is None else inpainting.at_end(out, plan.at(MaskBlend))


def _inpainting(request: Request, clean: Tensor, generation: Generation) -> Inpainting | None:
    if request.mask is None:
        return None
    grey = any(BY_NAME[name].grey_mask for name in generation.selection)
    size = (int(clean.shape[-2]), int(clean.shape[-1]))
    mask = latent_mask(request.mask, size, rounded=request.blend == HARD and not grey)
    return Inpainting(mask, clean, request.blend)


@contextmanager
def _planned(run: Run, generation: Generation, result: Result) -> Iterator[Plan]:
    plan = make_plan(generation.selection, run)
    result.plans.append(plan)
    if generation.selection:
        log.info(plan.report())
    try:
        yield plan
    finally:
        generation.finish_run(plan)


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
        call.rows = tuple(kind for kind in kinds for _ in range(len(x)))
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
        return self._bench.models.unet(x, timestep, context=cond)
