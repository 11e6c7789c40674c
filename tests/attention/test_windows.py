"""Windows and tiles of a map: they cover it, answer every token, and never leave it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hires.attention import attend
from lib_hires.techniques.attention.near_sighted_tile import samples_of_map, tiles_with_samples
from lib_hires.techniques.attention.scale_fusion import fused, neighbourhoods, overlapping_windows
from lib_hires.techniques.attention.tiles import Tiles
from lib_hires.tiling import attend_in, seeded, shifted, strided_grids
from lib_hires.token_blur import blur, gaussian
from lib_hires.tokens import MODES, Reduction
from tests.attention.oracle import a_place, numpy_attention, tokens

SIZES = st.one_of(
    st.sampled_from([(65, 97), (13, 17), (31, 7), (48, 20), (20, 48), (1, 9), (64, 64)]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
HEADS = 2


def plain(q, k, v):
    return attend(q, k, v, HEADS)


def identity(q, k, v):
    return q


def shift_of(size, side, seed=0):
    rng = seeded(a_place(size, seed=seed))
    return lambda windows: shifted(windows, min(side) // 8, side, size, rng)


def kinds_of_windows(size, most, seed=0):
    """Every kind of windows that a technique uses, on one map."""
    side = min(most, size[0]), min(most, size[1])
    rng = seeded(a_place(size, seed=seed))
    return {
        "tiles": tiles_with_samples(Tiles.of(size, most, None), 0),
        "shifted tiles": tiles_with_samples(Tiles.of(size, most, rng), 0.5),
        "windows": overlapping_windows(size, side),
        "shifted windows": overlapping_windows(size, side, shift_of(size, side, seed)),
        "neighbourhoods": neighbourhoods(size, side),
        "shifted neighbourhoods": neighbourhoods(size, side, shift_of(size, side, seed)),
        "grids": strided_grids(size, (min(2, size[0]), min(3, size[1]))),
    }


@given(size=SIZES, most=st.integers(2, 40), seed=st.integers(0, 5))
def test_identity_attention_returns_the_map_exactly(size, most, seed):
    x = tokens(size, batch=2, channels=4)
    for kind, windows in kinds_of_windows(size, most, seed).items():
        assert torch.equal(attend_in(windows, x, x, x, identity), x), kind
        inside = (windows.keys >= 0) & (windows.keys < size[0] * size[1])
        assert bool(inside.all()), kind


@given(size=SIZES, most=st.integers(2, 16), seed=st.integers(0, 5))
def test_no_window_asks_a_token_twice_except_for_samples(size, most, seed):
    for kind, windows in kinds_of_windows(size, most, seed).items():
        if kind != "shifted tiles":
            assert all(len(set(row.tolist())) == len(row) for row in windows.keys), kind


@given(size=SIZES, most=st.integers(4, 32), seed=st.integers(0, 3))
def test_every_token_asks_its_own_surroundings(size, most, seed):
    for kind, windows in kinds_of_windows(size, most, seed).items():
        for queries, keys in zip(windows.queries.tolist(), windows.keys.tolist(), strict=True):
            assert set(queries) <= set(keys), kind


@given(size=SIZES, most=st.integers(1, 60))
def test_tiles_are_as_few_as_possible_and_nearly_equal(size, most):
    tiles = Tiles.of(size, most, None)
    for length, side, starts in zip(size, tiles.side, (tiles.rows, tiles.columns), strict=True):
        assert side <= most and len(starts) == -(-length // most)
        assert starts[0] == 0 and starts[-1] + side == length


@pytest.mark.parametrize("size", [(7, 11), (12, 8)])
@pytest.mark.parametrize("kind", list(kinds_of_windows((4, 4), 4)))
def test_windowed_attention_is_brute_force_attention_of_each_window(size, kind):
    windows = kinds_of_windows(size, 5)[kind]
    q, k, v = (tokens(size, seed=seed) for seed in range(3))
    answers = [[] for _ in range(size[0] * size[1])]
    for queries, keys in zip(windows.queries.tolist(), windows.keys.tolist(), strict=True):
        out = numpy_attention(q[0][queries], k[0][keys], v[0][keys], HEADS)
        for token, answer in zip(queries, out, strict=True):
            answers[token].append(answer)
    got = attend_in(windows, q, k, v, plain)[0].numpy()
    for token, known in enumerate(answers):
        if len(windows.answers) > 1 or len(known) == 1:
            want = np.mean(known, axis=0)
        else:  # one window owns the token
            want = min(known, key=lambda answer: abs(answer - got[token]).max())
        assert abs(got[token] - want).max() <= 1e-5


@settings(max_examples=15)
@given(size=SIZES, most=st.integers(4, 16))
def test_memory_bounds_change_nothing(size, most):
    q, k, v = (tokens(size, batch=2, seed=seed) for seed in range(3))
    for windows in kinds_of_windows(size, most).values():
        assert torch.equal(attend_in(windows, q, k, v, identity), attend_in(windows, q, k, v, identity, most=1))


def test_a_bound_is_kept():
    size, seen = (32, 32), []

    def watched(q, k, v):
        seen.append(max(t.numel() for t in (q, k)))
        return q

    x = tokens(size, batch=2)
    attend_in(overlapping_windows(size, (16, 16)), x, x, x, watched, most=3 * 2 * 256 * 8)
    assert len(seen) == 3 and max(seen) == 3 * 2 * 256 * 8


@given(size=SIZES, mode=st.sampled_from(MODES), rate=st.floats(0, 60), blend=st.sampled_from([0.0, 0.3, 1.0]))
def test_reduction_keeps_constants_and_counts_its_tokens(size, mode, rate, blend):
    reduction = Reduction.of(mode, size, rate, rate)
    out = reduction(torch.full((2, size[0] * size[1], 3), 0.75), blend)
    assert out.shape == (2, reduction.count, 3) and reduction.count >= 1
    torch.testing.assert_close(out, torch.full_like(out, 0.75))
    assert rate > 1 or reduction.count == size[0] * size[1]


@given(size=SIZES, rate=st.floats(1, 80))
def test_samples_are_tokens_of_the_map(size, rate):
    samples = samples_of_map(size, rate).tolist()
    assert len(set(samples)) == len(samples) and min(samples) >= 0 and max(samples) < size[0] * size[1]


@given(size=SIZES, taps=st.sampled_from([3, 5, 9]), sigma=st.floats(0.2, 4))
def test_fusing_equal_maps_changes_nothing_and_a_blur_keeps_constants(size, taps, sigma):
    x, weights = tokens(size), gaussian(taps, sigma)
    assert torch.equal(fused(x, x, size, weights, released=False), x)
    constant = torch.full_like(x, 3.0)
    torch.testing.assert_close(blur(constant, size, weights), constant)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_near(dtype):
    size = (13, 18)
    q, k, v = (tokens(size, seed=seed, dtype=dtype) for seed in range(3))
    for windows in kinds_of_windows(size, 8).values():
        half = attend_in(windows, q, k, v, plain)
        full = attend_in(windows, q.float(), k.float(), v.float(), plain)
        assert half.dtype == dtype and half.isfinite().all()
        torch.testing.assert_close(half.float(), full, rtol=2e-2, atol=2e-2)
    large = torch.full((1, 234, 8), 6e4, dtype=dtype)
    for mode in MODES:
        assert Reduction.of(mode, size, 6, 6)(large, 0.5).isfinite().all()
    assert blur(large, size, gaussian(5, 1.0)).isfinite().all()


def test_a_seed_draws_what_it_always_drew():
    """Pictures can be made again."""
    rng = seeded(a_place((65, 97), sigma=5.0, seed=3))
    assert [rng.randint(-9, 9) for _ in range(4)] == [-5, -2, 4, 6]


def test_shifts_are_repeatable_and_differ_by_seed():
    size, side = (65, 97), (32, 32)
    first, again, other = (overlapping_windows(size, side, shift_of(size, side, seed)).queries for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
