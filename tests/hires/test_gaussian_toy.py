"""Iterative mixing in every sampler, on a prior whose perfect denoiser is known: N(mu, s^2), independent per cell."""

from itertools import pairwise

import pytest
import torch

from lib_hires.guidance import GuidancePipeline
from lib_hires.hosts.bench import samplers
from lib_hires.plan import make_plan
from lib_hires.run import Call
from lib_hires.samplers import Sampler
from lib_hires.sites import NoisyLatent
from lib_hires.techniques.hires.iterative_mixing import DENOISED, LATENT, SPACES, IterativeMixingSettings

from .stand_ins import a_run, a_start, levels, predictions

MU, S = 2.0, 0.5
SIGMAS = torch.tensor([*levels(12, denoise=0.8), 0.17, 0.08, 0.03, 0.0])
# the reference is a draw of another prior, so that it and the model disagree
START = a_start((2, 4, 6, 7))


def x0_of(x, sigma):
    """E[x0 | x] for the prior N(MU, S^2) and x = x0 + sigma noise."""
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


class Host:
    """Calls a plan's sites as a host does: latent in place, then the model, then guidance."""

    def __init__(self, plan):
        self._latent_patches = plan.at(NoisyLatent)
        self._pipeline = GuidancePipeline(plan)

    def __call__(self, x, sigma, **_):
        call = Call(float(sigma[0]), 0)
        changed = x
        for patch in self._latent_patches:
            changed = patch.before_call(changed, call)
        if changed is not x:
            x.copy_(changed)
        raw = predictions(x0_of(x, call.sigma), call.sigma, x)
        return self._pipeline.guide(raw, raw.cond, mix=None)


def sample(name, settings=None):
    sampler = Sampler(samplers.SAMPLERS[name])
    run = a_run(START, sigmas=samplers.planned_levels(name, SIGMAS), sampler=sampler, latent=(6, 7), native=(6, 7))
    plan = make_plan({"iterative_mixing": settings} if settings else {}, run)
    assert not plan.refused
    x = START.latent + START.noise * SIGMAS[0]
    return samplers.run_sampler(name, Host(plan), x, SIGMAS, (3, 4), lambda state: None)


def distance(x):
    return float((x - START.latent).square().mean().sqrt())


every_sampler = pytest.mark.parametrize("name", samplers.SAMPLERS)
every_space = pytest.mark.parametrize("space", SPACES)
constant = lambda share, space: IterativeMixingSettings(minimum=share, maximum=share, space=space)


@every_sampler
@every_space
def test_no_share_is_no_mixing_bit_for_bit(name, space):
    assert torch.equal(sample(name, constant(0.0, space)), sample(name))


@every_sampler
def test_a_whole_share_in_denoised_space_returns_the_reference(name):
    got = sample(name, constant(1.0, DENOISED))
    if name == "DPM adaptive":  # it ends at its smallest level, not at 0
        got = got - float(SIGMAS[-2]) * START.noise
    torch.testing.assert_close(got, START.latent, rtol=0, atol=1e-3 if name == "DPM adaptive" else 2e-5)


@every_sampler
def test_a_whole_share_in_latent_space_returns_the_reference_within_the_last_level(name):
    noise = START.noise * SIGMAS[-2]  # all that is left to the model
    assert distance(sample(name, constant(1.0, LATENT))) < 1.25 * distance(START.latent + noise)


@every_sampler
@every_space
def test_more_share_is_nearer_to_the_reference(name, space):
    distances = [distance(sample(name, constant(share, space))) for share in (0.0, 0.1, 0.3, 0.6, 0.9, 1.0)]
    slack = 0.1 * float(SIGMAS[-2])  # near the reference the last level's noise decides
    assert all(far > near - slack for far, near in pairwise(distances))
    assert distances[0] > 1.0 > 0.05 > distances[-1]


@every_sampler
def test_a_higher_alpha_is_nearer_to_the_model(name):
    distances = [distance(sample(name, IterativeMixingSettings(alpha=alpha))) for alpha in (0.2, 1.0, 3.0)]
    assert distances == sorted(distances) and distances[-1] < distance(sample(name))


@pytest.mark.parametrize("name", ["Euler", "DPM++ 2M", "LMS"])
def test_samplers_that_keep_the_latent_go_on_from_the_mixed_one(name):
    assert not torch.equal(sample(name, IterativeMixingSettings(space=LATENT)), sample(name))
    assert torch.equal(sample(name, IterativeMixingSettings()), sample(name, IterativeMixingSettings(space=LATENT)))


def test_euler_with_mixing_by_hand():
    """x <- w (z + sigma n) + (1 - w) x before every step, and plain Euler."""
    settings = IterativeMixingSettings(alpha=1.0)
    share = lambda sigma: float(torch.cos(torch.tensor(torch.pi / 2 * (1 - t_of(sigma) / 1000))) ** 2)
    t_of = a_run(START).model.schedule.timestep
    x = START.latent + START.noise * SIGMAS[0]
    for sigma, after in zip(SIGMAS.tolist()[:-1], SIGMAS.tolist()[1:], strict=True):
        x = share(sigma) * (START.latent + sigma * START.noise) + (1 - share(sigma)) * x
        x = x + (x - x0_of(x, sigma)) / sigma * (after - sigma)
    torch.testing.assert_close(sample("Euler", settings), x, rtol=1e-4, atol=1e-4)
