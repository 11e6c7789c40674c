"""Inpainting on the bench's real UNet and samplers, and the measures that are published of it."""

import pytest
import torch

from lib_hires.generation import Generation
from lib_hires.hosts.bench.blend import HARD, SOFT, SOFT_INPAINTING
from lib_hires.hosts.bench.inpaint import DIFFERENTIAL, Measures, measure, ramps, sample_pictures, seam_energy, table
from lib_hires.hosts.bench.pipeline import Request
from lib_hires.hosts.bench.samplers import SAMPLERS
from lib_hires.techniques.inpaint.differential_diffusion import DifferentialDiffusionSettings

SIZE = 64


def differential(**values):
    return Generation({"differential_diffusion": DifferentialDiffusionSettings(**values)})


def request(**changes):
    image = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    base = {"prompts": ("a red ring", "a blue disc"), "seeds": (1, 2), "width": SIZE, "height": SIZE, "steps": 4}
    return Request(**base | {"init_images": image, "denoise": 1.0, "mask": ramps(SIZE)[:1]} | changes)


def clean(bench, asked):
    with torch.inference_mode():
        return bench.models.vae.encode(asked.init_images)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_black_is_the_pictures_latent_and_white_is_not(bench, sampler):
    asked, generation = request(sampler=sampler), differential()
    latents = bench.generate(asked, generation).latents
    assert generation.acted == {"differential_diffusion"} and latents.isfinite().all()
    assert torch.equal(latents[..., 0], clean(bench, asked)[..., 0])
    assert (latents[..., -1] - clean(bench, asked)[..., -1]).abs().mean() > 0.1


def test_strength_0_is_the_soft_mask_and_a_plain_request_is_rounded(bench):
    soft = bench.generate(request(blend=SOFT)).latents
    assert torch.equal(bench.generate(request(), differential(strength=0.0)).latents, soft)
    hard = bench.generate(request()).latents
    assert torch.equal(bench.generate(request(mask=ramps(SIZE)[:1].round())).latents, hard)
    assert not torch.equal(hard, soft)


def test_a_white_mask_is_plain_img2img(bench):
    asked = request(mask=torch.ones(1, 1, SIZE, SIZE))
    for generation in (Generation(), differential()):
        assert torch.equal(bench.generate(asked, generation).latents, bench.generate(request(mask=None)).latents)


def test_each_picture_may_have_a_mask_of_its_own(bench):
    both = bench.generate(request(mask=ramps(SIZE)[:2], denoise=0.8), differential()).latents
    for i in range(2):
        one = request(
            prompts=request().prompts[i : i + 1], seeds=(i + 1,), mask=ramps(SIZE)[i : i + 1], denoise=0.8,
            init_images=request().init_images[i : i + 1],
        )  # fmt: skip
        torch.testing.assert_close(bench.generate(one, differential()).latents, both[i : i + 1], rtol=1e-3, atol=1e-3)


def test_nothing_is_left_for_the_next_picture(bench):
    plain = bench.generate(request()).latents
    bench.generate(request(), differential())
    assert torch.equal(bench.generate(request()).latents, plain)
    bench.after_call = lambda step, of: 1 / 0 if step == 2 else None
    with pytest.raises(ZeroDivisionError):
        bench.generate(request(), differential())
    bench.after_call = lambda step, of: None
    assert torch.equal(bench.generate(request()).latents, plain)


def test_without_a_mask_it_rests(bench):
    generation = differential()
    plans = bench.generate(request(mask=None), generation).plans
    assert "no mask" in plans[0].resting["Differential Diffusion"] and not generation.acted


def test_every_value_of_the_ramps_is_at_every_place():
    masks = ramps(SIZE, 8)
    torch.testing.assert_close(masks.mean(0), torch.full((1, SIZE, SIZE), 0.5))
    assert torch.equal(masks[0, 0, 0, ::8], torch.linspace(0, 1, 8))


def test_seam_energy_is_of_the_jumps_that_are_new():
    original = torch.rand(1, 3, 8, 8)
    assert seam_energy(original + 0.3, original) < 1e-12
    stepped = original.clone()
    stepped[..., 4:] += 0.5
    assert seam_energy(stepped, original) == pytest.approx(0.25, rel=1e-4)


def test_the_measures(bench):
    """On random weights: what holds by construction. Seams are of pictures, and are measured with the trained model."""
    measured = measure(bench, sample_pictures(1, SIZE), steps=3, denoise=1.0)
    assert list(measured) == [HARD, SOFT, SOFT_INPAINTING, DIFFERENTIAL]
    differential_ = measured[DIFFERENTIAL]
    assert differential_.change[0] == 0 and differential_.black_changed == 0
    assert differential_.change[-1] > differential_.change[1]
    assert measured[HARD].change[3] == 0 and differential_.change[3] > 0
    assert "yes" in table({"a": Measures([0, 1, 1], 0, 0.5)}) and "no" in table({"a": Measures([0, 2, 1], 0, 0.5)})
