"""Where in a run a noise level lies, 0 to 1, counted in one of three ways. Functions of sigma alone, so that they mean
the same for samplers with several evaluations a step, and for those that choose their own steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lib_hires.run import Run

TIMESTEP, STEP, LOG_SIGMA = "Training timestep", "Step", "Log sigma"
AXES = (TIMESTEP, STEP, LOG_SIGMA)

Position = Callable[[float], float]


def position_in(run: Run, axis: str) -> Position:
    """Noise level to position.

    Training timestep: (T - t) / T of all T training steps, as in the papers; a pass with denoise below 1 begins part
    way. Step: i / n at the run's own n levels, in between by log sigma; as Log sigma where the sampler chooses its own
    steps. Log sigma: from the run's first level to the smallest that the model was trained for.
    """
    return {TIMESTEP: _by_timestep, STEP: _by_step, LOG_SIGMA: _by_log_sigma}[axis](run)


def _by_timestep(run: Run) -> Position:
    schedule = run.model.schedule
    count = len(schedule.sigmas)
    return lambda sigma: min(max(1 - schedule.timestep(sigma) / count, 0.0), 1.0)


def _by_step(run: Run) -> Position:
    if not run.lists_steps:
        return _by_log_sigma(run)
    levels = sorted({sigma for sigma in run.sigmas if sigma > 0})
    return _along(levels, [step / len(levels) for step in reversed(range(len(levels)))])


def _by_log_sigma(run: Run) -> Position:
    smallest = float(run.model.schedule.sigmas[0])
    if run.sigma_first <= smallest:
        return lambda sigma: 0.0
    return _along([smallest, run.sigma_first], [1.0, 0.0])


def _along(levels: Sequence[float], positions: Sequence[float]) -> Position:
    logs = np.log(np.asarray(levels))
    return lambda sigma: 1.0 if sigma <= 0 else float(np.interp(math.log(sigma), logs, positions))
