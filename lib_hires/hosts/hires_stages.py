"""Stages of a hires pass in A1111 and the Forge family: the host's own hires pass, once for each stage.

An instance attribute of this generation's `p` stands in for the method that the host calls after the first pass (in
img2img: for the whole sampling). It sets what the stage wants on `p`, calls the host's method, takes its picture as the
next beginning, and puts everything back. Both go with `p`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib_hires.generation import Generation
from lib_hires.hosts.instance import instance_attribute
from lib_hires.hosts.webui import adapter_for
from lib_hires.run import Size
from lib_hires.stage_plan import divides, in_stage, plan_stages
from lib_hires.stages import CELL, HiresPass, Stage

_METHODS = ("sample_hr_pass", "sample")
_OURS = "hires_plus_stages"

HostPass = Callable[..., Any]


def attach_stages(p: Any, generation: Generation) -> None:
    """Let this generation's hires pass run in stages. `p` may be the copy of one that was used before (X/Y/Z)."""
    for name in _METHODS:
        if hasattr(vars(p).get(name), _OURS):  # also one that came along with a copy of p
            delattr(p, name)
    if not divides(generation.selection):
        return
    if getattr(p, "enable_hr", False):
        _stand_in(p, "sample_hr_pass", TextStages(p, generation).run)
    elif not hasattr(p, "enable_hr"):
        _stand_in(p, "sample", ImageStages(p, generation).run)


def _stand_in(p: Any, name: str, run: Callable[..., Any]) -> None:
    original = getattr(p, name)

    def stages(*args: Any, **kwargs: Any) -> Any:
        return run(original, *args, **kwargs)

    setattr(stages, _OURS, True)
    setattr(p, name, stages)


class TextStages:
    """txt2img: the host's `sample_hr_pass(samples, decoded_samples, ...)`, once for each stage."""

    def __init__(self, p: Any, generation: Generation) -> None:
        self._p = p
        self._generation = generation
        self._announced = False  # p samples several batches

    def run(
        self, host_pass: HostPass, samples: Any, decoded: Any, seeds: Any, subseeds: Any, strength: Any, prompts: Any
    ) -> Any:
        p = self._p
        base = _pixels(decoded) if decoded is not None else _cells(samples)
        target = (int(p.hr_upscale_to_y), int(p.hr_upscale_to_x))
        asked = int(getattr(p, "hr_second_pass_steps", 0) or 0) or None
        hires = HiresPass(base, target, self._generation.first, asked, native=_native(p))
        stages = plan_stages(self._generation, hires)
        self._announce(stages)
        finished: Any = None
        for number, stage in enumerate(stages):
            with self._stage(number, stages):
                made = host_pass(samples, decoded, seeds, subseeds, strength, prompts)
            if finished is not None and _stopped():
                return finished  # the last stage that is whole
            finished, samples, decoded = made, self._generation.latent, _stacked(made)
            if stage.save:
                _save(p, decoded, number, seeds, prompts)
        return finished

    @contextmanager
    def _stage(self, number: int, stages: Sequence[Stage]) -> Iterator[None]:
        """What the host's pass reads from p, as this stage wants it."""
        p, stage = self._p, stages[number]
        height, width = stage.size
        values: dict[str, Any] = {"hr_upscale_to_x": width, "hr_upscale_to_y": height}
        if stage is not _last_growing(stages):  # what the host crops belongs to its target size
            values |= {"truncate_x": 0, "truncate_y": 0}
        if stage.denoise is not None:
            values["denoising_strength"] = stage.denoise
        if stage.steps is not None:
            values["hr_second_pass_steps"] = stage.steps
        if stage.cfg_scale is not None:
            values["hr_cfg" if hasattr(p, "hr_cfg") else "cfg_scale"] = stage.cfg_scale
        with in_stage(self._generation, number, stages), _attributes(p, values):
            yield

    def _announce(self, stages: Sequence[Stage]) -> None:
        """The host counts one hires job for each batch in its progress bar."""
        if not self._announced:
            self._announced = True
            _more_jobs((len(stages) - 1) * max(int(getattr(self._p, "n_iter", 1)), 1))


class ImageStages:
    """img2img: the host's `sample`, once for each stage, from the picture that was given to the size that was asked."""

    def __init__(self, p: Any, generation: Generation) -> None:
        self._p = p
        self._generation = generation

    def run(self, host_sample: HostPass, *args: Any, **more: Any) -> Any:
        p = self._p
        target = _cells(p.init_latent)
        stages = self._plan(target)
        if len(stages) == 1 and stages[0] == Stage(target):
            return host_sample(*args, **more)
        _more_jobs(len(stages) - 1)
        given, finished = p.init_latent, None
        kept = {name: getattr(p, name) for name in ("init_latent", "image_conditioning", "rng", "sampler")}
        with _attributes(p, kept):  # the next batch begins with them
            for number, stage in enumerate(stages):
                if number or stage.size != target:
                    self._begin(given if finished is None else finished, stage.size)
                with in_stage(self._generation, number, stages), _attributes(p, self._values(stage)):
                    made = host_sample(*args, **more)
                if finished is not None and _stopped():
                    return finished
                finished = made
                if stage.save:
                    _save(p, _decoded(p, finished), number, p.seeds, p.prompts)
        return finished

    def _plan(self, target: Size) -> list[Stage]:
        p = self._p
        masked = getattr(p, "mask", None) is not None or getattr(p, "image_mask", None) is not None
        width, height = p.init_images[0].size
        return plan_stages(self._generation, HiresPass((height, width), target, masked=masked, native=_native(p)))

    def _values(self, stage: Stage) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if stage.denoise is not None:
            values["denoising_strength"] = stage.denoise
        if stage.steps is not None:
            values["steps"] = stage.steps
        if stage.cfg_scale is not None:
            values["cfg_scale"] = stage.cfg_scale
        return values

    def _begin(self, latent: Any, size: Size) -> None:
        """Everything that the host's sampling begins with, at this size, from the picture of the stage before."""
        from modules import rng, sd_samplers

        p = self._p
        pixels, p.init_latent = _resized(p, _decoded(p, latent), size)
        p.image_conditioning = p.img2img_image_conditioning(pixels * 2 - 1, p.init_latent)
        p.rng = rng.ImageRNG(
            p.init_latent.shape[1:],
            p.seeds,
            subseeds=p.subseeds,
            subseed_strength=p.subseed_strength,
            seed_resize_from_h=p.seed_resize_from_h,
            seed_resize_from_w=p.seed_resize_from_w,
        )
        p.sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)


@contextmanager
def _attributes(target: Any, values: dict[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(instance_attribute(target, name, value))
        yield


def _last_growing(stages: Sequence[Stage]) -> Stage:
    return [stage for stage in stages if not stage.cleanup][-1]


def _native(p: Any) -> Size:
    height, width = adapter_for(p.sd_model).model_facts(p.sd_model).native
    return height * CELL, width * CELL


def _pixels(images: Any) -> Size:
    return int(images.shape[-2]), int(images.shape[-1])


def _cells(latent: Any) -> Size:
    return int(latent.shape[-2]) * CELL, int(latent.shape[-1]) * CELL


def _stacked(decoded: Any) -> Any:
    """Pictures [B, 3, H, W] in -1..1, as the host hands them to its hires pass: it decodes them one by one."""
    return decoded if isinstance(decoded, torch.Tensor) else torch.stack(list(decoded)).float()


def _stopped() -> bool:
    from modules import shared

    return bool(shared.state.interrupted or shared.state.skipped)


def _more_jobs(count: int) -> None:
    from modules import shared

    if shared.state.job_count > 0:
        shared.state.job_count += count


def _save(p: Any, pictures: Any, number: int, seeds: Any, prompts: Any) -> None:
    """Save the pictures [B, 3, H, W] (-1..1) of a stage beside the final ones."""
    from modules import images, shared
    from modules.processing import create_infotext

    for index, picture in enumerate(pictures):
        info = create_infotext(
            p, p.all_prompts, p.all_seeds, p.all_subseeds, [], iteration=p.iteration, position_in_batch=index
        )
        images.save_image(
            _image(picture), p.outpath_samples, "", seeds[index], prompts[index], shared.opts.samples_format,
            info=info, p=p, suffix=f"-stage-{number + 1}",
        )  # fmt: skip


def _image(picture: Any) -> Image.Image:
    """A picture [3, H, W] in -1..1 as the host's upscalers and files take it."""
    return Image.fromarray(((picture.clamp(-1, 1) + 1) * 127.5).cpu().numpy().transpose(1, 2, 0).astype(np.uint8))


def _decoded(p: Any, latent: Any) -> Any:
    """Pictures [B, 3, H, W] in -1..1 on the CPU."""
    from modules import devices
    from modules.processing import decode_latent_batch

    return _stacked(decode_latent_batch(p.sd_model, latent, target_device=devices.cpu, check_for_nans=True))


def _resized(p: Any, pictures: Any, size: Size) -> tuple[Any, Any]:
    """(pictures in 0..1, latents) at `size`, by the host's upscaler for img2img."""
    from modules import devices, images, shared
    from modules.sd_samplers_common import images_tensor_to_samples

    height, width = size
    resized = []
    for picture in pictures:
        image = images.resize_image(0, _image(picture), width, height, upscaler_name=shared.opts.upscaler_for_img2img)
        resized.append(torch.from_numpy(np.array(image).astype(np.float32) / 255).permute(2, 0, 1))
    tensor = torch.stack(resized).to(shared.device, dtype=getattr(devices, "dtype_vae", torch.float32))
    return tensor, images_tensor_to_samples(tensor, None, p.sd_model)
