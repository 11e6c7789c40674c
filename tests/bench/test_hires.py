"""The techniques of the hires pass inside the bench: real UNet, real samplers, the host's reference."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib_hires.generation import Generation
from lib_hires.hosts.bench import compare_rows, samplers
from lib_hires.hosts.bench.pipeline import Request
from lib_hires.registry import BY_NAME
from lib_hires.techniques.hires.iterative_mixing import DENOISED, LATENT, IterativeMixingSettings
from lib_hires.techniques.hires.low_band_lock import LowBandLockSettings

REQUEST = Request(("a red disc", "a blue ring"), (1, 2), 64, 64, steps=4, hires_scale=1.5, hires_denoise=0.8)


def draw(bench, request=REQUEST, **selection):
    generation = Generation(selection)
    return bench.generate(request, generation), generation


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_the_first_pass_rests_and_the_hires_pass_mixes_in_every_sampler(bench, sampler):
    request = replace(REQUEST, sampler=sampler)
    plain, _ = draw(bench, request)
    mixed, _ = draw(bench, request, iterative_mixing=IterativeMixingSettings(), low_band_lock=LowBandLockSettings())
    first, second = mixed.plans
    assert not first.patches and "Iterative mixing" in first.resting and not second.unfired()
    assert list(second.patches) == ["iterative_mixing", "low_band_lock"]
    assert mixed.latents.isfinite().all() and not torch.equal(plain.latents, mixed.latents)


def test_a_share_of_0_is_the_plain_hires_pass_bit_for_bit(bench):
    nothing = IterativeMixingSettings(maximum=0.0)
    assert torch.equal(draw(bench)[0].latents, draw(bench, iterative_mixing=nothing)[0].latents)


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM++ 2M SDE"])
def test_a_whole_share_returns_the_reference(bench, sampler):
    request = replace(REQUEST, sampler=sampler)
    whole = IterativeMixingSettings(minimum=1.0, space=DENOISED)
    result, _ = draw(bench, request, iterative_mixing=whole)
    torch.testing.assert_close(result.latents, result.plans[1].run.start.latent, rtol=0, atol=1e-4)


@pytest.mark.parametrize("space", [LATENT, DENOISED])
def test_a_picture_does_not_depend_on_its_batch_mates(bench, space):
    settings = IterativeMixingSettings(space=space, detail="Automatic")
    both, _ = draw(bench, iterative_mixing=settings)
    second = replace(REQUEST, prompts=REQUEST.prompts[1:], seeds=REQUEST.seeds[1:])
    alone, _ = draw(bench, second, iterative_mixing=settings)
    torch.testing.assert_close(both.latents[1:], alone.latents, rtol=1e-3, atol=1e-3)


def test_they_compose_with_what_acts_inside_the_unet_and_on_guidance(bench):
    others = {name: BY_NAME[name].settings() for name in ("deep_shrink", "dilation", "scale_fusion", "apg", "pag")}
    request = replace(REQUEST, width=128, height=128)
    result, generation = draw(
        bench, request, iterative_mixing=IterativeMixingSettings(), low_band_lock=LowBandLockSettings(), **others
    )
    assert len(result.plans[1].patches) == 7 and not result.plans[1].unfired()
    assert result.latents.isfinite().all() and not generation.refused


def test_every_row_of_the_hires_group_acts_in_its_hires_pass(bench):
    for name in compare_rows.HIRES_ROWS | compare_rows.RECIPE_ROWS:
        row = compare_rows.ROWS[name]
        request = Request(("a red disc",), (1,), 128, 128, steps=3, hires_scale=2.0, hires_denoise=row.hires_denoise)
        result = bench.generate(request, row.generation())
        assert (row.width, row.height) == tuple(result.images.shape[-2:])
        asked = {name for name in row.selection() if BY_NAME[name].begin is not None}  # a cascade only divides
        relayed = asked & {"relay"}  # it ends the first pass; the others wait for the second
        assert set(result.plans[0].patches) == relayed and set(result.plans[1].patches) == asked - relayed
        assert not result.plans[1].unfired()


def test_work_is_counted_as_on_the_meta_device(bench):
    """Four evaluations of cond and uncond at each size, counted without being computed."""
    with bench.unet.counting():
        draw(bench, replace(REQUEST, prompts=("a red disc",), seeds=(1,), hires_denoise=0.5))
    on_meta = copy.deepcopy(bench.models.unet).to("meta")
    words = bench.models.text.encode(["a red disc"]).shape[-2:]

    def once(side):
        x, t, c = (torch.empty(shape, device="meta") for shape in ((2, 4, side, side), (2,), (2, *words)))
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            on_meta(x, t, context=c)
        return counter.get_total_flops()

    assert bench.unet.operations == 4 * once(8) + 4 * once(12)
    draw(bench)
    assert bench.unet.operations == 4 * once(8) + 4 * once(12), "counted only where it is asked for"
