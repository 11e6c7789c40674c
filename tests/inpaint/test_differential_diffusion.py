"""The masks in force: against recorded results of the reference, and against a loop over cells written here."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.noise import NoiseSchedule
from lib_hires.plan import make_plan
from lib_hires.run import EPS, FLOW, IMG2IMG_PASS, Call, ModelFacts, Run
from lib_hires.technique import Refusal, Rest
from lib_hires.techniques.inpaint import differential_diffusion as dd
from lib_hires.techniques.inpaint.differential_diffusion import (
    SIGMA,
    STEP,
    TIMESTEP,
    DifferentialDiffusionSettings,
    begin,
    mask_in_force,
    remaining_fraction,
)
from lib_hires.webui.plot import synthetic_run
from tests.guidance.stand_ins import LEVELS, Golden

SD = NoiseSchedule.scaled_linear()
GOLDEN = Golden("differential_diffusion")


def a_run(sigmas=(*LEVELS, 0.0), mask=None, schedule=SD, prediction=EPS, others=()):
    facts = ModelFacts("SD 1.x", (64, 64), schedule, None, prediction=prediction)
    mask = torch.rand(1, 4, 9, 13) if mask is None else mask
    return Run("test", IMG2IMG_PASS, facts, (9, 13), tuple(map(float, sigmas)), mask=mask, other_scripts=others)


def flow_schedule(shift):
    t = np.arange(1, 1001) / 1000
    return NoiseSchedule(shift * t / (1 + (shift - 1) * t))


def case_run(case):
    p, mask = case["parameters"], GOLDEN.tensor(case, "in_mask")
    sigmas = GOLDEN.array(case, "in_sigmas")
    if p.get("model") == "flow":
        return a_run(sigmas, mask, flow_schedule(p["shift"]), FLOW)
    return a_run(sigmas, mask)


def masks_of(case, agrees):
    chosen = [c for c in GOLDEN.cases if c["parameters"]["kind"] == "masks" and c["agrees_with_spec"] == agrees]
    assert chosen
    return chosen


@pytest.mark.parametrize("case", masks_of(GOLDEN, "yes"), ids=lambda case: case["name"])
def test_masks_of_a_run_are_those_of_the_reference(case):
    run = case_run(case)
    patch = begin(DifferentialDiffusionSettings(strength=case["parameters"]["strength"]), run)
    want = GOLDEN.array(case, "out")
    for i, sigma in enumerate(run.sigmas[:-1]):
        got = patch.in_force(run.mask, Call(sigma, i)).numpy()
        np.testing.assert_allclose(got, want[i], atol=1e-6)
    assert patch.fired == len(want)


def test_black_cells_stay_where_the_reference_wakes_them():
    (case,) = [c for c in masks_of(GOLDEN, "no") if c["parameters"]["strength"] == 1]
    run, want = case_run(case), GOLDEN.array(case, "out")
    patch = begin(DifferentialDiffusionSettings(), run)
    black = run.mask.numpy() == 0
    assert black.any() and want[-1][black].all()
    got = np.stack([patch.in_force(run.mask, Call(sigma, 0)).numpy() for sigma in run.sigmas[:-1]])
    assert not got[:, black].any()
    assert np.array_equal(got[:, ~black], want[:, ~black])


def test_a_whole_euler_run():
    """x0 blended by the mask in force is enough: the sampler's own latent keeps the picture at the level's noise."""
    (case,) = [c for c in GOLDEN.cases if c["parameters"]["kind"] == "run"]
    latent, noise, run = GOLDEN.tensor(case, "in_latent"), GOLDEN.tensor(case, "in_noise"), case_run(case)
    patch = begin(DifferentialDiffusionSettings(), run)
    x = latent + run.sigmas[0] * noise
    for i, (sigma, following) in enumerate(zip(run.sigmas, run.sigmas[1:], strict=False)):
        mask = patch.in_force(run.mask, Call(sigma, i))
        denoised = x / (1 + sigma**2) * mask + latent * (1 - mask)
        x = x + (x - denoised) / sigma * (following - sigma)
    GOLDEN.assert_close(case, x)


def by_hand(mask, remaining, strength):
    out = np.empty_like(mask)
    for place, value in np.ndenumerate(mask):
        active = 1.0 if value >= remaining and value > 0 else 0.0
        out[place] = strength * active + (1 - strength) * value
    return out


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 17), st.integers(1, 17)),
    remaining=st.integers(0, 16),
    strength=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_cell_of_any_size(shape, remaining, strength, seed):
    mask = (torch.randint(0, 17, shape, generator=torch.Generator().manual_seed(seed)) / 16).numpy()
    got = mask_in_force(torch.from_numpy(mask), remaining / 16, strength)
    np.testing.assert_allclose(got.numpy(), by_hand(mask, remaining / 16, strength), atol=1e-6)
    assert not got.numpy()[mask == 0].any()


@given(dtype=st.sampled_from([torch.float16, torch.bfloat16]), remaining=st.integers(0, 8))
def test_half_precision_wakes_the_same_cells(dtype, remaining):
    mask = torch.linspace(0, 1, 9).reshape(1, 1, 3, 3)
    got = mask_in_force(mask.to(dtype), remaining / 8)
    assert got.dtype == dtype
    assert torch.equal(got.float(), mask_in_force(mask, remaining / 8))


def test_pictures_do_not_see_each_others_masks():
    masks = torch.rand(3, 1, 7, 5, generator=torch.Generator().manual_seed(1))
    together = mask_in_force(masks, 0.4, 0.7)
    for i in range(3):
        assert torch.equal(together[i : i + 1], mask_in_force(masks[i : i + 1], 0.4, 0.7))


def test_strength_0_is_the_hosts_own_mask():
    patch = begin(DifferentialDiffusionSettings(strength=0), a_run())
    mask, usual = torch.rand(1, 4, 9, 13), torch.rand(72, 104)
    assert patch.in_force(mask, Call(1.0, 0)) is mask and patch.at_end(mask) is mask
    assert patch.shown(mask[0, 0], usual) is usual
    assert patch.fired


@given(
    axis=st.sampled_from([TIMESTEP, SIGMA, STEP]),
    steps=st.integers(1, 30),
    first=st.integers(0, 29),
    ends_at_zero=st.booleans(),
)
def test_the_threshold_falls_from_1_to_0(axis, steps, first, ends_at_zero):
    levels = [SD.sigma(999 * (1 - i / 30)) for i in range(first, min(first + steps, 30))]
    run = a_run((*levels, 0.0) if ends_at_zero else levels)
    remaining = remaining_fraction(run, axis)
    values = [remaining(sigma) for sigma in run.sigmas]
    assert values[0] == 1.0 and remaining(levels[0] * 1.5) == 1.0
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0.0 or len(values) == 1
    assert remaining(0.0) == 0.0 or len(values) == 1


def test_each_axis_measures_its_own():
    run = a_run()
    timestep, sigma, step = (remaining_fraction(run, axis)(LEVELS[5]) for axis in (TIMESTEP, SIGMA, STEP))
    assert timestep == pytest.approx(0.75)
    assert sigma == pytest.approx(LEVELS[5] / LEVELS[0], abs=0.002)
    assert step == pytest.approx(15 / 20)
    between = remaining_fraction(run, STEP)((LEVELS[5] + LEVELS[6]) / 2)
    assert between == pytest.approx(14.5 / 20)


def test_one_evaluation_at_the_lowest_level_paints_white():
    lowest = float(SD.sigmas[0])
    run = a_run((lowest, 0.0))
    patch = begin(DifferentialDiffusionSettings(), run)
    got = patch.in_force(torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3), Call(lowest, 0))
    assert got.flatten().tolist() == [0, 0, 1]


def test_the_last_blend_keeps_black_and_takes_the_rest():
    patch = begin(DifferentialDiffusionSettings(strength=0.5), a_run())
    got = patch.at_end(torch.tensor([0.0, 0.2, 1.0])).tolist()
    assert got == pytest.approx([0, 0.6, 1])


@given(strength=st.sampled_from([0.25, 1.0]), least=st.sampled_from([0, 5, 19]))
def test_the_result_shows_what_was_painted(strength, least):
    patch = begin(DifferentialDiffusionSettings(strength=strength), a_run())
    for i, sigma in enumerate(LEVELS[: least + 1]):
        patch.in_force(torch.ones(1, 1, 1, 1), Call(sigma, i))
    mask = torch.linspace(0, 1, 101)
    usual = (2 * mask).clamp(max=1)
    got = patch.shown(mask, usual)
    assert got[0] == 0 and (got >= usual - 1e-6).all() and (got.diff() >= -1e-6).all()
    assert (got[mask >= 0.5] == 1).all()
    if least == 19:
        assert (got[mask >= 0.051] >= strength).all()


def test_without_a_mask_it_rests_with_a_reason():
    with pytest.raises(Rest, match="no mask"):
        begin(DifferentialDiffusionSettings(), replace(a_run(), mask=None))


def test_beside_soft_inpainting_it_refuses():
    with pytest.raises(Refusal, match=r"Soft Inpainting is on.*switch one"):
        begin(DifferentialDiffusionSettings(), a_run(others=("Refiner", "Soft Inpainting")))


def test_the_plan_says_so():
    plan = make_plan({"differential_diffusion": DifferentialDiffusionSettings()}, replace(a_run(), mask=None))
    assert "rests: there is no mask" in plan.report() and not plan.refused


@given(steps=st.integers(1, 40), axis=st.sampled_from([TIMESTEP, SIGMA, STEP]), strength=st.sampled_from([0, 0.5, 1]))
def test_the_preview_shows_the_masks_that_will_be_in_force(steps, axis, strength):
    settings = DifferentialDiffusionSettings(strength=strength, axis=axis)
    sample, *shown = dd.preview(settings, synthetic_run(steps))
    assert len(shown) == min(steps, 5) and shown[-1].caption == f"step {steps}"
    assert sample.grey.min() == 0 and sample.grey.max() == 1
    painted = [picture.grey.mean() for picture in shown]
    assert painted == sorted(painted)
    assert np.allclose(shown[0].grey, by_hand(sample.grey, 1.0, strength), atol=1e-6)


def test_the_curve_is_the_threshold_of_each_step():
    curve = dd.curve(DifferentialDiffusionSettings(), synthetic_run(20))
    assert curve.values == pytest.approx([1 - i / 20 for i in range(20)], abs=1e-3)
