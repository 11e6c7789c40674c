"""What holds for every guidance technique, whatever the latent."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.run import FLOW
from lib_hires.settings import params_of, read_settings
from lib_hires.technique import Rest
from lib_hires.techniques.guidance import apg, cfg_norm, fresca, mahiro, renorm_cfg, rescale_cfg, tcfg
from lib_hires.techniques.guidance.apg import APGPatch, APGSettings
from lib_hires.techniques.guidance.cfg_norm import BEFORE, MULTIPLIER, CFGNormPatch, CFGNormSettings
from lib_hires.techniques.guidance.fresca import BINS, FreScaPatch, FreScaSettings
from lib_hires.techniques.guidance.mahiro import MahiroSettings
from lib_hires.techniques.guidance.reductions import deviation, inner, norm, ratio
from lib_hires.techniques.guidance.renorm_cfg import VELOCITY, RenormCFGPatch, RenormCFGSettings
from lib_hires.techniques.guidance.rescale_cfg import RescaleCFGPatch, RescaleCFGSettings
from lib_hires.techniques.guidance.tcfg import TCFGPatch, TCFGSettings

from .stand_ins import LEVELS, TECHNIQUES, a_run, guide, predictions

W = 7.0
SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([1, 4, 16]), st.integers(1, 20), st.integers(1, 20))


def name_of(value):
    """For test names: the technique of a module."""
    return value.TECHNIQUE.name if hasattr(value, "TECHNIQUE") else None


every_technique = pytest.mark.parametrize("module", TECHNIQUES, ids=name_of)


def raw_predictions(shape=(1, 4, 9, 13), seed=0, sigma=2.0, scale=W):
    generator = torch.Generator().manual_seed(seed)
    shared, c, u, noise = (torch.randn(shape, generator=generator) for _ in range(4))
    cond, uncond = 0.9 * shared + 0.3 * c, 0.9 * shared + 0.3 * u
    return predictions(cond + sigma * noise, cond, uncond, scale, sigma)


def variants():
    """(module, settings, prediction) of every formula that there is."""
    yield tcfg, TCFGSettings(), "eps"
    yield tcfg, TCFGSettings(strength=0.3), "v"
    yield fresca, FreScaSettings(scale_low=0.8, scale_high=1.5, cutoff=0.5), "eps"
    yield fresca, FreScaSettings(scale_low=2.0, scale_high=0.0, cutoff_as=BINS, freq_cutoff=3), "eps"
    yield apg, APGSettings(norm_threshold=2.0), "eps"
    yield apg, APGSettings(eta=0.3, norm_threshold=0.0, comfy_strength=True), "eps"
    yield rescale_cfg, RescaleCFGSettings(), "eps"
    yield rescale_cfg, RescaleCFGSettings(multiplier=1.0), "flow"
    yield renorm_cfg, RenormCFGSettings(renorm=0.6), "eps"
    yield renorm_cfg, RenormCFGSettings(renorm=0.9, space=VELOCITY), "eps"
    yield renorm_cfg, RenormCFGSettings(renorm=0.9, space=VELOCITY), "flow"
    yield cfg_norm, CFGNormSettings(strength=0.7), "eps"
    yield cfg_norm, CFGNormSettings(strength=0.7, mode=BEFORE), "eps"
    yield cfg_norm, CFGNormSettings(strength=1.2, mode=MULTIPLIER), "eps"
    yield mahiro, MahiroSettings(), "eps"


every_variant = pytest.mark.parametrize(("module", "settings", "prediction"), list(variants()), ids=name_of)


# The formulas once more, for one picture, in numpy's float64 and as they are published.


def published_tcfg(s, kind, x, c, u, sigma):
    rows = np.stack([(x - u).ravel(), (x - c).ravel()])
    v1 = np.linalg.svd(rows, full_matrices=False)[2][0]
    damped = x - ((rows[0] @ v1) * v1).reshape(x.shape)
    u = u + s.strength * (damped - u)
    return u + W * (c - u)


def published_fresca(s, kind, x, c, u, sigma):
    _, h, w = c.shape
    mask = np.full((h, w), s.scale_high)
    fy, fx = (min(s.freq_cutoff if s.cutoff_as == BINS else round(s.cutoff * n / 2), n // 2) for n in (h, w))
    mask[h // 2 - fy : h // 2 + fy, w // 2 - fx : w // 2 + fx] = s.scale_low
    spectrum = np.fft.fftshift(np.fft.fft2(c - u), axes=(-2, -1))
    return u + W * np.fft.ifft2(np.fft.ifftshift(spectrum * mask, axes=(-2, -1))).real


def published_apg(s, kind, x, c, u, sigma):
    g = c - u
    if s.norm_threshold:
        threshold = s.norm_threshold * np.sqrt(c[0].size / 64**2) if s.scale_threshold else s.norm_threshold
        g = g * min(1, threshold / np.linalg.norm(g))
    direction = c / np.linalg.norm(c)
    parallel = (g * direction).sum() * direction
    return c + (W if s.comfy_strength else W - 1) * (g - parallel + s.eta * parallel)


def published_rescale_cfg(s, kind, x, c, u, sigma):
    factor = np.sqrt(sigma**2 + 1) / sigma
    to_v = (lambda x0: x0) if kind == "flow" else (lambda x0: (x / (sigma**2 + 1) - x0) * factor)
    back = (lambda v: v) if kind == "flow" else (lambda v: x / (sigma**2 + 1) - v / factor)
    v = to_v(u) + W * (to_v(c) - to_v(u))
    if c.size == 1:  # no deviation, nothing to rescale
        return back(v)
    return back(s.multiplier * to_v(c).std() / v.std() * v + (1 - s.multiplier) * v)


def published_renorm_cfg(s, kind, x, c, u, sigma):
    anchor = 0 if s.space != VELOCITY else x if kind == "flow" else x / (sigma**2 + 1)
    r = u + W * (c - u) - anchor
    return anchor + min(1, s.renorm * np.linalg.norm(c - anchor) / np.linalg.norm(r)) * r


def published_cfg_norm(s, kind, x, c, u, sigma):
    r = u + W * (c - u)
    if s.mode == BEFORE:
        n = x - r
        return x - (s.strength * np.linalg.norm(x - c, axis=0) / np.linalg.norm(n, axis=0) + 1 - s.strength) * n
    scale = np.minimum(1, np.linalg.norm(c, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8))
    return r * scale * s.strength if s.mode == MULTIPLIER else s.strength * r * scale + (1 - s.strength) * r


def published_mahiro(s, kind, x, c, u, sigma):
    r, leap = u + W * (c - u), W * c
    a, b = (np.sign(z) * np.sqrt(abs(z)) for z in (W * u, (leap + r) / 2))
    lengths = np.maximum(np.linalg.norm(a, axis=0), 1e-8) * np.maximum(np.linalg.norm(b, axis=0), 1e-8)
    weight = 2 * (((a * b).sum(axis=0) / lengths).mean() + 1)
    return (weight * r + (4 - weight) * leap) / 4


PUBLISHED = {
    tcfg: published_tcfg,
    fresca: published_fresca,
    apg: published_apg,
    rescale_cfg: published_rescale_cfg,
    renorm_cfg: published_renorm_cfg,
    cfg_norm: published_cfg_norm,
    mahiro: published_mahiro,
}


@every_variant
@given(shape=SHAPES, seed=st.integers(0, 99), sigma=st.sampled_from([0.05, 0.5, 2.0, 14.6]))
def test_the_published_formula_in_plain_numpy(module, settings, prediction, shape, seed, sigma):
    raw = raw_predictions(shape, seed, sigma)
    got = guide([module.begin(settings, a_run(latent=shape[-2:], prediction=prediction))], raw)
    published = PUBLISHED[module]
    for i in range(shape[0]):
        picture = (t[i].double().numpy() for t in (raw.x, raw.cond, raw.uncond))
        want = published(settings, prediction, *picture, sigma)
        # 1e-5 on a latent of unit scale
        assert abs(got[i].double().numpy() - want).max() <= 1e-5 * max(1, abs(want).max() / 10)


@every_variant
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_a_picture_does_not_depend_on_its_batch_mates(module, settings, prediction, shape, seed):
    raw = raw_predictions((3, *shape[1:]), seed)
    loud = torch.tensor([1.0, 1.0, 300.0]).reshape(3, 1, 1, 1)
    raw = replace(raw, x=raw.x * loud, cond=raw.cond * loud, uncond=raw.uncond * loud)
    run = a_run(latent=shape[-2:], prediction=prediction)
    together = guide([module.begin(settings, run)], raw)
    for i in range(3):
        alone = replace(raw, x=raw.x[i : i + 1], cond=raw.cond[i : i + 1], uncond=raw.uncond[i : i + 1])
        got = guide([module.begin(settings, run)], alone)
        torch.testing.assert_close(together[i : i + 1], got, rtol=2e-6, atol=2e-6 * float(loud[i]))


@every_variant
def test_each_picture_has_its_own_scale(module, settings, prediction):
    raw, run = raw_predictions((2, 4, 9, 13)), a_run(latent=(9, 13), prediction=prediction)
    got = guide([module.begin(settings, run)], replace(raw, scale=torch.tensor([3.0, 9.0]).reshape(2, 1, 1, 1)))
    for i, scale in enumerate((3.0, 9.0)):
        want = guide([module.begin(settings, run)], replace(raw, scale=scale))
        torch.testing.assert_close(got[i], want[i], rtol=1e-6, atol=1e-6)


@every_variant
@given(seed=st.integers(0, 99), size=st.tuples(st.integers(1, 33), st.integers(1, 33)))
def test_half_precision_latents_at_the_highest_noise_give_finite_results(module, settings, prediction, seed, size):
    generator = torch.Generator().manual_seed(seed)
    noise, wrong, also_wrong = (torch.randn(2, 4, *size, generator=generator) for _ in range(3))
    x = (4519 * noise).clamp(-6e4, 6e4).half().float()
    cond = (x - 4519 * (noise + 0.3 * wrong)).half().float()  # an eps model's x0 is noise times its error
    uncond = (x - 4519 * (noise + 0.3 * also_wrong)).half().float()
    got = guide([module.begin(settings, a_run(prediction=prediction))], predictions(x, cond, uncond, W, 4519.0))
    assert got.isfinite().all()
    assert got.abs().max() <= 20 * W * 6e4


@every_variant
@pytest.mark.parametrize("level", [0.0, 1.0, 1e3])
def test_flat_and_empty_predictions_give_finite_results(module, settings, prediction, level):
    flat = torch.full((2, 4, 6, 7), level)
    for cond, uncond in ((flat, flat), (flat, 0 * flat), (0 * flat, flat)):
        got = guide([module.begin(settings, a_run(prediction=prediction))], predictions(flat, cond, uncond, W, 1.0))
        assert got.isfinite().all() and got.abs().max() <= 20 * W * max(level, 1)


NEUTRAL = [
    (tcfg, TCFGPatch, TCFGSettings(strength=0.0)),
    (fresca, FreScaPatch, FreScaSettings(scale_low=1.0, scale_high=1.0)),
    (apg, APGPatch, APGSettings(eta=1.0, norm_threshold=0.0, momentum=0.0)),
    (rescale_cfg, RescaleCFGPatch, RescaleCFGSettings(multiplier=0.0)),
    (renorm_cfg, RenormCFGPatch, RenormCFGSettings(renorm=0.0)),
    (cfg_norm, CFGNormPatch, CFGNormSettings(strength=0.0)),
    (cfg_norm, CFGNormPatch, CFGNormSettings(strength=0.0, mode=BEFORE)),
]
neutral = pytest.mark.parametrize(("module", "patch", "settings"), NEUTRAL, ids=name_of)


@neutral
def test_neutral_settings_rest(module, patch, settings):
    with pytest.raises(Rest, match="change"):
        module.begin(settings, a_run())


@neutral
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_the_formula_at_neutral_is_the_identity(module, patch, settings, shape, seed):
    raw = raw_predictions(shape, seed)
    got = guide([patch(settings, a_run())], raw)
    torch.testing.assert_close(got, guide([], raw), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [RenormCFGSettings(renorm=50.0), FreScaSettings(scale_high=1.0)])
def test_what_never_binds_gives_back_the_same_numbers(settings):
    raw = raw_predictions()
    patch = {RenormCFGSettings: RenormCFGPatch, FreScaSettings: FreScaPatch}[type(settings)](settings, a_run())
    assert torch.equal(guide([patch], raw), guide([], raw))


@every_variant
def test_outside_its_window_it_returns_the_very_tensors(module, settings, prediction):
    patch = module.begin(replace(settings, start=0.25, end=0.75), a_run(prediction=prediction))
    for sigma in (14.6, 0.05):
        raw = raw_predictions(sigma=sigma)
        cond, uncond = patch.before_mix(raw.cond, raw.uncond, raw)
        assert cond is raw.cond and uncond is raw.uncond and patch.after_mix(raw.cond, raw) is raw.cond
    assert patch.fired == 0
    raw = raw_predictions(sigma=1.6)
    assert not torch.equal(guide([patch], raw), guide([], raw)) and patch.fired == 1


@every_variant
def test_without_guidance_there_is_nothing_to_change(module, settings, prediction):
    patch = module.begin(settings, a_run(prediction=prediction))
    raw = replace(raw_predictions(), uncond=None, scale=1.0)
    got = guide([patch], raw)
    if getattr(settings, "mode", None) == MULTIPLIER:
        torch.testing.assert_close(got, 1.2 * raw.cond)
    else:
        assert got is raw.cond and patch.fired == 0


@every_technique
def test_presets_and_defaults_are_acceptable_and_describe_themselves(module):
    technique = module.TECHNIQUE
    assert list(technique.presets)
    for settings in (technique.settings(), *technique.presets.values()):
        raw = {name: getattr(settings, name) for name in params_of(settings)}
        assert read_settings(technique.settings, raw) == (settings, [])
        assert settings.problem() is None
    first = next(iter(technique.presets.values()))
    assert first == technique.settings(), "the first preset is what the panel starts with"
    assert "14.6" in module.begin(technique.settings(), a_run()).describe()


@every_technique
def test_an_empty_window_is_a_problem(module):
    assert "raise End" in module.TECHNIQUE.settings(start=0.6, end=0.5).problem()


# Reductions


@given(shape=SHAPES, seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 6e4]))
def test_reductions_are_those_of_each_picture(shape, seed, scale):
    raw = raw_predictions(shape, seed)
    a, b = raw.cond * scale, raw.uncond * scale
    for i in range(shape[0]):
        p, q = a[i].double().numpy(), b[i].double().numpy()
        assert norm(a)[i].item() == pytest.approx(np.sqrt(sum(value**2 for value in p.ravel())), rel=1e-9)
        assert deviation(a)[i].item() == pytest.approx(p.std(), rel=1e-9, abs=1e-9 * scale)
        assert inner(a, b)[i].item() == pytest.approx(sum(p.ravel() * q.ravel()), rel=1e-9, abs=1e-9 * scale**2)


def test_a_quotient_with_nothing_is_one():
    assert ratio(torch.tensor([4.0, 4.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])).tolist() == [2.0, 1.0, 1.0]


# FreSca


def guided_wave(patch, cells, waves):
    """By how much a wave across the picture is scaled."""
    wave = torch.cos(2 * torch.pi * waves * torch.arange(cells) / cells).expand(1, 1, cells, cells).contiguous()
    cond, _ = patch.before_mix(wave, 0 * wave, predictions(wave, wave, 0 * wave, W, 2.0))
    return ((cond * wave).sum() / (wave * wave).sum()).item()


def test_a_cutoff_fraction_means_the_same_grain_at_every_size():
    patch = fresca.begin(FreScaSettings(), a_run())
    for waves in (5, 19, 21, 31):
        assert guided_wave(patch, 64, waves) == pytest.approx(1.25 if waves > 20 else 1.0, abs=1e-5)
        assert guided_wave(patch, 128, 2 * waves) == pytest.approx(guided_wave(patch, 64, waves), abs=1e-5)
    assert guided_wave(patch, 64, 20) == pytest.approx(1.125, abs=1e-5)


def test_a_cutoff_in_bins_counts_waves_across_the_picture():
    patch = fresca.begin(FreScaSettings(cutoff_as=BINS), a_run())
    for cells in (64, 128):
        assert guided_wave(patch, cells, 19) == pytest.approx(1.0, abs=1e-5)
        assert guided_wave(patch, cells, 21) == pytest.approx(1.25, abs=1e-5)


# RescaleCFG, RenormCFG, CFGNorm


@given(shape=SHAPES, seed=st.integers(0, 99))
def test_rescaling_in_full_gives_the_deviation_of_cond(shape, seed):
    raw = raw_predictions(shape, seed)
    got = guide([rescale_cfg.begin(RescaleCFGSettings(multiplier=1.0), a_run(prediction=FLOW))], raw)
    for mine, cond in zip(got, raw.cond, strict=True):
        assert mine.double().std(correction=0).item() == pytest.approx(cond.double().std(correction=0).item(), abs=1e-5)


@given(shape=SHAPES, seed=st.integers(0, 99), renorm=st.floats(0.1, 3))
def test_renorm_never_makes_longer_and_keeps_to_its_bound(shape, seed, renorm):
    raw = raw_predictions(shape, seed)
    got, plain = guide([renorm_cfg.begin(RenormCFGSettings(renorm=renorm), a_run())], raw), guide([], raw)
    for mine, before, cond in zip(got, plain, raw.cond, strict=True):
        assert mine.norm() <= min(before.norm(), renorm * cond.norm()) + 1e-6 * before.norm()


def test_strength_above_one_is_only_for_the_plain_multiplier():
    assert "lower Strength to 1" in CFGNormSettings(strength=1.5).problem()
    assert "lower Strength to 1" in CFGNormSettings(strength=1.5, mode=BEFORE).problem()
    assert CFGNormSettings(strength=1.5, mode=MULTIPLIER).problem() is None


# Truncation


def skipped(settings, run=None):
    run = run or a_run()
    patch = renorm_cfg.begin(settings, run)
    return [patch.skips_uncond(predictions(None, None, None, W, sigma).call) for sigma in run.sigmas]


def test_guidance_from_and_until_count_steps_of_the_pass():
    assert skipped(RenormCFGSettings()) == [False] * 20
    assert skipped(RenormCFGSettings(guidance_until=0.5)) == [False] * 11 + [True] * 9
    assert skipped(RenormCFGSettings(guidance_from=0.25)) == [True] * 5 + [False] * 15
    assert skipped(RenormCFGSettings(renorm=0.0, guidance_from=0.25, guidance_until=0.5)) == (
        [True] * 5 + [False] * 6 + [True] * 9
    )


def test_a_hires_pass_counts_its_own_part():
    half = a_run(LEVELS[10:])
    assert skipped(RenormCFGSettings(guidance_until=0.5), half) == [False] * 6 + [True] * 4


def test_cfg_trunc_is_a_noise_level_and_a_hundred_is_off_even_for_zero_snr():
    assert skipped(RenormCFGSettings(cfg_trunc=5.0)) == [sigma >= 5 for sigma in LEVELS]
    assert skipped(RenormCFGSettings(), a_run((4518.0, *LEVELS))) == [False] * 21


def test_the_window_of_renorm_does_not_truncate():
    assert skipped(RenormCFGSettings(start=0.4, end=0.6)) == [False] * 20


@pytest.mark.parametrize("host_can_skip", [True, False])
def test_a_truncated_call_gives_cond_in_any_host(host_can_skip):
    raw = raw_predictions(sigma=0.1)
    raw = replace(raw, uncond=None) if host_can_skip else raw
    patch = renorm_cfg.begin(RenormCFGSettings(renorm=0.5, guidance_until=0.5), a_run())
    torch.testing.assert_close(guide([patch], raw), raw.cond, rtol=0, atol=1e-6)
    assert patch.fired == 1


def test_a_pass_without_guidance_at_all_is_a_problem():
    assert "raise Guidance until" in RenormCFGSettings(guidance_from=0.5, guidance_until=0.5).problem()
    assert "raise End" in RenormCFGSettings(start=1.0).problem()


# APG


@pytest.mark.parametrize(
    ("latent", "threshold"), [((64, 64), 15), ((128, 128), 30), ((32, 32), 7.5), ((128, 64), 21.2132)]
)
def test_the_threshold_grows_with_the_length_of_what_it_bounds(latent, threshold):
    assert APGSettings().threshold(a_run(latent=latent)) == pytest.approx(threshold, rel=1e-5)
    assert APGSettings(scale_threshold=False).threshold(a_run(latent=latent)) == 15


MOMENTUM_ONLY = APGSettings(eta=1.0, norm_threshold=0.0, momentum=-0.5)


def differences(n, shape=(1, 4, 5, 6)):
    return [raw_predictions(shape, seed).cond for seed in range(n)]


def running(calls, sigmas):
    """G that APG uses at each (sigma, g) of `calls`, in a run planned with `sigmas`."""
    patch = apg.begin(MOMENTUM_ONLY, a_run(sigmas))
    used = []
    for sigma, g in calls:
        cond, uncond = patch.before_mix(g, 0 * g, predictions(g, g, 0 * g, W, sigma))
        used.append(cond - uncond)
    return used


def assert_same(got, want):
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_momentum_is_the_published_recursion_where_a_step_is_one_evaluation():
    gs = differences(20)
    want = [gs[0]]
    for g in gs[1:]:
        want.append(g - 0.5 * want[-1])
    assert_same(running(zip(LEVELS, gs, strict=True), LEVELS), want)


def test_momentum_is_applied_once_a_step_where_the_second_evaluation_is_at_the_next_level():
    """Heun: a step ends at the level at which the next one begins."""
    gs = differences(7)
    s = LEVELS[:4]
    calls = [(s[0], gs[0]), (s[1], gs[1]), (s[1], gs[2]), (s[2], gs[3]), (s[2], gs[4]), (s[3], gs[5])]
    got = running(calls, LEVELS)
    g1 = gs[2] - 0.5 * gs[0]
    g2 = gs[4] - 0.5 * g1
    assert_same(got, [gs[0], gs[1] - 0.5 * gs[0], g1, gs[3] - 0.5 * g1, g2, gs[5] - 0.5 * g2])


def test_momentum_is_applied_once_a_step_where_the_second_evaluation_is_in_between():
    """DPM2, SDE: the evaluation in between belongs to its step, and leaves nothing behind."""
    gs = differences(5)
    s = LEVELS[:3]
    between = [(s[i] * s[i + 1]) ** 0.5 for i in range(2)]
    got = running(zip([s[0], between[0], s[1], between[1], s[2]], gs, strict=True), LEVELS)
    g1 = gs[2] - 0.5 * gs[0]
    assert_same(got, [gs[0], gs[1], g1, gs[3] - 0.5 * gs[0], gs[4] - 0.5 * g1])


def test_rounding_of_a_level_begins_no_step():
    gs = differences(3)
    got = running(zip([LEVELS[0], LEVELS[1], LEVELS[1] * (1 - 1e-6)], gs, strict=True), LEVELS)
    assert_same(got, [gs[0], gs[1] - 0.5 * gs[0], gs[2] - 0.5 * gs[0]])


def test_momentum_starts_anew_where_noise_rises():
    """Restart sampling."""
    gs = differences(5)
    s = LEVELS
    got = running(zip([s[0], s[5], s[6], s[4], s[5]], gs, strict=True), LEVELS)
    g1 = gs[1] - 0.5 * gs[0]
    assert_same(got, [gs[0], g1, gs[2] - 0.5 * g1, gs[3], gs[4] - 0.5 * gs[3]])


def test_momentum_starts_anew_where_the_latent_changes_its_shape():
    gs = [*differences(2), *differences(2, (2, 4, 7, 5))]
    got = running(zip(LEVELS, gs, strict=False), LEVELS)
    assert_same(got, [gs[0], gs[1] - 0.5 * gs[0], gs[2], gs[3] - 0.5 * gs[2]])


def test_an_adaptive_sampler_takes_a_step_wherever_noise_falls():
    gs = differences(3)
    got = running(zip([14.6, 9.1, 3.3], gs, strict=True), (14.6, 0.03))
    g1 = gs[1] - 0.5 * gs[0]
    assert_same(got, [gs[0], g1, gs[2] - 0.5 * g1])


def test_momentum_of_a_run_does_not_reach_the_next():
    gs = differences(2)
    running([(LEVELS[0], gs[0])], LEVELS)
    assert_same(running([(LEVELS[1], gs[1])], LEVELS), [gs[1]])


def test_a_step_without_uncond_leaves_the_momentum_alone():
    raws = [replace(raw_predictions(seed=i), call=predictions(0, 0, 0, W, s).call) for i, s in enumerate(LEVELS[:3])]
    patches = [apg.begin(MOMENTUM_ONLY, a_run()) for _ in range(2)]
    skipping = [guide(patches[:1], raw) for raw in (raws[0], replace(raws[1], uncond=None), raws[2])]
    plain = [guide(patches[1:], raw) for raw in (raws[0], raws[2])]
    assert torch.equal(skipping[2], plain[1]) and patches[0].fired == 2


@given(shape=SHAPES, seed=st.integers(0, 99), eta=st.floats(-2, 2))
def test_what_is_projected_keeps_eta_of_its_part_along_cond(shape, seed, eta):
    raw = raw_predictions(shape, seed)
    g = raw.cond - raw.uncond
    got = inner(apg.projected(g, raw.cond, eta), raw.cond)
    torch.testing.assert_close(got, eta * inner(g, raw.cond), rtol=1e-5, atol=1e-4)


# TCFG


@given(shape=SHAPES, seed=st.integers(0, 99))
def test_an_uncond_in_the_direction_of_cond_has_nothing_to_lose(shape, seed):
    raw = raw_predictions(shape, seed)
    along = raw.x + 2 * (raw.cond - raw.x)
    torch.testing.assert_close(tcfg.damped_uncond(raw.x, raw.cond, along), along, rtol=0, atol=1e-5)


@given(shape=SHAPES, seed=st.integers(0, 99), sigma=st.sampled_from([0.5, 14.6]))
def test_what_is_left_of_uncond_stands_on_what_was_taken(shape, seed, sigma):
    """A projection: the part kept and the part lost are orthogonal, and the part kept is no longer than the whole."""
    raw = raw_predictions(shape, seed, sigma)
    kept = raw.x.double() - tcfg.damped_uncond(raw.x.double(), raw.cond.double(), raw.uncond.double())
    lost = (raw.x - raw.uncond.double()) - kept
    assert (inner(kept, lost).abs() <= 1e-8 * (1 + norm(kept) ** 2)).all()
    assert (norm(kept) <= norm(raw.x.double() - raw.uncond) * (1 + 1e-9)).all()


def test_with_no_dominant_direction_uncond_stays():
    x = torch.zeros(1, 1, 1, 2)
    cond, uncond = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    assert torch.equal(tcfg.damped_uncond(x, cond, uncond), uncond)
