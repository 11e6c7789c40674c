"""Iterative mixing and low-band lock at their sites."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from lib_hires.blending import ADDITION, FUNCTIONS, SLERP
from lib_hires.low_band import haar_low
from lib_hires.painted_map import WHITE, encode
from lib_hires.plan import make_plan
from lib_hires.progress import AXES, STEP
from lib_hires.registry import BY_NAME
from lib_hires.run import EPS, FIRST_PASS, FLOW, IMG2IMG_PASS, Call, V
from lib_hires.samplers import Sampler
from lib_hires.sites import Guidance, NoisyLatent
from lib_hires.technique import Rest
from lib_hires.techniques.hires import iterative_mixing, low_band_lock
from lib_hires.techniques.hires.iterative_mixing import (
    AUTOMATIC,
    DENOISED,
    LATENT,
    MAPS,
    PAINTED,
    DenoisedMixingPatch,
    IterativeMixingSettings,
    LatentMixingPatch,
)
from lib_hires.techniques.hires.low_band_lock import GAUSSIAN, HAAR, LowBandLockSettings

from .stand_ins import EULER, EULER_A, FLOW_TABLE, a_run, a_start, levels, predictions

SHAPES = st.tuples(st.integers(1, 3), st.just(4), st.integers(1, 23), st.integers(1, 23))
PAINTING = encode(np.random.default_rng(0).integers(0, WHITE + 1, (5, 7)))
WHOLE = IterativeMixingSettings(minimum=1.0)  # the reference's share is 1 throughout


def mixing(start=None, settings_=None, **run):
    start = start or a_start()
    return iterative_mixing.begin(settings_ or IterativeMixingSettings(), a_run(start, **run)), start


# --- iterative mixing


def test_auto_mixes_the_latent_where_the_sampler_keeps_it():
    assert isinstance(mixing()[0], LatentMixingPatch)
    assert isinstance(mixing(sampler=EULER_A)[0], DenoisedMixingPatch)
    assert isinstance(mixing(settings_=IterativeMixingSettings(space=DENOISED))[0], DenoisedMixingPatch)
    assert isinstance(mixing(settings_=IterativeMixingSettings(space=LATENT), sampler=EULER_A)[0], LatentMixingPatch)


@pytest.mark.parametrize("prediction", [EPS, V, FLOW])
def test_the_latent_is_blended_with_the_reference_noised_to_its_level(prediction):
    schedule = {"schedule": FLOW_TABLE, "sigmas": levels(schedule=FLOW_TABLE)} if prediction == FLOW else {}
    patch, start = mixing(
        settings_=IterativeMixingSettings(alpha=1.0, progress=STEP), prediction=prediction, **schedule
    )
    x = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(5))
    sigma = schedule.get("sigmas", levels())[5]  # a quarter of the way: cos^2(pi / 8)
    z = start.latent * (1 - sigma) if prediction == FLOW else start.latent
    share = 0.8535534
    want = share * (z + sigma * start.noise) + (1 - share) * x
    torch.testing.assert_close(patch.before_call(x, Call(sigma, 5)), want, rtol=1e-5, atol=1e-5)


def test_the_denoised_result_is_blended_with_the_clean_reference():
    patch, start = mixing(settings_=IterativeMixingSettings(alpha=1.0, progress=STEP), sampler=EULER_A)
    x0 = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(5))
    got = patch.after_mix(x0, predictions(x0, levels()[10]))
    torch.testing.assert_close(got, (start.latent + x0) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", [LATENT, DENOISED])
def test_past_its_schedule_it_returns_the_very_tensors(space):
    patch, _ = mixing(settings_=IterativeMixingSettings(space=space, stop=0.5))
    x = torch.randn(1, 4, 16, 24)
    sigma = levels()[15]
    assert (patch.before_call(x, Call(sigma, 0)) if space == LATENT else patch.after_mix(x, predictions(x, sigma))) is x
    assert patch.fired == 0


@pytest.mark.parametrize(
    "nothing",
    [{"maximum": 0.0}, {"stop": 0.0}, {"clamp": 0.0}, {"alpha": 0.0, "node_weights": True, "start": 0.0}],
    ids=str,
)
def test_a_share_of_0_rests(nothing):
    with pytest.raises(Rest, match="0 in the whole pass"):
        mixing(settings_=IterativeMixingSettings(**nothing))


def test_a_pass_that_begins_beyond_the_schedule_rests():
    with pytest.raises(Rest):
        mixing(settings_=IterativeMixingSettings(stop=0.5), sigmas=levels(denoise=0.4))


@pytest.mark.parametrize("name", ["iterative_mixing", "low_band_lock"])
def test_a_pass_from_noise_alone_rests(name):
    plan = make_plan({name: BY_NAME[name].settings()}, replace(a_run(), pass_name=FIRST_PASS))
    assert not plan.patches and not plan.refused
    assert "only in hires or img2img passes" in plan.resting[BY_NAME[name].title]


@pytest.mark.parametrize("name", ["iterative_mixing", "low_band_lock"])
def test_img2img_is_served(name):
    plan = make_plan({name: BY_NAME[name].settings()}, replace(a_run(a_start()), pass_name=IMG2IMG_PASS))
    assert list(plan.patches) == [name] and plan.report()


def test_a_minimum_above_the_maximum_is_refused():
    selection = {"iterative_mixing": IterativeMixingSettings(minimum=0.6, maximum=0.4)}
    assert "Minimum share" in make_plan(selection, a_run(a_start())).refused["Iterative mixing"]


def test_latent_space_needs_no_guidance_and_denoised_space_does():
    run = a_run(a_start())
    run = replace(run, model=replace(run.model, no_guidance_reason="closed"))
    assert make_plan({"iterative_mixing": IterativeMixingSettings()}, run).patches
    assert make_plan({"iterative_mixing": IterativeMixingSettings(space=DENOISED)}, run).refused


def test_forced_into_latent_space_it_leaves_calls_between_steps_alone_and_says_so():
    forced = IterativeMixingSettings(space=LATENT)
    patch, _ = mixing(settings_=forced, sampler=Sampler("sample_dpm_2"))
    x = torch.randn(1, 4, 16, 24)
    between = (levels()[3] * levels()[4]) ** 0.5
    assert patch.before_call(x, Call(between, 3)) is x
    assert patch.before_call(x, Call(levels()[3] * 1.00001, 3)) is not x
    assert "Denoised suits it" in patch.describe() and "Denoised suits it" not in mixing(settings_=forced)[0].describe()


def test_the_detail_map_frees_the_detailed_half_sooner():
    start = a_start((1, 4, 16, 48))
    start.latent[..., :24] = 0
    # the share of the reference shows where it is 0 and the sample 1
    patch, _ = mixing(start, IterativeMixingSettings(alpha=3.0, detail=AUTOMATIC, space=DENOISED), latent=(16, 48))
    one = torch.ones(1, 4, 16, 48)
    reference = patch._reference.clean
    got = patch.after_mix(one + reference, predictions(one, levels()[8])) - reference
    assert got[..., :16].mean() < got[..., 32:].mean() - 0.2
    assert got.std(dim=1).max() < 1e-5, "one share for all channels"


def a_map(size, seed=0):
    return np.random.default_rng(seed).integers(0, WHITE + 1, size)


def painted(greys, **values):
    return IterativeMixingSettings(detail=PAINTED, painting=encode(np.asarray(greys)), **values)


def mixed(values, start, sigma, space):
    """What becomes of a sample at one noise level."""
    patch = iterative_mixing.begin(replace(values, space=space), a_run(start, latent=start.latent.shape[2:]))
    x = a_start(start.latent.shape, seed=7).latent
    return patch.before_call(x, Call(sigma, 0)) if space == LATENT else patch.after_mix(x, predictions(x, sigma))


@pytest.mark.parametrize("space", [LATENT, DENOISED])
@pytest.mark.parametrize("softness", [0.0, 2.0, 7.5])
@pytest.mark.parametrize("size", [(5, 9), (16, 24), (33, 48)], ids=str)
def test_every_cell_has_the_share_of_its_own_alpha(space, softness, size):
    """Against numpy and scipy in double precision, from the map's levels to the mixed sample."""
    greys, start, sigma = a_map((8, 12)), a_start((2, 4, *size)), levels()[7]
    values = painted(greys, alpha=3.0, plain_alpha=0.25, softness=softness, progress=STEP)
    grey = np.asarray(Image.fromarray((greys / WHITE).astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR))
    if softness:
        grey = gaussian_filter(grey.astype(np.float64), softness, mode="mirror", radius=math.ceil(3 * softness))
    share = np.cos(np.pi * 7 / 20 / 2) ** 2
    share = share ** (0.25 + (3.0 - 0.25) * grey)
    z, n, x = start.latent.numpy(), start.noise.numpy(), a_start((2, 4, *size), seed=7).latent.numpy()
    want = share * (z + sigma * n if space == LATENT else z) + (1 - share) * x
    np.testing.assert_allclose(mixed(values, start, sigma, space).numpy(), want, atol=2e-4)


@pytest.mark.parametrize("space", [LATENT, DENOISED])
@pytest.mark.parametrize(("level", "alpha"), [(WHITE, 3.0), (0, 0.3), (5, 0.3 * (2 / 3) + 3.0 / 3)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_map_of_one_grey_is_a_number_bit_for_bit(space, level, alpha, function):
    start = a_start((2, 4, 9, 7))
    values = painted(np.full((6, 8), level), alpha=3.0, plain_alpha=0.3, function=function)
    for sigma in levels():
        plain = mixed(IterativeMixingSettings(alpha=alpha, function=function), start, sigma, space)
        got = mixed(values, start, sigma, space)
        assert torch.equal(got, plain) if level in (0, WHITE) else torch.allclose(got, plain)


def test_two_alphas_that_are_one_need_no_map():
    start = a_start()
    values = painted(a_map((8, 12)), alpha=1.5, plain_alpha=1.5)
    plain = mixed(IterativeMixingSettings(alpha=1.5), start, levels()[7], DENOISED)
    assert torch.equal(mixed(values, start, levels()[7], DENOISED), plain)


def test_a_painted_black_map_rests_where_its_alpha_does():
    nothing = {"alpha": 2.0, "plain_alpha": 0.0, "node_weights": True}
    with pytest.raises(Rest, match="0 in the whole pass"):
        mixing(settings_=painted([[0]], **nothing))
    mixing(settings_=painted([[0, 1]], **nothing))


def test_an_empty_painting_is_refused_with_what_to_do():
    values = IterativeMixingSettings(detail=PAINTED)
    told = make_plan({"iterative_mixing": values}, a_run(a_start())).refused["Iterative mixing"]
    assert "paint or upload one" in told and "set Detail map to None" in told
    assert IterativeMixingSettings(painting=encode(np.array([[0]]))).problem() is None


def test_the_log_names_the_alphas_that_are_painted():
    describe = lambda greys: mixing(settings_=painted(greys, alpha=3.5, plain_alpha=0.5))[0].describe()
    assert "alpha 0.5 to 3.5," in describe([[0, WHITE]]) and "alpha 0.5 to 1.5," in describe([[0, 5]])
    assert "alpha 3.5," in describe([[WHITE]])


def test_normalizing_takes_the_mean_of_the_noisiest_references_off():
    patch, start = mixing(settings_=replace(WHOLE, normalize_fraction=0.05))
    sigma = levels()[0]
    got = patch.before_call(torch.zeros(1, 4, 16, 24), Call(sigma, 0))
    want = start.latent + sigma * start.noise
    torch.testing.assert_close(got, want - want.mean(), rtol=1e-4, atol=1e-4)


@settings(max_examples=40)
@given(
    SHAPES,
    st.sampled_from(FUNCTIONS),
    st.sampled_from([LATENT, DENOISED]),
    st.sampled_from(AXES),
    st.sampled_from(MAPS),
    st.sampled_from([EPS, FLOW]),
)
def test_pictures_of_any_size_stay_finite_and_apart(shape, function, space, axis, detail, prediction):
    start = a_start(shape)
    values = IterativeMixingSettings(
        function=function, space=space, progress=axis, detail=detail, painting=PAINTING, normalize_fraction=0.3
    )
    sigmas = (0.999, 0.7, 0.4, 0.1) if prediction == FLOW else (4519.0, *levels(4))
    x = start.noise * sigmas[0] + 1

    def result(rows):
        part = replace(start, latent=start.latent[rows].half(), noise=start.noise[rows].half())
        patch = iterative_mixing.begin(values, a_run(part, sigmas=sigmas, prediction=prediction, latent=shape[2:]))
        if space == LATENT:
            return [patch.before_call(x[rows], Call(sigma, 0)) for sigma in sigmas]
        return [patch.after_mix(x[rows], predictions(x[rows], sigma)) for sigma in sigmas]

    for whole, alone in zip(result(slice(None)), result(slice(0, 1)), strict=True):
        assert whole.isfinite().all() and whole.shape == shape and whole.dtype == torch.float32
        torch.testing.assert_close(whole[:1], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_the_curve_is_the_share_that_acts():
    values = IterativeMixingSettings(alpha=1.5, stop=0.8)
    run = a_run(a_start())
    curve = iterative_mixing.curve(values, run)
    patch = iterative_mixing.begin(replace(values, space=DENOISED), run)
    zero = torch.zeros(1, 4, 16, 24)
    mixed = [patch.after_mix(zero, predictions(zero, sigma)) for sigma in run.sigmas]
    got = [float((m * run.start.latent).sum() / run.start.latent.square().sum()) for m in mixed]
    assert got == pytest.approx(list(curve.values), abs=1e-5)
    assert curve.phases[0] == "follows the picture" and curve.phases[-1] == "free"
    assert iterative_mixing.curve(values, a_run()).values == curve.values, "the plot has no reference"


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("function", [ADDITION, SLERP])
def test_mixing_keeps_the_noise_level_of_the_schedule(steps, function):
    """Where sample and reference share the noise, the mixed latent varies as much as the schedule says."""
    start = a_start((1, 4, 128, 128))
    sample = 0.99 * start.latent + 0.141 * a_start((1, 4, 128, 128), seed=1).latent
    patch, _ = mixing(start, IterativeMixingSettings(function=function, alpha=1.0), sigmas=levels(steps))
    for i, sigma in enumerate(levels(steps)):
        mixed = patch.before_call(sample + sigma * start.noise, Call(sigma, i))
        assert float(mixed.var()) == pytest.approx(1 + sigma**2, rel=0.01)
        if function == ADDITION:
            share = patch._shares.at(sigma)
            noise = mixed - share * start.latent - (1 - share) * sample
            assert float(noise.std()) == pytest.approx(sigma, rel=0.01)


def test_independent_noise_would_not_keep_it():
    start = a_start((1, 4, 128, 128))
    patch, _ = mixing(start, IterativeMixingSettings(alpha=1.0, progress=STEP))
    sigma = levels()[10]
    other = a_start((1, 4, 128, 128), seed=1).noise
    mixed = patch.before_call(start.latent + sigma * other, Call(sigma, 10))
    assert float((mixed - start.latent).var()) == pytest.approx(sigma**2 / 2, rel=0.05)


# --- low-band lock


def locked(values, x0, start, sigma=10.0, **run):
    patch = low_band_lock.begin(values, a_run(start, **run))
    return patch.after_mix(x0, predictions(x0, sigma))


@pytest.mark.parametrize("filter_", [HAAR, GAUSSIAN])
def test_the_low_band_is_the_references_and_the_rest_the_models(filter_):
    start = a_start()
    x0 = a_start(seed=3).latent
    got = locked(LowBandLockSettings(filter=filter_), x0, start)
    patch = low_band_lock.begin(LowBandLockSettings(filter=filter_), a_run(start))
    low = patch._low
    torch.testing.assert_close(got, x0 + low(start.latent) - low(x0), rtol=1e-5, atol=1e-5)
    if filter_ == HAAR:  # a projection: the low band is now exactly the reference's
        torch.testing.assert_close(haar_low(got, 1), haar_low(start.latent, 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got - haar_low(got, 1), x0 - haar_low(x0, 1), rtol=1e-5, atol=1e-5)


def test_strength_goes_part_of_the_way():
    start, x0 = a_start(), a_start(seed=3).latent
    half, whole = (locked(LowBandLockSettings(strength=s), x0, start) for s in (0.5, 1.0))
    torch.testing.assert_close(half, (x0 + whole) / 2)


def test_outside_its_window_it_returns_the_very_tensor_and_at_strength_0_it_rests():
    x0 = a_start(seed=3).latent
    assert locked(LowBandLockSettings(), x0, a_start(), sigma=0.5) is x0
    with pytest.raises(Rest):
        locked(LowBandLockSettings(strength=0.0), x0, a_start())


@pytest.mark.parametrize(
    ("native", "coarseness", "cells"),
    [((8, 12), 1.0, 2.0), ((4, 6), 1.0, 4.0), ((16, 24), 1.0, 1.0), ((8, 12), 2.0, 4.0)],
)
def test_the_band_follows_the_upscale_over_native(native, coarseness, cells):
    assert LowBandLockSettings(coarseness=coarseness).cells(a_run(a_start(), native=native)) == pytest.approx(cells)


@settings(max_examples=40)
@given(SHAPES, st.sampled_from([HAAR, GAUSSIAN]), st.floats(0.5, 8))
def test_the_lock_takes_any_size_and_keeps_pictures_apart(shape, filter_, coarseness):
    start, x0 = a_start(shape), a_start(shape, seed=3).latent * 4519
    values = LowBandLockSettings(filter=filter_, coarseness=coarseness)
    whole = locked(values, x0, start, latent=shape[2:])
    first = replace(start, latent=start.latent[:1].half())
    alone = locked(values, x0[:1], first, latent=shape[2:])
    assert whole.isfinite().all() and whole.shape == shape
    torch.testing.assert_close(whole[:1], alone, rtol=1e-3, atol=1e-3 * 4519)


def test_both_together_act_in_registry_order():
    names = ("low_band_lock", "iterative_mixing")
    plan = make_plan({name: BY_NAME[name].settings() for name in names}, a_run(a_start(), sampler=EULER))
    assert list(plan.patches) == ["iterative_mixing", "low_band_lock"]
    assert [type(p) for p in plan.at(NoisyLatent)] == [LatentMixingPatch] and len(plan.at(Guidance)) == 1
