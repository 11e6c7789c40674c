"""The attention techniques as patches: where they act, where they are the identity, what they refuse."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.attention import attend
from lib_hires.attention_walk import chained, changed_sources
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.hosts.patcher_unet import PatchedUnet
from lib_hires.plan import Plan
from lib_hires.run import Call
from lib_hires.settings import params_of
from lib_hires.technique import Refusal, Rest
from lib_hires.techniques.attention import near_sighted_attention, near_sighted_tile, scale_fusion, slothful
from lib_hires.techniques.attention.near_sighted_attention import NearSightedAttentionSettings
from lib_hires.techniques.attention.near_sighted_tile import NearSightedTileSettings
from lib_hires.techniques.attention.scale_fusion import FAST, FUSION, NEIGHBOURHOOD, ScaleFusionSettings
from lib_hires.techniques.attention.slothful import SlothfulSettings
from lib_hires.tokens import MODES
from lib_hires.topology import UNetTopology, unet_topology
from tests.attention.oracle import LAST, MIDDLE, SD15, SDXL, SECOND, TOP, a_place, a_run, sigma_at, tokens
from tests.doubles import FakePatcher, LdmMiniUNet, PatcherMiniUNet

MODULES = (slothful, near_sighted_tile, near_sighted_attention, scale_fusion)
SMALL = {"latent": (40, 24), "native": (16, 16)}
ACTIVE = [
    (slothful, SlothfulSettings(time_decay=0.0, in_depth_decay=0.0, out_depth_decay=0.0)),
    (slothful, SlothfulSettings(in_mode="2D_MAX", in_k_blend=0.4, out_v_blend=1.0, keep_middle=False, time_decay=0.0)),
    (near_sighted_tile, NearSightedTileSettings(base_tile_size=8, peak_tile_size=8)),
    (near_sighted_tile, NearSightedTileSettings(base_tile_size=8, peak_tile_size=12, base_global_ratio=0.0)),
    (near_sighted_attention, NearSightedAttentionSettings(base_tile_size=8, peak_tile_size=8, time_decay=0.0)),
    (near_sighted_attention, NearSightedAttentionSettings(in_mode="1D_AVG", in_k_blend=0.5, in_v_blend=0.2)),
    (scale_fusion, ScaleFusionSettings()),
    (scale_fusion, ScaleFusionSettings(mode=FAST)),
    (scale_fusion, ScaleFusionSettings(mode=NEIGHBOURHOOD)),
    (scale_fusion, ScaleFusionSettings(released_blur=True, jitter=False)),
]
LDM, PATCHER = LdmMiniUNet(attention=True).eval(), PatcherMiniUNet(attention=True).eval()


def layer_output(patch, place, x, plain=None, weights=None):
    """One self-attention layer with a patch, projections being the tokens themselves."""
    plain = plain or (lambda q, k, v: attend(q, k, v, place.heads))
    if not patch.acts_at(place):
        return plain(x, x, x)
    k, v = changed_sources([patch], x, x, place)
    return chained([patch], place, plain, plain)(x, k, v)


def active(names=lambda module, settings: True):
    chosen = [(module, settings) for module, settings in ACTIVE if names(module, settings)]
    return pytest.mark.parametrize(("module", "settings"), chosen)


@active()
@torch.no_grad()
def test_both_hosts_compute_the_same(module, settings):
    run = a_run(latent=(40, 24), native=(8, 8), unet=unet_topology(LDM))
    x = torch.randn(2, 4, 40, 24, generator=torch.Generator().manual_seed(0))
    call = lambda: Call(sigma_at(run, 0.4), 0)
    on_ldm = module.begin(settings, run)
    with HookedUnet(LDM, Plan(run, patches={"x": on_ldm})).open(call()):
        ldm = LDM(x)
    on_patcher = module.begin(settings, run)
    plan = Plan(run, patches={"x": on_patcher})
    patched = PatchedUnet(FakePatcher(PATCHER), plan, host_attention=attend, fits=lambda *_: True)
    with patched.open(call()):
        patcher = patched.patcher.evaluate(x)
    torch.testing.assert_close(ldm, patcher, rtol=1e-5, atol=1e-5)
    assert on_ldm.fired == on_patcher.fired > 0
    assert not torch.equal(ldm, LDM(x)) and torch.equal(LDM(x), FakePatcher(PATCHER).evaluate(x))


SIZES = st.one_of(
    st.sampled_from([(65, 97), (31, 37), (48, 20), (20, 48)]), st.tuples(st.integers(17, 60), st.integers(17, 60))
)


@given(size=SIZES, choice=st.integers(0, len(ACTIVE) - 1), elapsed=st.floats(0, 0.9))
def test_any_size_comes_out_whole_finite_and_without_its_batch_mates(size, choice, elapsed):
    module, settings = ACTIVE[choice]
    run = a_run(latent=size, native=(16, 16))
    patch, place = module.begin(settings, run), a_place(size, sigma=sigma_at(run, elapsed))
    x = tokens(size, batch=2)
    together, alone = layer_output(patch, place, x), layer_output(patch, place, x[1:])
    assert together.shape == x.shape and together.isfinite().all()
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-6)


@active(lambda module, settings: module is not slothful)
def test_identity_attention_returns_its_input_exactly(module, settings):
    run = a_run(latent=(41, 29), native=(16, 16))
    place, x = a_place((41, 29), sigma=sigma_at(run, 0.4)), tokens((41, 29))
    patch = module.begin(settings, run)
    assert patch.acts_at(place)
    assert torch.equal(layer_output(patch, place, x, plain=lambda q, k, v: q), x)


@active()
def test_half_precision_is_finite(module, settings):
    run = a_run(latent=(41, 29), native=(16, 16))
    place, x = a_place((41, 29), sigma=sigma_at(run, 0.4)), tokens((41, 29), dtype=torch.float16)
    out = layer_output(module.begin(settings, run), place, x)
    assert out.dtype == torch.float16 and out.isfinite().all()


NEUTRAL = [
    (slothful, SlothfulSettings(in_slothful=1.0, out_slothful=1.0, only_above_native=False)),
    (slothful, SlothfulSettings(in_slothful=0.0, out_slothful=0.0, only_above_native=False)),
    (near_sighted_tile, NearSightedTileSettings(base_tile_size=128, peak_tile_size=128, only_where_faster=False)),
    (
        near_sighted_attention,
        NearSightedAttentionSettings(
            base_tile_size=128, peak_tile_size=128, in_slothful=1.0, out_slothful=1.0, only_where_faster=False
        ),
    ),
    (scale_fusion, ScaleFusionSettings(window_size=2.0, only_above_native=False)),
    (scale_fusion, ScaleFusionSettings(mode=NEIGHBOURHOOD, window_size=2.0, only_above_native=False)),
]


@pytest.mark.parametrize(("module", "settings"), NEUTRAL)
@torch.no_grad()
def test_neutral_is_bit_identical_to_off(module, settings):
    run = a_run(latent=(40, 24), native=(32, 32), unet=unet_topology(LDM))
    patch = module.begin(settings, run)
    x = torch.randn(1, 4, 40, 24, generator=torch.Generator().manual_seed(0))
    off = LDM(x)
    with HookedUnet(LDM, Plan(run, patches={"x": patch})).open(Call(sigma_at(run, 0.4), 0)):
        assert torch.equal(LDM(x), off)
    assert patch.fired == 0


@active()
def test_outside_its_window_it_may_not_act_anywhere(module, settings):
    run = a_run(**SMALL)
    patch = module.begin(replace(settings, start=0.2, end=0.6), run)
    inside, before, after = (Call(sigma_at(run, t), 0) for t in (0.4, 0.1, 0.8))
    assert any(patch.may_act(layer, inside) for layer in SD15.attention)
    assert not any(patch.may_act(layer, call) for layer in SD15.attention for call in (before, after))


@pytest.mark.parametrize("module", MODULES)
def test_refusals_and_rests_name_the_reason(module):
    settings = module.TECHNIQUE.settings()
    with pytest.raises(Refusal, match="not a UNet"):
        module.begin(settings, a_run(unet=None))
    with pytest.raises(Refusal, match="no self-attention"):
        module.begin(settings, a_run(unet=UNetTopology(12, 12, (3, 6, 9))))
    with pytest.raises(Rest, match="not above the native 64x64"):
        module.begin(settings, a_run(latent=(64, 64)))
    switch = "only_where_faster" if "only_where_faster" in params_of(settings) else "only_above_native"
    assert module.begin(type(settings)(**{switch: False}), a_run(latent=(64, 64))).describe()
    assert "never act" in type(settings)(start=0.5, end=0.5).problem()


@pytest.mark.parametrize("module", MODULES)
def test_every_preset_begins_and_acts_somewhere(module):
    run = a_run()
    for name, settings in module.TECHNIQUE.presets.items():
        patch = module.begin(settings, run)
        places = [a_place((128 >> level, 128 >> level), layer, sigma_at(run, 0.4)) for level, layer in
                  ((0, TOP), (1, SECOND), (3, MIDDLE), (0, LAST))]  # fmt: skip
        acting = [place.layer for place in places if patch.may_act(place.layer, place.call) and patch.acts_at(place)]
        assert TOP in acting or LAST in acting, name
        curve = module.TECHNIQUE.curve
        assert curve is None or len(curve(settings, run).values) == len(run.sigmas)


@pytest.mark.parametrize("module", MODULES)
def test_a_map_that_another_technique_shrank_to_native_size_is_left_alone(module):
    patch = module.begin(module.TECHNIQUE.settings(), a_run())
    sigma = sigma_at(a_run(), 0.4)
    assert patch.acts_at(a_place((128, 128), TOP, sigma)) and not patch.acts_at(a_place((32, 32), SECOND, sigma))


def test_slothful_uses_in_and_out_where_they_belong_and_keeps_the_middle():
    run = a_run()
    patch = slothful.begin(SlothfulSettings(in_slothful=6.0, out_slothful=3.0, time_decay=0.0), run)
    sigma = run.sigma_first
    assert patch.rate(TOP, sigma) == pytest.approx(6) and patch.rate(LAST, sigma) == pytest.approx(3)
    assert patch.rate(SECOND, sigma) == pytest.approx(6 / 4), "depth 2, decay 2"
    assert patch.rate(MIDDLE, sigma) == 0 and not patch.may_act(MIDDLE, Call(sigma, 0))
    too = slothful.begin(SlothfulSettings(in_slothful=32.0, keep_middle=False, time_decay=0.0), run)
    assert too.rate(MIDDLE, sigma) == pytest.approx(32 / 16), "depth stops at 4, as SD's channels do"


def test_depth_counts_from_where_attention_begins():
    run = a_run(latent=(256, 256), native=(128, 128), unet=SDXL)
    patch = slothful.begin(SlothfulSettings(time_decay=0.0), run)
    first, second = SDXL.attention[0], SDXL.attention[-1]
    assert patch.rate(first, run.sigma_first) == pytest.approx(6)
    assert patch.rate(second, run.sigma_first) == pytest.approx(6 / 4)
    call = Call(run.sigma_first, 0)
    for depth, tiled in ((1, [True, False]), (2, [True, False]), (3, [True, True])):
        tile = near_sighted_tile.begin(NearSightedTileSettings(tiling_max_depth=depth), run)
        assert [tile.may_act(first, call), tile.may_act(second, call)] == tiled


def test_time_decays_around_the_peak():
    run = a_run()
    patch = slothful.begin(SlothfulSettings(peak_time=0.4, time_decay=2.0), run)
    assert patch.rate(TOP, sigma_at(run, 0.4)) == pytest.approx(6)
    assert patch.rate(TOP, sigma_at(run, 0.9)) == pytest.approx(6 * 2.718281828 ** -((0.5 * 2) ** 2), rel=1e-6)


@given(mode=st.sampled_from(MODES), blend=st.floats(0, 1))
def test_sources_that_another_patch_reduced_are_respected(mode, blend):
    run = a_run(**SMALL)
    place, x = a_place((40, 24), sigma=run.sigma_first), tokens((40, 24))
    less = x[:, ::7]
    for module, settings in ACTIVE:
        patch = module.begin(settings, run)
        key, value = patch.sources(less, less, place)
        assert key is less and value is less
        seen = []
        patch.attend(x, less, less, place, lambda q, k, v, seen=seen: seen.append((q.shape, k.shape)) or q)
        assert seen == [(x.shape, less.shape)], module
    first = slothful.begin(SlothfulSettings(in_mode=mode, in_k_blend=blend, time_decay=0.0), run)
    second = near_sighted_attention.begin(NearSightedAttentionSettings(base_tile_size=8, peak_tile_size=8), run)
    k, v = changed_sources([first, second], x, x, place)
    assert k.shape[1] == first.sources(x, x, place)[0].shape[1]
    plain = lambda q, k, v: attend(q, k, v, 2)
    assert torch.equal(chained([first, second], place, plain, plain)(x, k, v), plain(x, k, v))


def test_jitter_follows_seed_and_noise_level():
    x, run = tokens((41, 29)), a_run((41, 29), native=(16, 16))

    def out(module, settings, seed, sigma):
        return layer_output(module.begin(settings, run), a_place((41, 29), sigma=sigma, seed=seed), x)

    for module, settings in (
        (scale_fusion, ScaleFusionSettings()),
        (scale_fusion, ScaleFusionSettings(mode=NEIGHBOURHOOD)),
        (near_sighted_tile, NearSightedTileSettings(base_tile_size=9, peak_tile_size=9, time_decay=0.0)),
    ):
        first = out(module, settings, 1, 5.0)
        assert torch.equal(first, out(module, settings, 1, 5.0))
        assert any(not torch.equal(first, out(module, settings, seed, 5.0)) for seed in (2, 3, 4))
        assert any(not torch.equal(first, out(module, settings, 1, sigma)) for sigma in (4.0, 3.0, 2.0))


def test_scale_fusion_windows_are_native_at_every_level_and_fit_any_shape():
    patch = scale_fusion.begin(ScaleFusionSettings(), a_run(latent=(160, 96)))
    assert patch._side(a_place((160, 96), TOP)) == (64, 64) and patch._side(a_place((80, 48), SECOND)) == (32, 32)
    assert patch._side(a_place((20, 12), MIDDLE)) == (8, 8)
    assert patch._side(a_place((200, 40), TOP)) == (64, 40)
    assert len(patch._weights(a_place((160, 96), TOP))) == 5


def test_fusion_takes_coarse_from_windows_and_fine_from_the_map():
    run, size = a_run((32, 32), native=(16, 16)), (32, 32)
    patch = scale_fusion.begin(ScaleFusionSettings(mode=FUSION, blur_sigma=4.0, jitter=False), run)
    place, x = a_place(size), tokens(size)
    fine = lambda q, k, v: q if q.shape[1] == 1024 else torch.ones_like(q)
    out = layer_output(patch, place, torch.zeros_like(x), plain=fine)
    torch.testing.assert_close(out, torch.ones_like(x), rtol=1e-5, atol=1e-5)
    checks = x.new_tensor([(-1.0) ** (i // 32 + i) for i in range(1024)])[None, :, None].expand_as(x)
    local_fine = lambda q, k, v: torch.zeros_like(q) if q.shape[1] == 1024 else q
    out = layer_output(patch, place, checks, plain=local_fine)
    assert out.abs().max() < 0.35, "a pattern of single cells that only windows see is taken out"
