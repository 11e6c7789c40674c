"""Stages and relay on the bench: a stage is a run of its own size, and a relay ends one pass where the next begins."""

import pytest
import torch

from lib_hires.generation import Generation
from lib_hires.hosts.bench.pipeline import Request
from lib_hires.hosts.bench.samplers import SAMPLERS
from lib_hires.techniques.hires.cascade import CascadeSettings
from lib_hires.techniques.hires.relay import RelaySettings
from lib_hires.techniques.unet.deep_shrink import DeepShrinkSettings


def request(**changes):
    small = {"prompts": ("a red ring",), "seeds": (5,), "width": 48, "height": 32, "steps": 4, "hires_scale": 4.0}
    return Request(**small | changes)


def test_every_stage_is_a_run_of_its_own_size(bench):
    generation = Generation({"cascade": CascadeSettings(cleanup=0.3)})
    result = bench.generate(request(), generation)
    runs = [plan.run for plan in result.plans]
    assert [(run.stage, run.latent) for run in runs] == [
        ("", (4, 6)),
        ("stage 1 of 3", (8, 12)),
        ("stage 2 of 3", (16, 24)),
        ("clean-up", (16, 24)),
    ]
    assert generation.acted == {"cascade"} and generation.in_stage is None
    assert result.images.shape[-2:] == (128, 192) and result.latents.isfinite().all()


def test_one_stage_is_the_hosts_own_pass_bit_for_bit(bench):
    plain = bench.generate(request(hires_scale=2.0)).latents
    generation = Generation({"cascade": CascadeSettings()})
    assert torch.equal(bench.generate(request(hires_scale=2.0), generation).latents, plain)
    assert not generation.acted and "Cascade" in generation.rested


def test_settings_change_with_the_stage(bench):
    changes = CascadeSettings(changes="deep_shrink.factor = 2, 4", steps="2, 3")
    generation = Generation({"cascade": changes, "deep_shrink": DeepShrinkSettings(only_above_native=False)})
    plans = bench.generate(request(), generation).plans
    assert [len(plan.run.sigmas) for plan in plans] == [5, 3, 4]
    told = [plan.patches["deep_shrink"].describe() for plan in plans[1:]]
    assert told[0] != told[1]


@pytest.mark.parametrize(
    ("cascade", "factors"),
    [
        (CascadeSettings(), ["2", "4"]),
        (CascadeSettings(cleanup=0.2), ["2", "4", "4"]),
        (CascadeSettings(changes="deep_shrink.factor = 3, 5"), ["3", "5"]),
        (CascadeSettings(follow_size=False), ["1.5", "1.5"]),
        (CascadeSettings(factors="4"), ["1.5"]),
    ],
)
def test_deep_shrink_follows_the_size_of_the_stages(bench, cascade, factors):
    generation = Generation({"cascade": cascade, "deep_shrink": DeepShrinkSettings(factor=1.5)})
    plans = bench.generate(request(width=128, height=128, steps=1), generation).plans
    told = [plan.patches["deep_shrink"].describe().split(" from ")[0] for plan in plans[1:]]
    assert told == [f"block 3 shrunk by {factor}" for factor in factors]
    assert not generation.notes


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "DPM adaptive"])
def test_a_relay_saves_evaluations_with_every_sampler(bench, sampler):
    asked = request(hires_scale=2.0, steps=8, sampler=sampler)
    plain = bench.generate(asked)
    generation = Generation({"relay": RelaySettings(share=0.5, matched=False)})
    relayed = bench.generate(asked, generation)
    assert generation.acted == {"relay"} and relayed.latents.isfinite().all()
    assert relayed.unet_calls < plain.unet_calls
    assert torch.equal(bench.generate(asked).latents, plain.latents)


def test_a_relay_returns_what_the_last_call_of_the_first_pass_predicted(bench):
    """Euler's last step goes to the prediction itself, so a run that ends there is the plain one."""
    asked = request(steps=4, hires_scale=1.0)
    plain = bench.generate(asked).latents
    bench_generation = Generation({"relay": RelaySettings(share=0.05)})
    followed = request(steps=4, hires_scale=2.0)
    first = []
    hires_pass = bench._hires_pass
    try:
        bench._hires_pass = lambda request, latents, *rest: (
            first.append(latents),
            hires_pass(request, latents, *rest),
        )[1]
        bench.generate(followed, bench_generation)
    finally:
        del bench._hires_pass
    torch.testing.assert_close(first[0], plain, rtol=0, atol=1e-5)


def test_a_relay_refuses_a_sampler_that_plans_no_steps(bench):
    generation = Generation({"relay": RelaySettings()})
    bench.generate(request(hires_scale=2.0, sampler="DPM adaptive", width=32), generation)
    assert "chooses its own steps" in generation.refused["Relay"]
