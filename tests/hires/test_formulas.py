"""The helpers of the hires pass against numpy and scipy, at any size and precision."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from lib_hires.blending import (
    ADDITION,
    FUNCTIONS,
    NORM_ONLY,
    SCHEDULES,
    SLERP,
    BlendingSchedule,
    blended,
)
from lib_hires.detail_map import between, detail_map
from lib_hires.low_band import gaussian_low, haar_level, haar_low
from lib_hires.progress import AXES, LOG_SIGMA, STEP, TIMESTEP, position_in
from lib_hires.unsampler import unsample

from .stand_ins import SD, a_run, a_start, levels

SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([1, 4, 16]), st.integers(1, 23), st.integers(1, 23))
SHARES = st.floats(0, 1)


def pair(shape, seed=0):
    start = a_start(shape, seed)
    return start.latent, start.noise


# --- schedules


def share(position, alpha=2.0, **schedule):
    return BlendingSchedule(**schedule).share(position, alpha)


def test_the_papers_and_the_nodes_alpha_agree_at_1_and_part_elsewhere():
    assert share(0.5, 1.0) == pytest.approx(share(0.5, 1.0, node_weights=True))
    assert share(0.5, 3.0) == pytest.approx(0.125)
    assert share(0.5, 3.0, node_weights=True) == pytest.approx(0.875)


@given(st.sampled_from(SCHEDULES), st.booleans(), st.floats(0, 20), st.floats(0, 1), st.floats(0, 3), st.floats(0, 1))
def test_shares_fall_from_maximum_to_minimum(kind, node, alpha, start, stop, clamp):
    schedule = BlendingSchedule(kind, start, stop, clamp, 0.2, 0.9, node)
    shares = [schedule.share(p / 40, alpha) for p in range(41)]
    assert all(0.2 - 1e-9 <= s <= 0.9 + 1e-9 for s in shares)
    if not (node and alpha < 0.01):  # sin^0 is 1 but for 0 itself
        assert all(a >= b - 1e-9 for a, b in pairwise(shares))


def test_a_stop_above_1_stretches_the_curve_and_start_holds_the_reference():
    assert share(1.0, 1.0, stop=2.0) == pytest.approx(share(0.5, 1.0)) == pytest.approx(0.5)
    assert share(0.19, start=0.2) == 1
    assert share(0.2, start=0.2) < 1
    assert share(0.81, stop=0.8) == 0


def test_a_stop_of_0_is_no_mixing_and_no_division_by_zero():
    assert [share(p, stop=0.0, kind=kind) for kind in SCHEDULES for p in (0.0, 0.5)] == [0] * 6


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("node", [False, True])
def test_a_map_of_alpha_acts_cell_by_cell(kind, node):
    alpha = torch.linspace(0.1, 4, 12, dtype=torch.float64).view(1, 1, 3, 4)
    schedule = BlendingSchedule(kind, stop=1.2, minimum=0.1, node_weights=node)
    got = torch.as_tensor(schedule.share(0.4, alpha), dtype=torch.float64).expand_as(alpha)
    want = [schedule.share(0.4, float(a)) for a in alpha.flatten()]
    torch.testing.assert_close(got.flatten(), torch.tensor(want, dtype=torch.float64))


# --- blending functions


def published_slerp(a, b, weight):
    """For one picture: a at weight 1."""
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    angle = np.arccos(np.clip(cosine, -1, 1))
    return np.sin(weight * angle) / np.sin(angle) * a + np.sin((1 - weight) * angle) / np.sin(angle) * b


@given(SHAPES.filter(lambda shape: math.prod(shape[1:]) > 1), st.floats(0.01, 1))
def test_slerp_is_the_published_one(shape, weight):
    a, b = pair(shape)
    want = np.stack(
        [published_slerp(x, y, weight) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)]
    )
    got = blended(a.double(), b.double(), weight, SLERP).numpy()
    assert abs(got - want).max() <= 1e-6 * max(1, abs(want).max())


@pytest.mark.parametrize("other", [lambda a: a.clone(), lambda a: 3 * a, lambda a: -a, lambda a: 0 * a])
def test_slerp_falls_back_to_the_line_where_there_is_no_arc(other):
    a = a_start((2, 4, 5, 7)).latent
    got = blended(a, other(a), 0.3, SLERP)
    assert got.isfinite().all()
    if other(a).abs().max():  # a latent of zeros has no direction
        torch.testing.assert_close(got, 0.3 * a + 0.7 * other(a), rtol=1e-4, atol=1e-4)


def test_slerp_is_exact_at_small_angles_in_single_precision():
    a = a_start((1, 4, 32, 32)).latent
    b = a + 0.01 * a_start((1, 4, 32, 32)).noise
    want = published_slerp(a.double().numpy(), b.double().numpy(), 0.25)
    assert abs(blended(a, b, 0.25, SLERP).numpy() - want).max() < 2e-6


def test_norm_only_has_the_references_length_where_the_angle_is_0():
    a = a_start((1, 4, 5, 7)).latent
    torch.testing.assert_close(blended(a, 5 * a, 0.3, NORM_ONLY), a)


@given(SHAPES, st.sampled_from(FUNCTIONS), SHARES, st.integers(0, 99))
def test_pictures_do_not_depend_on_their_batch_mates(shape, function, weight, seed):
    a, b = pair(shape, seed)
    whole = blended(a, b, weight, function)
    alone = torch.cat([blended(a[i : i + 1], b[i : i + 1], weight, function) for i in range(len(a))])
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_share_returns_the_very_sample_and_a_whole_share_the_reference(function):
    a, b = pair((2, 4, 5, 7))
    assert blended(a, b, 0.0, function) is b
    torch.testing.assert_close(blended(a, b, 1.0, function), a, rtol=0, atol=1e-6)
    if function == ADDITION:
        assert torch.equal(blended(a, b, 1.0, function), a)


@given(st.sampled_from(FUNCTIONS), SHARES, st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_stays_finite_at_the_highest_noise_level(function, weight, dtype):
    a, b = pair((1, 4, 64, 64))
    sigma = 4519.0
    noised = unsample(a.to(dtype), b.to(dtype), [sigma])[0]
    sample = (b * sigma).to(dtype)
    got = blended(noised, sample, weight, function)
    assert got.dtype == dtype and got.isfinite().all()


# --- progress


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("sigmas", [levels(), levels(12, 0.6), (*levels(5, 0.4), 0.0), levels(1), (14.6, 0.03)])
def test_positions_rise_as_noise_falls(axis, sigmas):
    position = position_in(a_run(sigmas=sigmas), axis)
    got = [position(sigma) for sigma in (*np.geomspace(max(sigmas), 0.0292, 50), 0.0)]
    assert all(0 <= p <= 1 for p in got) and got == sorted(got)


def test_what_the_axes_count():
    run = a_run(sigmas=levels(10, 0.6))
    timestep, step, log_sigma = (position_in(run, axis) for axis in (TIMESTEP, STEP, LOG_SIGMA))
    assert timestep(run.sigma_first) == pytest.approx(1 - 0.6 * 0.999)
    assert [step(sigma) for sigma in run.sigmas] == pytest.approx([i / 10 for i in range(10)])
    middle = math.sqrt(run.sigma_first * SD.sigmas[0])
    assert log_sigma(middle) == pytest.approx(0.5)


# --- unsampler


@given(SHAPES, st.booleans(), st.integers(0, 12), st.integers(1, 12), st.floats(0, 1))
def test_noised_references(shape, flow, start, end, fraction):
    z, n = pair(shape)
    sigmas = [*np.linspace(1, 0.1, 10), 0.0]
    got = unsample(z, n, sigmas, flow=flow, start_step=start, end_step=end, normalize_fraction=fraction)
    chosen = sorted(s for s in sigmas[start:end] if s)
    want = [(z * (1 - s) if flow else z) + s * n for s in chosen]
    if want and fraction:
        noisiest = torch.stack(want)[-max(1, round(fraction * len(want))) :]
        mean = noisiest.double().mean(dim=(0, 2, 3, 4))[:, None, None, None].float()
        want = [level - mean for level in want]
    assert len(got) == len(want) and got.sigmas == tuple(chosen)
    for level, expected in zip(got, want, strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-5, atol=1e-5)


def test_levels_are_made_when_asked_for_and_one_reference_serves_a_batch():
    z, _ = pair((1, 4, 64, 64))
    _, n = pair((3, 4, 64, 64))
    got = unsample(z, n, np.linspace(1, 0, 1_000_001)[:-1])  # a million levels
    assert len(got) == 1_000_000 and got[5].shape == (3, 4, 64, 64)
    assert torch.equal(got[2:][0], got[2]) and torch.equal(got[-1], z + n)
    assert got.clean is z


# --- low bands


@given(SHAPES, st.integers(0, 5))
def test_the_haar_low_band_is_the_mean_of_blocks(shape, level):
    x, _ = pair(shape)
    want, block = x.double().numpy().copy(), 2**level
    for top in range(0, shape[2], block):
        for left in range(0, shape[3], block):
            part = want[..., top : top + block, left : left + block]
            part[...] = part.mean(axis=(2, 3), keepdims=True)
    assert abs(haar_low(x, level).numpy() - want).max() < 1e-5


def test_the_haar_low_band_is_what_the_wavelet_says():
    """Low-pass [1, 1]/sqrt 2, every second, once per level, and the synthesis filters back."""
    x = a_start((1, 2, 16, 24)).latent.double().numpy()
    low = x
    for _ in range(2):
        for axis in (2, 3):
            pairs = low.reshape(*low.shape[:axis], -1, 2, *low.shape[axis + 1 :])
            low = pairs.sum(axis=axis + 1) / math.sqrt(2)
    for _ in range(2):
        for axis in (2, 3):
            low = np.repeat(low, 2, axis=axis) / math.sqrt(2)
    assert abs(haar_low(torch.from_numpy(x), 2).numpy() - low).max() < 1e-12


def test_the_gaussian_low_band_is_scipys():
    x = a_start((2, 4, 17, 23)).latent.double()
    sigma = 0.3 * 4
    radius = math.ceil(3 * sigma)
    want = ndimage.gaussian_filter(x.numpy(), sigma, axes=(2, 3), mode="mirror", truncate=radius / sigma)
    assert abs(gaussian_low(x, 4.0).numpy() - want).max() < 1e-10


def test_both_filters_pass_about_the_same():
    for cells in (2.0, 4.0, 8.0):
        wave = torch.cos(2 * math.pi * 0.44 / cells * torch.arange(4096.0)).expand(1, 1, 8, -1)
        power = [float(low.square().mean() / wave.square().mean()) for low in (gaussian_low(wave, cells),)]
        assert power[0] == pytest.approx(0.5, abs=0.05)


def test_levels_of_haar():
    assert [haar_level(cells) for cells in (0.5, 1, 2, 2.8, 3, 4, 8)] == [1, 1, 1, 1, 2, 2, 3]


# --- detail map


def test_the_detail_map_finds_the_detailed_half():
    z = torch.zeros(1, 4, 32, 48)
    z[..., 24:] = a_start((1, 4, 32, 24)).latent
    got = detail_map(z, 2.0)
    assert got.shape == (1, 1, 32, 48)
    assert got[..., :16].max() < 0.05 and got[..., 32:].mean() > 0.6
    edge = got[0, 0, 16, 16:32]
    assert (edge.diff().abs() < 0.35).all(), "soft edges"


@given(SHAPES, st.floats(0, 32))
def test_the_detail_map_is_between_0_and_1_at_any_size_and_per_picture(shape, softness):
    z, _ = pair(shape)
    got = detail_map(z.half(), softness)
    assert got.shape == (shape[0], 1, *shape[2:]) and ((got >= 0) & (got <= 1)).all()
    torch.testing.assert_close(detail_map(z[:1].half(), softness), got[:1], rtol=1e-4, atol=1e-4)


def test_a_plain_picture_is_plain_and_loudness_does_not_matter():
    assert detail_map(torch.full((1, 4, 20, 20), 7.3), 2.0).max() < 0.2
    z = a_start().latent
    torch.testing.assert_close(detail_map(z, 2.0), detail_map(5 * z, 2.0), rtol=1e-4, atol=1e-4)


def test_between_is_a_value_per_cell():
    mask = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    assert between(0.5, 3.0, mask).flatten().tolist() == [0.5, 1.75, 3.0]
