"""PAG and SEG: recorded results of the reference, attention written out in numpy, and properties."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from lib_hires.attention import attend
from lib_hires.noise import NoiseSchedule
from lib_hires.run import FIRST_PASS, PERTURBED, Call, ModelFacts, Run
from lib_hires.settings import Unusable, read_settings
from lib_hires.sites import Place, Predictions, Projections
from lib_hires.technique import Refusal, Rest
from lib_hires.techniques.guidance.pag import (
    FULL,
    PAG,
    PARTIAL,
    SEG,
    SEG_MEAN,
    SNF,
    TECHNIQUE,
    PagSettings,
    begin,
    curve,
    faded_scale,
    rescaled,
    salient,
    smoothed_attention,
)
from lib_hires.topology import MIDDLE, AttentionLayer
from tests.guidance.test_attention_blocks import SD15, SDXL

SD = NoiseSchedule.scaled_linear()
M0 = AttentionLayer(MIDDLE, 0, 0)
GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "pag.npz")
CASES = [case for case in json.loads(str(GOLDEN["meta"]))["cases"] if case["agrees_with_spec"] == "yes"]
INFINITE = float("inf")


def a_run(unet=SD15, sigmas=(14.6, 5.0, 1.0, 0.0)):
    return Run("bench", FIRST_PASS, ModelFacts("SD 1.x", (64, 64), SD, unet), (64, 64), sigmas)


def raw(cond, uncond, perturbed, sigma=1.0, scale=5.0):
    def no_more(x, kind):
        raise AssertionError("PAG asks for no evaluation of its own")

    return Predictions(torch.zeros_like(cond), cond, uncond, scale, Call(sigma, 0), perturbed, no_more)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def golden(case, name):
    return torch.from_numpy(GOLDEN[f"case_{case['case']}_{name}"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_combination_agrees_with_the_reference(case):
    p = case["parameters"]
    cond, uncond, perturbed = (golden(case, f"in_{name}") for name in ("c", "u", "perturbed"))
    mode = {"plain": FULL, "full": FULL, "partial": PARTIAL, "snf": SNF}[p["variant"]]
    patch = begin(PagSettings(scale=p["scale"], rescale=p.get("rescale", 0.0), rescale_mode=mode), a_run())
    denoised = uncond + p["cfg_scale"] * (cond - uncond)
    got = patch.after_mix(denoised, raw(cond, None if p["cfg_scale"] == 1 else uncond, perturbed))
    want, tolerance = golden(case, "out"), case["tolerance"]
    assert (got - want).abs().max() <= tolerance["atol"] + tolerance["rtol_of_max"] * want.abs().max()


def numpy_attention(q, k, v, heads):
    """softmax(q k^T / sqrt(d)) v of one row, head by head, in float64."""
    out = []
    for qh, kh, vh in zip(*(np.split(t, heads, axis=1) for t in (q, k, v)), strict=True):
        logits = qh @ kh.T / np.sqrt(qh.shape[1])
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out.append(weights / weights.sum(axis=1, keepdims=True) @ vh)
    return np.concatenate(out, axis=1)


SIZES = st.tuples(st.integers(1, 13), st.integers(1, 13))


@given(size=SIZES, heads=st.sampled_from([1, 2, 4]), sigma=st.floats(0.2, 30))
def test_seg_is_attention_with_blurred_queries(size, heads, sigma):
    (h, w), n = size, size[0] * size[1]
    q, k, v = (noise(2, n, 8, seed=seed) for seed in range(3))
    got = smoothed_attention(q, k, v, heads, size, sigma)
    for row in range(2):
        tokens = q[row].double().numpy().reshape(h, w, 8)
        radius = int(np.ceil(3 * sigma))
        blurred = gaussian_filter(tokens, sigma, mode="mirror", radius=radius, axes=(0, 1)).reshape(n, 8)
        want = numpy_attention(blurred, k[row].double().numpy(), v[row].double().numpy(), heads)
        assert abs(got[row].double().numpy() - want).max() <= 1e-5


@given(size=SIZES, heads=st.sampled_from([1, 2, 4]))
def test_seg_with_an_infinite_sigma_attends_with_the_mean_query(size, heads):
    n = size[0] * size[1]
    q, k, v = (noise(2, n, 8, seed=seed) for seed in range(3))
    got = smoothed_attention(q, k, v, heads, size, INFINITE)
    assert got.shape == q.shape
    for row in range(2):
        mean = np.broadcast_to(q[row].double().numpy().mean(axis=0), (n, 8))
        want = numpy_attention(mean, k[row].double().numpy(), v[row].double().numpy(), heads)
        assert abs(got[row].double().numpy() - want).max() <= 1e-5


def place(size=(3, 5), heads=2, layer=M0):
    return Place(layer, size, heads, Call(1.0, 0), PERTURBED)


def forbidden():
    raise AssertionError("computed in vain")


def test_identity_attention_returns_the_values_and_computes_nothing_else():
    v, patch = noise(1, 15, 8), begin(PagSettings(), a_run())
    assert patch.perturb(Projections(forbidden, forbidden, lambda: v), place()) is v
    assert patch.fired == 1


@pytest.mark.parametrize("mode", [PAG, SEG, SEG_MEAN])
def test_where_another_extension_merged_all_tokens_the_mode_goes_on_as_far_as_it_can(mode, caplog):
    patch = begin(PagSettings(mode=mode), a_run())
    q, k, v = (noise(1, 7, 8, seed=seed) for seed in range(3))
    with caplog.at_level(logging.WARNING):
        out = patch.perturb(Projections(lambda: q, lambda: k, lambda: v), place())
    want = {PAG: v, SEG: attend(q, k, v, 2), SEG_MEAN: smoothed_attention(q, k, v, 2, (1, 7), INFINITE)}[mode]
    assert torch.equal(out, want)
    assert patch.fired == (mode != SEG) and ("reduced its tokens" in caplog.text) == (mode == SEG)


@pytest.mark.parametrize("mode", [PAG, SEG, SEG_MEAN])
def test_where_another_extension_reduced_keys_and_values(mode, caplog):
    patch = begin(PagSettings(mode=mode), a_run())
    q, k, v = noise(1, 15, 8), noise(1, 6, 8, seed=1), noise(1, 6, 8, seed=2)
    for _ in range(2):
        out = patch.perturb(Projections(lambda: q, lambda: k, lambda: v), place())
        assert out.shape == q.shape and out.isfinite().all()
    assert torch.equal(out, attend(q, k, v, 2)) == (mode == PAG)
    assert caplog.text.count("reduced its tokens") == (mode == PAG), "told once"


@given(a=st.floats(0, 1), t=st.floats(0, 999), scale=st.floats(0, 100))
def test_the_adaptive_scale_never_rises_and_never_turns(a, t, scale):
    faded = faded_scale(scale, a, t)
    assert 0 <= faded <= scale and faded <= faded_scale(scale, a, min(t + 1, 999))
    assert faded == pytest.approx(max(scale - scale * a**4 * (1000 - t), 0))
    assert faded_scale(scale, 0, t) == scale


@pytest.mark.parametrize(
    ("a", "fraction", "left"),
    [(0.15, 1.0, (0.4, 0.6)), (0.2, 0.6, (0.0, 0.1)), (0.2, 0.64, (0, 0)), (0.5, 0.02, (0, 0))],
)
def test_the_fade_is_what_the_help_says(a, fraction, left):
    assert left[0] <= faded_scale(1.0, a, 999 * (1 - fraction)) <= left[1]


@given(sigma=st.floats(0.03, 14.6), start=st.floats(0, 0.6), a=st.floats(0, 0.4))
def test_it_asks_for_a_prediction_exactly_where_it_has_a_scale(sigma, start, a):
    try:
        patch = begin(PagSettings(start=start, end=0.8, adaptive_scale=a), a_run())
    except Rest:
        return
    call, cond = Call(sigma, 0), noise(1, 4, 6, 5)
    acts = patch.perturbs(call)
    assert acts == (patch.effective_scale(sigma) > 0)
    out = patch.after_mix(cond, raw(cond, None, cond + 1, sigma))
    assert (out is cond) == (not acts)


@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    rho=st.floats(0, 1),
    mode=st.sampled_from([FULL, PARTIAL, SNF]),
    guided=st.booleans(),
)
def test_pictures_of_a_batch_do_not_see_each_other(h, w, rho, mode, guided):
    cond, uncond, perturbed, denoised = (noise(3, 4, h, w, seed=seed) for seed in range(4))
    patch = begin(PagSettings(rescale=rho, rescale_mode=mode), a_run())
    together = patch.after_mix(denoised, raw(cond, uncond if guided else None, perturbed))
    one = slice(1, 2)
    alone = patch.after_mix(denoised[one], raw(cond[one], uncond[one] if guided else None, perturbed[one]))
    torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-4)
    assert together.isfinite().all()


def test_a_full_rescale_gives_the_guided_prediction_the_contrast_of_cond():
    cond, g = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    factor = rescaled(g, cond, cond, 1.0, PARTIAL) / g
    torch.testing.assert_close(factor.mean((1, 2, 3)), cond.std((1, 2, 3)) / (cond + g).std((1, 2, 3)))
    assert rescaled(g, cond, cond, 0.0, FULL) is g


def test_flat_predictions_do_not_divide_by_zero():
    flat = torch.full((1, 4, 3, 3), 0.5)
    assert rescaled(flat, flat, flat, 1.0, FULL).isfinite().all()


@given(h=st.integers(1, 9), w=st.integers(1, 9))
def test_saliency_takes_every_element_from_one_of_the_two(h, w):
    first, second = noise(2, 4, h, w), noise(2, 4, h, w, seed=1)
    out = salient(first, second)
    assert ((out == first) | (out == second)).all()


@given(mode=st.sampled_from([SEG, SEG_MEAN]), dtype=st.sampled_from([torch.float16, torch.bfloat16]), size=SIZES)
def test_half_precision_stays_half_and_finite(mode, dtype, size):
    n = size[0] * size[1]
    q, k, v = (1e3 * noise(1, n, 8, seed=seed, dtype=dtype) for seed in range(3))
    patch = begin(PagSettings(mode=mode), a_run())
    out = patch.perturb(Projections(lambda: q, lambda: k, lambda: v), place(size))
    assert out.dtype == dtype and out.shape == q.shape and out.isfinite().all()


def test_layers_are_those_of_the_block_list():
    patch = begin(PagSettings(blocks="m0.3, u0"), a_run(SDXL))
    chosen = [layer for layer in SDXL.attention if patch.perturbs_in(layer)]
    assert len(chosen) == 11 and chosen[0] == AttentionLayer(MIDDLE, 0, 3)
    assert "m0.3, u0" in patch.describe() and "from sigma 14.6 to 0" in patch.describe()


@pytest.mark.parametrize(
    ("settings", "unet", "kind", "words"),
    [
        (PagSettings(), None, Refusal, "not a UNet"),
        (
            PagSettings(blocks="m1"),
            SD15,
            Refusal,
            "m1 does not exist; blocks with attention are d0 to d5, m0, u0 to u8",
        ),
        (PagSettings(blocks="d2.2-9"), SD15, Refusal, "d2 has only depth 0 in SD 1.x"),
        (PagSettings(scale=0.0), SD15, Rest, "scale 0"),
        (PagSettings(mode=SEG, blur_sigma=0.0), SD15, Rest, "blur sigma 0"),
        (PagSettings(adaptive_scale=1.0), SD15, Rest, "faded"),
    ],
)
def test_it_does_not_act_and_says_why(settings, unet, kind, words):
    with pytest.raises(kind, match=words):
        begin(settings, a_run(unet))


def test_the_other_modes_do_not_care_for_the_blur_sigma():
    assert begin(PagSettings(mode=SEG_MEAN, blur_sigma=0.0), a_run())
    assert begin(PagSettings(blur_sigma=0.0), a_run())


def test_bad_blocks_never_reach_a_run():
    with pytest.raises(Unusable, match=r"Blocks = 'middle': .*m0, u0\.4"):
        read_settings(PagSettings, {"blocks": "middle"})


def test_an_empty_window_is_a_problem():
    assert "raise End" in PagSettings(start=0.5, end=0.5).problem()


def test_the_plot_shows_the_scale_of_every_step():
    settings = PagSettings(adaptive_scale=0.2, end=0.9)
    run = a_run(sigmas=tuple(SD.sigma(t) for t in range(999, 0, -50)))
    drawn, patch = curve(settings, run), begin(settings, run)
    assert drawn.values == tuple(patch.effective_scale(sigma) for sigma in run.sigmas)
    assert list(dict.fromkeys(drawn.phases)) == ["guided", "off"]


@pytest.mark.parametrize("name", TECHNIQUE.presets)
def test_every_preset_acts_on_sdxl(name):
    settings = TECHNIQUE.presets[name]
    assert settings.problem() is None and begin(settings, a_run(SDXL)).perturbs(Call(14.0, 0))
