"""DeepShrink's mathematics: against recorded results of the reference, the published formula, and properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.noise import NoiseSchedule
from lib_hires.plan import make_plan
from lib_hires.resize import METHODS, resize, scaled_length
from lib_hires.run import FIRST_PASS, HIRES_PASS, IMG2IMG_PASS, Call, ModelFacts, Run
from lib_hires.settings import FIRST, HIRES
from lib_hires.techniques.unet.deep_shrink import (
    DeepShrinkSettings,
    ResolvedStage,
    Stage,
    begin,
    curve,
    parse_stages,
)
from lib_hires.topology import UNetTopology

SD = NoiseSchedule.scaled_linear()
SD15 = UNetTopology(12, 12, (3, 6, 9))
GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "deepshrink.npz")
CASES = json.loads(str(GOLDEN["meta"]))["cases"]


def a_run(latent=(128, 128), unet=SD15, pass_name=FIRST_PASS, sigma_first=SD.sigma_max):
    sigmas = tuple(SD.sigma(SD.timestep(sigma_first) * (1 - i / 20)) for i in range(20))
    return Run("bench", pass_name, ModelFacts("SD 1.x", (64, 64), SD, unet), latent, sigmas)


def cases(kind):
    chosen = [case for case in CASES if case["parameters"]["kind"] == kind and case["agrees_with_spec"] == "yes"]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["name"])


def golden(case, name):
    return GOLDEN[f"case_{case['case']}_{name}"]


@cases("shrink")
def test_shrinking_agrees_with_the_reference(case):
    p, h = case["parameters"], torch.from_numpy(golden(case, "in_h"))
    size = tuple(scaled_length(n, 1 / p["downscale_factor"]) for n in h.shape[-2:])
    assert list(size) == p["out_size_hw"]
    assert_close(resize(h, size, p["method"]), golden(case, "out"), case)


@cases("grow")
def test_growing_agrees_with_the_reference(case):
    p, h = case["parameters"], torch.from_numpy(golden(case, "in_h"))
    assert_close(resize(h, tuple(p["out_size_hw"]), p["upscale_method"]), golden(case, "out"), case)


def assert_close(got, want, case):
    got, want = got.double().numpy(), want.astype(np.float64)
    bound = case["tolerance"]["atol"] + case["tolerance"]["rtol_of_max"] * abs(want).max()
    assert got.shape == want.shape and abs(got - want).max() <= bound


@cases("window")
def test_the_window_agrees_with_the_reference(case):
    p = case["parameters"]
    patch = begin(
        DeepShrinkSettings(block=p["block_number"], start=p["start_percent"], end=p["end_percent"], gradual=0.0),
        a_run(),
    )
    for sigma, row in zip(golden(case, "in_sigmas"), golden(case, "out"), strict=True):
        for block, shrunk in zip(golden(case, "in_blocks"), row, strict=True):
            h = torch.zeros(1, 4, 64, 64)
            out = patch.after_skip(h, int(block), Call(float(sigma), 0))
            assert (out.shape[-1] == 32) == bool(shrunk), (sigma, block)


def published_scale(sigma, f, sigma_start, sigma_end, sigma_gradual):
    """The formula of the published description, case by case."""
    if sigma_start >= sigma >= sigma_end:
        return 1 / f
    if sigma_end > sigma >= sigma_gradual:
        return 1 / f + (1 - 1 / f) * (sigma_end - sigma) / (sigma_end - sigma_gradual)
    return 1.0


@given(f=st.floats(1.05, 9), ends=st.tuples(*[st.floats(0.01, 0.99)] * 3), sigma=st.floats(0.03, 14.6))
def test_the_three_phases_follow_the_published_formula(f, ends, sigma):
    start, end, gradual = sorted(ends)
    if end - start < 1e-3 or gradual - end < 1e-3:
        return
    run = a_run()
    stage = ResolvedStage.of(Stage(3, f, start, end, gradual), run)
    want = published_scale(sigma, f, run.sigma_at(start), run.sigma_at(end), run.sigma_at(gradual))
    assert stage.scale(sigma) == pytest.approx(want, rel=1e-5)


@given(f=st.floats(0.5, 9), end=st.floats(0, 1), gradual=st.floats(0, 1))
def test_the_scale_grows_monotonically_and_ends_at_one(f, end, gradual):
    run = a_run()
    stage = ResolvedStage.of(Stage(3, f, 0.0, end, gradual), run)
    scales = [stage.scale(sigma) for sigma in run.sigmas]
    assert scales == sorted(scales, reverse=f < 1)
    assert all(min(1 / f, 1) - 1e-9 <= scale <= max(1 / f, 1) + 1e-9 for scale in scales)
    assert max(end, gradual) >= 0.999 or stage.scale(0.0) == 1.0


@given(n=st.integers(1, 300), scale=st.floats(0.1, 1.0), halvings=st.integers(0, 3))
def test_a_shrunk_side_keeps_a_cell_at_the_deepest_level_and_never_grows(n, scale, halvings):
    multiple = 2**halvings
    size = scaled_length(n, scale, multiple)
    assert 1 <= size <= n
    if n >= multiple and scale < 1:
        assert size >= multiple or size == n
    if n % multiple == 0:
        assert size % multiple == 0, "a divisible side stays divisible, so deeper levels line up"


@given(
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    method=st.sampled_from(METHODS),
    antialias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_resizing_keeps_constants_dtype_and_batch_independence(h, w, size, method, antialias, dtype):
    constant = torch.full((1, 3, h, w), 0.5, dtype=dtype)
    out = resize(constant, size, method, antialias)
    assert out.shape == (1, 3, *size) and out.dtype == dtype
    assert (out.float() - 0.5).abs().max() < 2e-2
    pair = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(0)).to(dtype)
    alone = resize(pair[1:], size, method, antialias)
    torch.testing.assert_close(resize(pair, size, method, antialias)[1:], alone, rtol=1e-3, atol=1e-3)
    assert alone.isfinite().all()


def test_bislerp_of_zero_and_opposed_vectors_is_finite():
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, :, ::2], x[0, 0, :, 1::2] = 1.0, -1.0
    assert resize(x, (7, 3), "bislerp").isfinite().all()
    assert (resize(torch.zeros(1, 2, 4, 4), (2, 2), "bislerp") == 0).all()


def test_both_sides_are_compared_when_a_map_meets_its_skip():
    patch = begin(DeepShrinkSettings(), a_run())
    call = Call(14.0, 0)
    patch.after_skip(torch.zeros(1, 4, 64, 64), 3, call)
    assert patch.grow(torch.zeros(1, 4, 64, 32), (64, 64), 8, call).shape[-2:] == (64, 64)


def test_a_mismatch_that_it_did_not_make_is_left_to_the_host():
    patch = begin(DeepShrinkSettings(), a_run())
    assert patch.grow(torch.zeros(1, 4, 33, 33), (32, 33), 8, Call(0.1, 19)) is None


def test_several_stages_act_each_at_its_block():
    patch = begin(DeepShrinkSettings(more_stages="6:4:0-0.2"), a_run())
    call = Call(14.0, 0)
    assert patch.after_skip(torch.zeros(1, 4, 64, 64), 3, call).shape[-1] == 32
    assert patch.after_skip(torch.zeros(1, 4, 32, 32), 6, call).shape[-1] == 8
    late = Call(a_run().sigma_at(0.3), 6)
    assert patch.after_skip(torch.zeros(1, 4, 32, 32), 6, late).shape[-1] == 32


@pytest.mark.parametrize(
    "bad", ["3", "3:2", "a:2:0-1", "3:2:0.5-0.2", "40:2:0-1", "3:99:0-1", "3:2:0-2", "3:2:0-1-1-1"]
)
def test_bad_stage_grammar_is_explained(bad):
    with pytest.raises(ValueError, match=r"block:factor|outside|never act"):
        parse_stages(bad)


@pytest.mark.parametrize(
    ("settings", "run", "title", "words"),
    [
        (DeepShrinkSettings(), a_run(unet=None), "refused", "not a UNet"),
        (DeepShrinkSettings(block=12), a_run(), "refused", "set Block number to 1 to 11"),
        (DeepShrinkSettings(start=0.5, end=0.4, gradual=0.2), a_run(), "refused", "raise End"),
        (DeepShrinkSettings(), a_run(latent=(64, 64)), "resting", "not above the native 64x64"),
        (DeepShrinkSettings(factor=1.0), a_run(), "resting", "changes nothing"),
        (DeepShrinkSettings(passes=FIRST), a_run(pass_name=HIRES_PASS), "resting", "first pass only"),
        (DeepShrinkSettings(passes=HIRES), a_run(), "resting", "hires pass only"),
    ],
)
def test_it_does_not_act_and_says_why(settings, run, title, words):
    plan = make_plan({"deep_shrink": settings}, run)
    assert not plan.patches
    assert words in getattr(plan, title)["DeepShrink"]
    assert words in plan.report()


@pytest.mark.parametrize("passes", [FIRST, HIRES])
def test_img2img_has_one_pass_and_the_choice_does_not_matter_there(passes):
    plan = make_plan({"deep_shrink": DeepShrinkSettings(passes=passes)}, a_run(pass_name=IMG2IMG_PASS))
    assert "deep_shrink" in plan.patches


@pytest.mark.parametrize(
    ("latent", "acts"), [((64, 64), False), ((64, 65), True), ((40, 110), True), ((100, 40), False)]
)
def test_the_gate_compares_areas(latent, acts):
    assert bool(make_plan({"deep_shrink": DeepShrinkSettings()}, a_run(latent=latent)).patches) == acts


def test_a_technique_that_fails_to_start_costs_the_technique_and_not_the_picture():
    plan = make_plan({"deep_shrink": object()}, a_run())
    assert "internal error" in plan.refused["DeepShrink"]


def test_the_plot_shows_what_the_patch_does():
    run, settings = a_run(), DeepShrinkSettings()
    drawn = curve(settings, run)
    patch = begin(settings, run)
    for sigma, value in zip(run.sigmas, drawn.values, strict=True):
        out = patch.after_skip(torch.zeros(1, 1, 64, 64), 3, Call(sigma, 0))
        assert out.shape[-1] == scaled_length(64, value, 4)
    assert list(dict.fromkeys(drawn.phases)) == ["full shrink", "growing", "original"]
