"""Noise levels, elapsed fractions and windows, against k-diffusion and ComfyUI's published table."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.hosts.bench.samplers import import_k_diffusion
from lib_hires.noise import NoiseSchedule
from lib_hires.run import FIRST_PASS, ModelFacts, Run
from lib_hires.window import Window

SD = NoiseSchedule.scaled_linear()


def run_from(sigma_first: float) -> Run:
    facts = ModelFacts("SD 1.x", (64, 64), SD, None)
    return Run("bench", FIRST_PASS, facts, (128, 128), (sigma_first, sigma_first / 2, 0.0))


def k_diffusion_schedule():
    abar = torch.tensor((1 / (SD.sigmas**2 + 1)).copy(), dtype=torch.float64)
    return import_k_diffusion().external.DiscreteSchedule(((1 - abar) / abar) ** 0.5, quantize=False)


@given(t=st.floats(0, 999))
def test_sigma_of_a_timestep_is_k_diffusions(t):
    assert math.isclose(
        SD.sigma(t), float(k_diffusion_schedule().t_to_sigma(torch.tensor(t, dtype=torch.float64))), rel_tol=1e-6
    )


@given(t=st.floats(0, 999))
def test_timestep_inverts_sigma(t):
    assert math.isclose(SD.timestep(SD.sigma(t)), t, abs_tol=1e-6)


def test_ends_of_the_table_and_beyond():
    assert math.isclose(SD.sigma_max, 14.6146, rel_tol=1e-5)
    assert SD.timestep(0.0) == 0 and SD.timestep(1e9) == 999
    with pytest.raises(ValueError, match="rising"):
        NoiseSchedule([1.0, 0.5])


@pytest.mark.parametrize(("percent", "sigma"), [(0.35, 2.7391), (0.5, 1.6156), (0.6, 1.1629), (0.9, 0.3437)])
def test_a_full_run_counts_like_comfyuis_percent(percent, sigma):
    assert math.isclose(run_from(SD.sigma_max).sigma_at(percent), sigma, rel_tol=5e-5)


@given(first=st.floats(0.05, 14.6), fraction=st.floats(0.001, 0.999))
def test_elapsed_inverts_sigma_at_in_any_pass(first, fraction):
    run = run_from(first)
    sigma = run.sigma_at(fraction)
    assert sigma <= first * (1 + 1e-9)
    assert run.elapsed(sigma) == pytest.approx(fraction, abs=1e-6)
    assert run.elapsed(first) == 0 and run.elapsed(0.0) == 1


@given(first=st.floats(0.05, 14.6), start=st.floats(0, 1), end=st.floats(0, 1))
def test_a_window_holds_exactly_the_levels_between_its_fractions(first, start, end):
    run = run_from(first)
    levels = Window(start, end).resolve(run)
    for sigma in np.geomspace(0.03, first, 20):
        elapsed = run.elapsed(float(sigma))
        if start >= end:
            assert sigma not in levels
        elif start + 1e-6 < elapsed < end - 1e-6:
            assert sigma in levels
        elif elapsed < start - 1e-6 or elapsed > end + 1e-6:
            assert sigma not in levels


def test_a_window_over_everything_contains_both_ends():
    levels = Window(0.0, 1.0).resolve(run_from(14.6))
    assert 1e9 in levels and 0.0 in levels


def test_a_bound_survives_the_hosts_rounding_to_float32():
    run = run_from(SD.sigma_max)
    levels = Window(0.2, 0.5).resolve(run)
    assert float(np.float32(run.sigma_at(0.5))) in levels and float(np.float32(run.sigma_at(0.2))) in levels
