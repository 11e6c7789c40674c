"""Nothing outlives a run on the bench: after a fault, an interrupt or a change of anything, plain is plain again."""

import logging

import pytest
import torch

from lib_hires.generation import Generation
from lib_hires.hosts.bench.pipeline import Interrupted, Request
from lib_hires.hosts.bench.samplers import SAMPLERS
from lib_hires.techniques.unet.deep_shrink import DeepShrinkSettings

ON = DeepShrinkSettings(only_above_native=False, end=0.6, gradual=0.8)


def request(**changes):
    return Request(**{"prompts": ("a red ring",), "seeds": (5,), "width": 96, "height": 64, "steps": 4} | changes)


def shrink(**changes):
    return Generation(
        {"deep_shrink": DeepShrinkSettings(**{"only_above_native": False, "end": 0.6, "gradual": 0.8} | changes)}
    )


@pytest.fixture(scope="module")
def plain(bench):
    return bench.generate(request()).latents


def hooks(bench):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bench.models.unet.modules())


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "DPM adaptive"])
def test_every_sampler_is_changed_while_on_and_the_same_as_before_afterwards(bench, sampler):
    before = bench.generate(request(sampler=sampler)).latents
    generation = shrink()
    changed = bench.generate(request(sampler=sampler), generation).latents
    after = bench.generate(request(sampler=sampler)).latents
    assert generation.acted == {"deep_shrink"}
    assert changed.isfinite().all() and not torch.equal(changed, before)
    assert torch.equal(before, after)


def test_dpm_adaptive_which_plans_only_a_range(bench):
    small = request(sampler="DPM adaptive")
    before = bench.generate(small).latents
    changed = bench.generate(small, shrink()).latents
    assert changed.isfinite().all() and not torch.equal(changed, before)


def test_a_fault_inside_the_unet_at_step_3_leaves_nothing_behind(bench, plain):
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    handle = bench.models.unet.middle_block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.generate(request(), shrink())
    handle.remove()
    assert hooks(bench) == 0
    assert torch.equal(bench.generate(request()).latents, plain)


def test_an_interrupt_leaves_nothing_behind_and_keeps_what_was_done(bench, plain):
    def stop(step, of):
        if step == 2:
            raise Interrupted

    bench.after_call = stop
    generation = shrink()
    with pytest.raises(Interrupted):
        bench.generate(request(), generation)
    bench.after_call = lambda step, of: None
    assert generation.acted == {"deep_shrink"}
    assert hooks(bench) == 0
    assert torch.equal(bench.generate(request()).latents, plain)


@pytest.mark.parametrize("neutral", [{"factor": 1.0}, {"start": 0.98, "end": 0.99, "gradual": 0.0}])
def test_neutral_is_bit_identical_to_off(bench, plain, neutral):
    assert torch.equal(bench.generate(request(), shrink(**neutral)).latents, plain)


def test_the_gate_is_bit_identical_to_off_at_native_size(bench, plain):
    generation = shrink(only_above_native=True)
    assert torch.equal(bench.generate(request(), generation).latents, plain)
    assert not generation.acted and not generation.refused


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM++ 2M SDE"])
def test_a_picture_does_not_depend_on_its_batch_mates(bench, sampler):
    prompts, seeds = ("a red ring", "a blue disc", "a green square"), (1, 2, 3)
    together = bench.generate(request(prompts=prompts, seeds=seeds, sampler=sampler), shrink()).latents
    alone = bench.generate(request(prompts=prompts[1:2], seeds=seeds[1:2], sampler=sampler), shrink()).latents
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)


def test_passes_are_chosen_one_by_one(bench, caplog):
    with caplog.at_level(logging.INFO, "hires_plus"):
        result = bench.generate(request(hires_scale=1.5), shrink(passes="Hires pass"))
    first, hires = result.plans
    assert not first.patches and hires.patches["deep_shrink"].fired
    assert len(caplog.records) == 2 and "hires pass" in caplog.records[1].message
    assert "block 3 shrunk by 2" in caplog.records[1].message


def test_a_schedule_restarts_with_the_hires_pass(bench):
    """Half of a pass is half of that pass's own noise, not of the model's whole range."""
    result = bench.generate(request(hires_scale=1.5, hires_denoise=0.5), shrink(end=0.5, gradual=0.0))
    stages = [plan.patches["deep_shrink"]._stages[0] for plan in result.plans]
    assert stages[0].full.lower > stages[1].full.lower
    assert [plan.patches["deep_shrink"].fired > 0 for plan in result.plans] == [True, True]


def test_img2img(bench):
    pictures = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    plain = bench.generate(request(init_images=pictures, denoise=0.7))
    changed = bench.generate(request(init_images=pictures, denoise=0.7), shrink(passes="Hires pass"))
    assert changed.plans[0].run.pass_name == "img2img"
    assert not torch.equal(plain.latents, changed.latents)


@pytest.mark.parametrize("size", [(72, 104), (56, 136), (200, 8)])
def test_odd_sizes(bench, size):
    result = bench.generate(request(width=size[0], height=size[1], steps=2), shrink())
    assert result.images.shape[-2:] == (size[1], size[0])
    assert result.latents.isfinite().all()


def test_a_request_with_an_impossible_size_says_which():
    with pytest.raises(ValueError, match="width = 100 is not a positive multiple of 8"):
        request(width=100)
