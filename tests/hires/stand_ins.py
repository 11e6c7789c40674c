"""Runs with a reference, and the recorded cases, as small as the techniques of the hires pass need them."""

import json
from pathlib import Path

import numpy as np
import torch

from lib_hires.noise import NoiseSchedule
from lib_hires.run import EPS, HIRES_PASS, Call, ModelFacts, Run, Start
from lib_hires.samplers import Sampler
from lib_hires.sites import Predictions

SD = NoiseSchedule.scaled_linear()
FLOW_TABLE = NoiseSchedule(np.arange(1, 1001) / 1000)
EULER, EULER_A = Sampler("sample_euler"), Sampler("sample_euler_ancestral")


def levels(steps=20, denoise=1.0, schedule=SD):
    """Noise levels evenly spaced in training time, without the final 0."""
    first = 999 * denoise
    return tuple(schedule.sigma(first * (1 - step / steps)) for step in range(steps))


def a_start(shape=(1, 4, 16, 24), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Start(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


def a_run(start=None, *, sigmas=None, sampler=EULER, prediction=EPS, schedule=SD, latent=(16, 24), native=(8, 12)):
    facts = ModelFacts("SD 1.x", native, schedule, None, prediction=prediction)
    sigmas = sigmas or levels(schedule=schedule)
    return Run("bench", HIRES_PASS, facts, latent, tuple(sigmas), sampler=sampler, start=start)


def predictions(x0, sigma, x=None):
    return Predictions(x0 if x is None else x, x0, None, 1.0, Call(sigma, 0), None, predict=None)


class Golden:
    """Recorded inputs and results of one reference implementation."""

    def __init__(self, name):
        self._file = np.load(Path(__file__).parent.parent / "golden" / f"{name}.npz")
        self.cases = json.loads(str(self._file["meta"]))["cases"]

    def to_follow(self, kind):
        chosen = [c for c in self.cases if c["agrees_with_spec"] == "yes" and c["parameters"]["kind"] == kind]
        assert chosen
        return chosen

    def array(self, case, name):
        return self._file[f"case_{case['case']}_{name}"]

    def tensor(self, case, name):
        return torch.from_numpy(self.array(case, name)).float()

    def assert_close(self, case, got, name="out"):
        want = self.array(case, name).astype(np.float64)
        tolerance = case["tolerance"]
        bound = tolerance["atol"] + tolerance["rtol_of_max"] * abs(want).max()
        got = np.asarray(got, np.float64)
        assert got.shape == want.shape and abs(got - want).max() <= bound
