"""Against recorded results of the reference implementations."""

import math

import numpy as np
import pytest
import torch

from lib_hires.blending import ADDITION, COSINE, LINEAR, LOGISTIC, NORM_ONLY, SLERP, BlendingSchedule, blended
from lib_hires.detail_map import between
from lib_hires.progress import TIMESTEP, position_in
from lib_hires.unsampler import unsample

from .stand_ins import SD, Golden, a_run

SCHEDULES, FUNCTIONS = Golden("mixing_schedules"), Golden("mixing_functions")
LEVELS, DETAIL = Golden("batch_unsampler"), Golden("detail_level")
KINDS = {"cosine": COSINE, "linear": LINEAR, "logistic": LOGISTIC}
NAMES = {"addition": ADDITION, "slerp": SLERP, "norm_only": NORM_ONLY}


def cases(golden, kind):
    return pytest.mark.parametrize("case", golden.to_follow(kind), ids=lambda case: case["name"])


@cases(SCHEDULES, "schedule")
def test_schedules(case):
    p = case["parameters"]
    is_node = p["convention"].startswith("node")
    # the node counts logistic in u = i / (n - 1) and the others in i / S; in one unit both are the same curve
    unit = p["steps"] - 1
    schedule = BlendingSchedule(
        KINDS[p["schedule"]],
        start=p.get("start_step", 0) / unit,
        stop=p.get("stop_step", p["steps"]) / unit,
        clamp=int(p.get("clamp_pct", 1.0) * p["steps"]) / unit,
        minimum=1 - p.get("blend_max", 1),
        maximum=1 - p.get("blend_min", 0),
        node_weights=is_node,
    )
    shares = np.array([schedule.share(i / unit, p["alpha"]) for i in SCHEDULES.array(case, "in_step")])
    SCHEDULES.assert_close(case, 1 - shares if is_node else shares)


@cases(FUNCTIONS, "blend")
def test_blending_functions(case):
    reference, sample = FUNCTIONS.tensor(case, "in_z_prime"), FUNCTIONS.tensor(case, "in_denoised")
    function = NAMES[case["parameters"]["function"]]
    weights = [float(w) for w in FUNCTIONS.array(case, "in_weight")]  # of the sample
    within = [j for j, weight in enumerate(weights) if weight < 1]
    got = [blended(reference, sample, 1 - weights[j], function) for j in within]
    want = FUNCTIONS.tensor(case, "out")
    torch.testing.assert_close(torch.stack(got), want[within], rtol=1e-5, atol=1e-5)


@cases(LEVELS, "levels")
def test_noised_levels(case):
    z, noise = LEVELS.tensor(case, "in_z"), LEVELS.tensor(case, "in_noise")
    sigmas = [float(sigma) for sigma in LEVELS.array(case, "in_sigmas_descending")]
    # the recording has a noise of its own for every level
    got = [unsample(z, noise[i : i + 1], sigmas)[i] for i in range(len(sigmas))]
    LEVELS.assert_close(case, torch.cat(got))


@cases(DETAIL, "factor")
def test_the_share_at_a_training_timestep(case):
    position = position_in(a_run(), TIMESTEP)
    got = [BlendingSchedule().share(position(SD.sigma(t)), case["parameters"]["alpha"]) for t in timesteps(case)]
    DETAIL.assert_close(case, got)


@cases(DETAIL, "blend")
def test_the_detail_level(case):
    p = case["parameters"]
    alpha = p["alpha"]
    if p["alpha_bg"] is not None:
        alpha = between(p["alpha_bg"], p["alpha"], DETAIL.tensor(case, "in_mask"))
    z, noise = DETAIL.tensor(case, "in_z"), DETAIL.tensor(case, "in_noise")
    got = []
    for j, t in enumerate(timesteps(case)):
        root = math.sqrt(DETAIL.array(case, "in_alphas_cumprod")[j])  # the recording is VP, ours VE
        sigma = math.sqrt(1 - root**2) / root
        share = BlendingSchedule().share(1 - t / p["train_timesteps"], alpha)
        sample = DETAIL.tensor(case, "in_latents")[j] / root
        got.append(blended(unsample(z, noise, [sigma])[0], sample, share) * root)
    DETAIL.assert_close(case, torch.stack(got))


def timesteps(case):
    return [float(t) for t in DETAIL.array(case, "in_timesteps")]
