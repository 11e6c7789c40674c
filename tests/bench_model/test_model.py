"""The committed weights: they load, fit, reconstruct at several sizes and draw the right number of objects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib_hires.hosts.bench import model as bench_model
from lib_hires.hosts.bench import scenes
from lib_hires.hosts.bench.counter import count_objects
from lib_hires.hosts.bench.pipeline import Bench, Request


@pytest.fixture(scope="module")
def models() -> bench_model.BenchModels:
    return bench_model.load_models()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    return (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    return -10 * math.log10(float(F.mse_loss(image, reference)))


def test_the_unet_has_the_topology_of_sd15(models: bench_model.BenchModels) -> None:
    assert len(models.unet.input_blocks) == len(models.unet.output_blocks) == 12
    with_attention = [any("attn2" in name for name, _ in block.named_modules()) for block in models.unet.input_blocks]
    assert [index for index, found in enumerate(with_attention) if found] == [1, 2, 4, 5, 7, 8]


def test_the_weights_are_small_enough_to_commit() -> None:
    assert sum(path.stat().st_size for path in bench_model.WEIGHTS_DIR.iterdir()) < 20_000_000


def test_weights_are_finite_and_frozen(models: bench_model.BenchModels) -> None:
    for parameter in models.unet.parameters():
        assert parameter.dtype == torch.float32 and not parameter.requires_grad
        assert torch.isfinite(parameter).all()


def test_the_schedule_is_that_of_sd15(models: bench_model.BenchModels) -> None:
    assert models.alphas_cumprod.shape == (1000,)
    assert float(models.alphas_cumprod[0]) == pytest.approx(0.99915, abs=1e-5)
    assert float(models.alphas_cumprod[-1]) == pytest.approx(0.00466, abs=1e-4)


def test_latents_have_unit_deviation(models: bench_model.BenchModels) -> None:
    latents = models.vae.encode(scenes.render_batch(scenes.sample_scenes(21, 32), 128, 128))
    assert latents.shape == (32, 4, 16, 16)
    assert float(latents.std()) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("factor, number", [(1, 12), (2, 6)])
def test_scenes_survive_the_autoencoder(models: bench_model.BenchModels, factor: int, number: int) -> None:
    batch = scenes.balanced_scenes(20 + factor, number)
    images = scenes.render_batch(batch, 128 * factor, 128 * factor)
    decoded = models.vae.decode(models.vae.encode(images))
    assert psnr(decoded, images) > 26
    for scene, image in zip(batch, to_uint8(decoded), strict=True):
        result = count_objects(image, scene.colour)
        assert (result.count, result.any_colour_count) == (1, 1), scene
        assert result.holes == (scene.shape == "ring")


def test_the_model_draws_one_object_at_its_native_size(models: bench_model.BenchModels) -> None:
    chosen = [0, 3, 7, 10, 13, 17, 18, 23]
    prompts = tuple(scenes.CAPTIONS[index] for index in chosen)
    images = Bench(models).generate(Request(prompts, tuple(chosen))).pictures
    counts = [count_objects(image, prompt.split()[1]).count for prompt, image in zip(prompts, images, strict=True)]
    assert counts.count(1) >= 7, counts
