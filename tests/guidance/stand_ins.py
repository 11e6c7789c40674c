"""A run, a plan and a host's mix, as small as guidance patches need them."""

import json
from pathlib import Path

import numpy as np
import torch

from lib_hires.guidance import GuidancePipeline
from lib_hires.noise import NoiseSchedule
from lib_hires.run import EPS, FIRST_PASS, Call, ModelFacts, Run
from lib_hires.sites import Predictions
from lib_hires.techniques.guidance import apg, cfg_norm, fresca, mahiro, renorm_cfg, rescale_cfg, tcfg

TECHNIQUES = (tcfg, fresca, apg, rescale_cfg, renorm_cfg, cfg_norm, mahiro)  # in the order in which they act
SD = NoiseSchedule.scaled_linear()
LEVELS = tuple(SD.sigma(999 * (1 - i / 20)) for i in range(20))


def a_run(sigmas=LEVELS, prediction=EPS, latent=(64, 64), native=(64, 64)):
    return Run(
        "bench", FIRST_PASS, ModelFacts("SD 1.x", native, SD, None, prediction=prediction), latent, tuple(sigmas)
    )


class Plan:
    """What GuidancePipeline asks of a plan."""

    def __init__(self, patches):
        self._patches = patches

    def at(self, site):
        return [patch for patch in self._patches if isinstance(patch, site)]


def predictions(x, cond, uncond, scale, sigma, step=0, perturbed=None):
    return Predictions(x, cond, uncond, scale, Call(sigma, step), perturbed, predict=None)


def guide(patches, raw):
    """The denoised result, as a host with the usual mix gets it."""
    mix = lambda cond, uncond: uncond + raw.scale * (cond - uncond)
    mixed = raw.cond if raw.uncond is None else mix(raw.cond, raw.uncond)
    return GuidancePipeline(Plan(patches)).guide(raw, mixed, mix)


class Golden:
    """Recorded inputs and results of one technique's reference."""

    def __init__(self, name):
        self._file = np.load(Path(__file__).parent.parent / "golden" / f"{name}.npz")
        self.cases = json.loads(str(self._file["meta"]))["cases"]

    def array(self, case, name):
        return self._file[f"case_{case['case']}_{name}"]

    def tensor(self, case, name):
        return torch.from_numpy(self.array(case, name)).float()

    def samples(self, case):
        """(sample number, its raw predictions), one by one: recorded batches mix noise levels, a call has one."""
        parameters = case["parameters"]
        x, c, u = (self.tensor(case, f"in_{name}") for name in "xcu")
        for i, sigma in enumerate(self.array(case, "in_sigma")):
            yield i, predictions(x[i : i + 1], c[i : i + 1], u[i : i + 1], parameters["cfg_scale"], float(sigma))

    def assert_close(self, case, got, name="out", sample=None):
        want = self.array(case, name).astype(np.float64)
        tolerance = case["tolerance"]
        bound = tolerance["atol"] + tolerance["rtol_of_max"] * abs(want).max()
        want = want if sample is None else want[sample : sample + 1]
        assert got.shape == want.shape and abs(got.double().numpy() - want).max() <= bound
