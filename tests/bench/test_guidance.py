"""Guidance on the bench's real UNet and samplers: alone, in any combination, neutral, after a fault."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hires.generation import Generation
from lib_hires.hosts.bench.pipeline import Request
from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.settings import read_settings

NAMES = tuple(technique.name for technique in TECHNIQUES if technique.family == "Guidance")
NEUTRAL = {
    "tcfg": {"strength": 0.0},
    "fresca": {"scale_low": 1.0, "scale_high": 1.0},
    "apg": {"eta": 1.0, "norm_threshold": 0.0, "momentum": 0.0},
    "rescale_cfg": {"multiplier": 0.0},
    "renorm_cfg": {"renorm": 0.0},
    "cfg_norm": {"strength": 0.0},
    "pag": {"scale": 0.0},
    "sag": {"scale": 0.0},
}
SHRINK = BY_NAME["deep_shrink"].settings(only_above_native=False, factor=1.5, end=0.6, gradual=0.8)


def request(**changes):
    base = {"prompts": ("a red ring",), "seeds": (5,), "width": 64, "height": 48, "steps": 3, "cfg_scale": 5.0}
    return Request(**base | changes)


def asking(*names, **changes):
    return Generation({name: read_settings(BY_NAME[name].settings, changes)[0] for name in names})


@pytest.fixture(scope="module")
def plain(bench):
    return bench.generate(request()).latents


@pytest.mark.parametrize("name", NAMES)
def test_each_changes_the_picture_and_the_next_one_is_plain_again(bench, plain, name):
    generation = asking(name)
    changed = bench.generate(request(), generation).latents
    assert generation.acted == {name}
    assert changed.isfinite().all() and not torch.equal(changed, plain)
    assert torch.equal(bench.generate(request()).latents, plain)


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_is_bit_identical_to_off(bench, plain, name):
    assert torch.equal(bench.generate(request(), asking(name, **NEUTRAL[name])).latents, plain)


@given(names=st.sets(st.sampled_from(NAMES)), shrunk=st.booleans(), cfg_scale=st.sampled_from([1.0, 5.0, 15.0]))
@settings(max_examples=25)
def test_any_subset_runs_in_the_one_order(bench, names, shrunk, cfg_scale):
    generation = asking(*names)
    selection = dict(generation.selection) | ({"deep_shrink": SHRINK} if shrunk else {})
    result = bench.generate(request(cfg_scale=cfg_scale, steps=2), Generation(selection))
    assert result.latents.isfinite().all()
    plan = result.plans[0]
    assert not plan.refused
    assert list(plan.patches) == [technique.name for technique in TECHNIQUES if technique.name in plan.patches]
    titles = [BY_NAME[name].title for name in plan.patches]
    places = [plan.report().index(f"{title}: ") for title in titles]
    assert places == sorted(places)


def test_a_picture_does_not_depend_on_its_batch_mates(bench):
    prompts, seeds = ("a red ring", "a blue disc", "a green square"), (1, 2, 3)
    together = bench.generate(request(prompts=prompts, seeds=seeds), asking(*NAMES)).latents
    alone = bench.generate(request(prompts=prompts[1:2], seeds=seeds[1:2]), asking(*NAMES)).latents
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)


def test_a_prediction_of_its_own_costs_rows_or_an_evaluation(bench):
    rows = []
    handle = bench.models.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for names in ((), ("pag",), ("sag",), ("pag", "sag")):
        bench.generate(request(steps=1), asking(*names))
    bench.generate(request(steps=1), asking("renorm_cfg", guidance_from=0.9))
    handle.remove()
    assert rows == [2, 3, 2, 1, 3, 1, 1]


def test_a_fault_leaves_nothing_behind(bench, plain):
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:  # SAG's own evaluation in the second step
            raise RuntimeError("out of memory")

    handle = bench.models.unet.middle_block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.generate(request(), asking(*NAMES))
    handle.remove()
    modules = list(bench.models.unet.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)
    assert torch.equal(bench.generate(request()).latents, plain)


@pytest.mark.parametrize("size", [(72, 104), (56, 136), (200, 8)])
def test_odd_sizes(bench, size):
    generation = asking(*NAMES)
    generation = Generation({"deep_shrink": SHRINK, **generation.selection})
    result = bench.generate(request(width=size[0], height=size[1], steps=2), generation)
    assert result.latents.isfinite().all() and not generation.refused
    assert generation.acted >= set(NAMES)


def test_the_hires_pass_and_img2img(bench):
    generation = asking(*NAMES)
    result = bench.generate(request(hires_scale=1.5, steps=2), generation)
    assert [set(plan.patches) for plan in result.plans] == [set(NAMES)] * 2
    assert all(patch.fired for plan in result.plans for patch in plan.patches.values())
    pictures = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    pictured = bench.generate(request(init_images=pictures, denoise=0.7), asking(*NAMES))
    assert pictured.latents.isfinite().all() and not pictured.plans[0].unfired()


@pytest.mark.parametrize("sampler", ["Heun", "DPM++ SDE", "DPM++ 2M", "DPM adaptive"])
def test_momentum_lives_for_one_run_only(bench, sampler):
    first = bench.generate(request(sampler=sampler), asking("apg")).latents
    again = bench.generate(request(sampler=sampler), asking("apg")).latents
    none = bench.generate(request(sampler=sampler), asking("apg", momentum=0.0)).latents
    assert torch.equal(first, again) and not torch.equal(first, none)
