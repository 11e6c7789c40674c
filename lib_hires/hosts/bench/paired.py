"""Two rows of the bench, picture by picture: is one better than the other, or is it chance?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

_RESAMPLES = 10_000
_SEED = 0

Interval = tuple[float, float, float]  # difference, and the ends of its 95 % interval


@dataclass(frozen=True)
class Discordance:
    """Pictures that only one of two rows got wrong, and McNemar's exact p of a difference as large by chance."""

    only_here: int
    only_there: int

    @property
    def p(self) -> float:
        changed = self.only_here + self.only_there
        return float(stats.binomtest(self.only_here, changed).pvalue) if changed else 1.0


def discordance(here: np.ndarray, there: np.ndarray) -> Discordance:
    """`here` and `there`: [n] bool, wrong or not, of the same prompts and seeds."""
    return Discordance(int((here & ~there).sum()), int((~here & there).sum()))


def mean_difference(here: np.ndarray, there: np.ndarray) -> Interval:
    """Mean of here - there over pictures [n], with a paired bootstrap interval."""
    difference = here - there
    return _interval(len(difference), float(difference.mean()), lambda sample: float(difference[sample].mean()))


def statistic_difference(
    n: int, here: Callable[[np.ndarray], float], there: Callable[[np.ndarray], float]
) -> Interval:
    """here(sample) - there(sample) of a statistic over n pictures, with a paired bootstrap interval."""
    every = np.arange(n)
    return _interval(n, here(every) - there(every), lambda sample: here(sample) - there(sample))


def _interval(n: int, value: float, of: Callable[[np.ndarray], float]) -> Interval:
    random = np.random.default_rng(_SEED)
    drawn = [of(random.integers(0, n, n)) for _ in range(_RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return value, float(low), float(high)
