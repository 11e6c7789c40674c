"""The real k-diffusion samplers, without the training tools that its package imports along the way."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SAMPLERS = {
    "Euler": "sample_euler",
    "Euler a": "sample_euler_ancestral",
    "Heun": "sample_heun",
    "DPM2": "sample_dpm_2",
    "DPM++ 2M": "sample_dpmpp_2m",
    "DPM++ SDE": "sample_dpmpp_sde",
    "DPM++ 2M SDE": "sample_dpmpp_2m_sde",
    "DPM++ 3M SDE": "sample_dpmpp_3m_sde",
    "LMS": "sample_lms",
    "DPM adaptive": "sample_dpm_adaptive",
}
SCHEDULES = ("Normal", "Karras")


def _empty_package(name: str, path: list[str]) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = path
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    return module


def import_k_diffusion() -> types.SimpleNamespace:
    """`sampling` and `external` of k-diffusion; its __init__ would import datasets, metrics and torchvision."""
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("k-diffusion is not installed: run ./dev bench, which sets everything up")
        sys.modules["k_diffusion"] = _empty_package("k_diffusion", list(spec.submodule_search_locations))
    with _torchvision_in_name():
        sampling: Any = importlib.import_module("k_diffusion.sampling")
        external: Any = importlib.import_module("k_diffusion.external")
    return types.SimpleNamespace(sampling=sampling, external=external)


@contextmanager
def _torchvision_in_name() -> Iterator[None]:
    """k-diffusion's utilities name it at import. Gone afterwards: other packages ask whether it is installed."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    missing = {name: _empty_package(name, []) for name in names if name not in sys.modules}
    if "torchvision.transforms" in missing:
        transforms: Any = missing["torchvision.transforms"]
        transforms.functional = missing["torchvision.transforms.functional"]
    sys.modules.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def noise_levels(wrapper: Any, schedule: str, steps: int) -> Tensor:
    """Noise levels of a full run, highest first, ending in 0."""
    if schedule == "Karras":
        sigma_min, sigma_max = float(wrapper.sigmas[0]), float(wrapper.sigmas[-1])
        return import_k_diffusion().sampling.get_sigmas_karras(steps, sigma_min, sigma_max)
    return wrapper.get_sigmas(steps)


def planned_levels(name: str, sigmas: Tensor) -> tuple[float, ...]:
    """What a sampler says of its noise levels beforehand: all of them, or only their range if it chooses its own."""
    levels = tuple(float(sigma) for sigma in sigmas)
    function = getattr(import_k_diffusion().sampling, SAMPLERS[name])
    return levels if "sigmas" in inspect.signature(function).parameters else (levels[0], levels[-2])


def seeded_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Standard normal noise, one generator per picture, so that a picture does not depend on its batch mates."""
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def run_sampler(
    name: str, denoiser: Any, x: Tensor, sigmas: Tensor, seeds: Sequence[int], progress: Callable[[dict], None]
) -> Tensor:
    """Sample from x, latents [B, 4, h, w] already noised to sigmas[0]. Returns clean latents."""
    sampling = import_k_diffusion().sampling
    function = getattr(sampling, SAMPLERS[name])
    arguments: dict[str, Any] = {"callback": progress, "disable": True}
    names = inspect.signature(function).parameters
    if "noise_sampler" in names:
        arguments["noise_sampler"] = _noise_sampler(sampling, name, x, sigmas, seeds)
    if "sigmas" in names:
        arguments["sigmas"] = sigmas
    else:
        arguments |= {"sigma_max": float(sigmas[0]), "sigma_min": float(sigmas[-2])}
    return function(denoiser, x, **arguments)


def _noise_sampler(sampling: Any, name: str, x: Tensor, sigmas: Tensor, seeds: Sequence[int]) -> Any:
    if "SDE" in name:
        return sampling.BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max(), seed=list(seeds))
    generators = [torch.Generator().manual_seed(seed + 1_000_003) for seed in seeds]

    def draw(_sigma: Any, _sigma_next: Any) -> Tensor:
        return torch.stack([torch.randn(tuple(x.shape[1:]), generator=generator) for generator in generators])

    return draw
