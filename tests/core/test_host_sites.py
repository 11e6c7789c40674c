"""The feature-map site on both kinds of host, on one miniature network: same results, true sizes, nothing left."""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lib_hires.attention import attend
from lib_hires.feature_maps import FeatureMapWalk
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.hosts.patcher_unet import PatchedUnet
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan, make_plan
from lib_hires.run import FIRST_PASS, Call, ModelFacts, Run
from lib_hires.sites import FeatureMaps
from lib_hires.technique import Patch
from lib_hires.techniques.unet.deep_shrink import DeepShrinkSettings
from lib_hires.topology import unet_topology
from tests.doubles import (
    ControlDropped,
    FakePatcher,
    LdmMiniUNet,
    PatcherMiniUNet,
    controlled_as_in_a1111,
    residuals,
)

SD = NoiseSchedule.scaled_linear()
LDM, PATCHER = LdmMiniUNet().eval(), PatcherMiniUNet().eval()
EARLY, LATE = 14.0, 0.1
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def plan_for(settings, x):
    facts = ModelFacts("SD 1.x", (8, 8), SD, unet_topology(LDM))
    return make_plan({"deep_shrink": settings}, Run("test", FIRST_PASS, facts, tuple(x.shape[-2:]), (14.6, 1.0, 0.0)))


@torch.no_grad()
def on_ldm(x, settings, sigma):
    plan, call = plan_for(settings, x), Call(sigma, 0)
    with HookedUnet(LDM, plan).open(call):
        return LDM(x), call


@torch.no_grad()
def on_patcher(x, settings, sigma, control=None, patcher=None):
    patched, call = patched_unet(patcher or FakePatcher(PATCHER), plan_for(settings, x)), Call(sigma, 0)
    with patched.open(call):
        return patched.patcher.evaluate(x, control), call


def patched_unet(patcher, plan):
    return PatchedUnet(patcher, plan, host_attention=attend, fits=lambda model, shape, device: True)


def latents(height, width, batch=1, seed=0):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def test_topology_is_read_from_the_network():
    topology = unet_topology(LDM)
    assert (topology.input_blocks, topology.output_blocks, topology.downsamplers) == (12, 12, (3, 6, 9))
    assert [topology.halvings_after(i) for i in (0, 3, 6, 11)] == [3, 2, 1, 0]
    assert unet_topology(torch.nn.Linear(1, 1)) is None


@given(
    cells=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    block=st.integers(1, 11),
    factor=st.sampled_from([1.5, 2.0, 4.0]),
    sigma=st.sampled_from([EARLY, 2.0, LATE]),
    after_skip=st.booleans(),
)
def test_both_hosts_compute_the_same(cells, block, factor, sigma, after_skip):
    if (block + 1 if after_skip else block) in (3, 6, 9):
        return  # the size then comes back at a host's own Upsample: doubling on LDM, to the skip's size on the others
    x = latents(8 * cells[0], 8 * cells[1])
    settings = DeepShrinkSettings(block=block, factor=factor, after_skip=after_skip)
    (ldm, ldm_call), (patcher, patcher_call) = on_ldm(x, settings, sigma), on_patcher(x, settings, sigma)
    torch.testing.assert_close(ldm, patcher, rtol=1e-5, atol=1e-5)
    assert ldm_call.sizes == patcher_call.sizes


@given(
    height=st.integers(9, 40),
    width=st.integers(9, 40),
    block=st.integers(1, 11),
    factor=st.floats(0.5, 9),
    sigma=st.floats(0.03, 14.6),
)
@example(height=9, width=16, block=3, factor=1.0, sigma=EARLY)
def test_any_size_comes_out_at_its_own_size(height, width, block, factor, sigma):
    x, settings = latents(height, width), DeepShrinkSettings(block=block, factor=factor)
    for out, call in (on_ldm(x, settings, sigma), on_patcher(x, settings, sigma)):
        assert out.isfinite().all()
        assert out.shape[-2:] == x.shape[-2:] or (height % 8 or width % 8), "odd sizes end one cell up in LDM itself"
        # at factor 1 the technique rests, and nobody asks for sizes
        assert all(min(size) >= 1 for size in call.sizes.values())
        assert call.sizes or factor == 1


def test_the_true_size_of_every_level_is_noted():
    _, call = on_ldm(latents(32, 48), DeepShrinkSettings(), EARLY)
    assert call.sizes["input", 0] == (32, 48) and call.sizes["input", 3] == (32, 48)
    assert call.sizes["input", 4] == (8, 12), "block 3 halves, then the shrink halves again"
    assert call.sizes["middle", 0] == (2, 3) and call.sizes["output", 0] == (2, 3)
    assert call.sizes["output", 8] == (16, 24), "the map has grown back where it meets the skip of block 3"
    assert call.sizes["output", 11] == (32, 48)


@pytest.mark.parametrize("on_host", [on_ldm, on_patcher])
def test_outside_its_window_the_result_is_bit_identical_to_off(on_host):
    x = latents(40, 24)
    plain = LDM(x) if on_host is on_ldm else FakePatcher(PATCHER).evaluate(x)
    out, _ = on_host(x, DeepShrinkSettings(), LATE)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("on_host", [on_ldm, on_patcher])
def test_a_sample_does_not_depend_on_its_batch_mates(on_host):
    x = latents(32, 32, batch=3)
    together, _ = on_host(x, DeepShrinkSettings(), EARLY)
    alone, _ = on_host(x[1:2], DeepShrinkSettings(), EARLY)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_an_exception_inside_the_unet_leaves_no_hook_behind():
    x = latents(32, 32)
    before = LDM(x)

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = LDM.output_blocks[4].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        on_ldm(x, DeepShrinkSettings(), EARLY)
    handle.remove()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in LDM.modules())
    assert torch.equal(LDM(x), before)


def test_a_closed_patcher_does_nothing_even_if_the_host_keeps_it():
    x = latents(32, 32)
    patched = patched_unet(FakePatcher(PATCHER), plan_for(DeepShrinkSettings(), x))
    with patched.open(Call(EARLY, 0)):
        changed = patched.patcher.evaluate(x)
    kept = copy.deepcopy(patched.patcher.model_options)
    plain = FakePatcher(PATCHER).evaluate(x)
    assert not torch.equal(changed, plain)
    assert torch.equal(FakePatcher(PATCHER, kept).evaluate(x), plain)


def test_patches_survive_the_clone_that_a_later_extension_makes():
    x = latents(32, 32)
    patched = patched_unet(FakePatcher(PATCHER), plan_for(DeepShrinkSettings(), x))
    clone = patched.patcher.clone()
    with patched.open(Call(EARLY, 0)):
        assert torch.equal(clone.evaluate(x), patched.patcher.evaluate(x))


def test_another_extensions_function_wrapper_stays_in_the_chain():
    seen = []
    base = FakePatcher(PATCHER)

    def theirs(apply_model, args):
        seen.append(args["input"].shape)
        return apply_model(args["input"], args["timestep"], **args["c"]) + 1

    base.set_model_unet_function_wrapper(theirs)
    x = latents(32, 32)
    with_theirs, _ = on_patcher(x, DeepShrinkSettings(), EARLY, patcher=base)
    without, _ = on_patcher(x, DeepShrinkSettings(), EARLY)
    assert seen == [x.shape] and torch.equal(with_theirs, without + 1)


def test_a_host_alone_would_drop_control_on_shrunk_maps():
    """The double behaves as the hosts do; otherwise the next tests would prove nothing."""
    x = latents(32, 32)
    base = FakePatcher(PATCHER)
    base.set_model_input_block_patch_after_skip(lambda h, to: h[..., ::2, ::2] if to["block"][1] == 3 else h)
    base.set_model_output_block_patch(lambda h, skip, to: (torch.nn.functional.interpolate(h, skip.shape[-2:]), skip))
    with pytest.raises(ControlDropped):
        base.evaluate(x, residuals(x))


@pytest.mark.parametrize("side", ["middle", "output"])
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (27, 35)])
def test_every_control_residual_acts_on_shrunk_maps(side, size):
    x = latents(*size)
    plain, _ = on_patcher(x, DeepShrinkSettings(), EARLY, residuals(x))
    for index in range(len(residuals(x)[side])):
        control = residuals(x)
        control[side][index] = torch.zeros_like(control[side][index])
        without, _ = on_patcher(x, DeepShrinkSettings(), EARLY, control)
        assert not torch.equal(plain, without), f"{side} residual {index} had no effect"


@pytest.mark.parametrize("side", ["middle", "output"])
def test_control_in_the_manner_of_a1111s_extension_acts_on_shrunk_maps(side):
    x = latents(32, 48)
    settings = DeepShrinkSettings()

    def sample(control):
        with torch.no_grad(), HookedUnet(LDM, plan_for(settings, x)).open(Call(EARLY, 0)):
            return controlled_as_in_a1111(LDM, x, control)

    with_all = sample(residuals(x))
    assert with_all.shape == x.shape and with_all.isfinite().all()
    for index in range(len(residuals(x)[side])):
        control = residuals(x)
        control[side][index] = torch.zeros_like(control[side][index])
        assert not torch.equal(with_all, sample(control)), f"{side} residual {index} had no effect"


def test_control_without_a_shrink_is_bit_identical_to_the_hosts_own():
    x = latents(32, 32)
    ours, _ = on_patcher(x, DeepShrinkSettings(), LATE, residuals(x))
    assert torch.equal(ours, FakePatcher(PATCHER).evaluate(x, residuals(x)))


class Join(Patch, FeatureMaps):
    """Changes the map and its skip in a way that confuses neither with the other, and notes their sizes."""

    def __init__(self, factor=1.5):
        super().__init__()
        self.factor = factor
        self.sizes = []

    def join(self, h, skip, index, call):
        self.sizes.append((index, tuple(h.shape), tuple(skip.shape)))
        return h * self.factor, skip - index


def joined(x, shrink=None, factor=1.5):
    plan = plan_for(shrink, x) if shrink else Plan(plan_for(DeepShrinkSettings(), x).run)
    plan.patches["join"] = Join(factor)
    return plan


@torch.no_grad()
def joined_on_ldm(x, plan, control=None):
    with HookedUnet(LDM, plan).open(Call(EARLY, 0)):
        return controlled_as_in_a1111(LDM, x, control) if control else LDM(x)


@torch.no_grad()
def joined_on_patcher(x, plan, control=None):
    patched = patched_unet(FakePatcher(PATCHER), plan)
    with patched.open(Call(EARLY, 0)):
        return patched.patcher.evaluate(x, control)


@given(
    cells=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    batch=st.integers(1, 3),
    factor=st.sampled_from([0.5, 1.5]),
    block=st.sampled_from([None, 1, 3, 4, 7, 10]),
)
def test_both_hosts_join_maps_and_skips_alike(cells, batch, factor, block):
    x = latents(8 * cells[0], 8 * cells[1], batch)
    shrink = DeepShrinkSettings(block=block) if block else None
    plans = [joined(x, shrink, factor) for _ in range(2)]
    ldm, patcher = joined_on_ldm(x, plans[0]), joined_on_patcher(x, plans[1])
    torch.testing.assert_close(ldm, patcher, rtol=1e-4, atol=1e-4)
    sizes = plans[0].patches["join"].sizes
    assert sizes == plans[1].patches["join"].sizes and [index for index, _, _ in sizes] == list(range(12))
    assert all(h == skip for _, h, skip in sizes), "a map joins its skip after it has grown to its size"


def test_joining_does_what_the_patch_says():
    x, plan = latents(16, 24), joined(latents(16, 24))
    with torch.no_grad():
        skips, h = [], x
        for block in LDM.input_blocks:
            h = block(h)
            skips.append(h)
        h = LDM.middle_block(h)
        for index, block in enumerate(LDM.output_blocks):
            h = block(torch.cat([h * 1.5, skips.pop() - index], dim=1))
        want = LDM.out(h)
    assert torch.equal(joined_on_ldm(x, plan), want)


def test_the_skip_that_is_joined_carries_its_control_residual_on_both_hosts():
    x = latents(32, 24)
    with_control = [host(x, joined(x), residuals(x)) for host in (joined_on_ldm, joined_on_patcher)]
    torch.testing.assert_close(*with_control, rtol=1e-5, atol=1e-5)
    assert not torch.equal(with_control[0], joined_on_ldm(x, joined(x)))


def test_nothing_is_split_where_no_patch_joins_and_nothing_copied_where_none_changes_anything():
    class Looks(Patch, FeatureMaps):
        def join(self, h, skip, index, call):
            self.channels = h.shape[1], skip.shape[1]
            return h, skip

    both = torch.randn(1, 7, 4, 4)
    unaware = FeatureMapWalk([type("Other", (Patch, FeatureMaps), {})()], Call(EARLY, 0))
    assert unaware.join_concatenated(both, 0) is both
    looks = Looks()
    walk = FeatureMapWalk([looks], Call(EARLY, 0))
    walk.leave_input(torch.zeros(1, 2, 4, 4), 0)
    walk.meet_skip(torch.zeros(1, 5, 4, 4), 0)
    assert walk.join_concatenated(both, 0) is both and looks.channels == (5, 2)


@pytest.mark.parametrize("size", [(27, 35), (9, 40)])
def test_joining_at_odd_sizes(size):
    x = latents(*size)
    assert joined_on_ldm(x, joined(x)).isfinite().all() and joined_on_patcher(x, joined(x)).isfinite().all()
