"""The part of a run in which a technique is active. One class, used by all."""

from __future__ import annotations

from dataclasses import dataclass

from lib_hires.run import Run

# Hosts hand sigmas over in float32: a call that sits exactly on a bound must not fall out by rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class SigmaRange:
    """Noise levels from `upper` down to `lower`, both included. Empty where upper < lower."""

    upper: float
    lower: float

    def __contains__(self, sigma: float) -> bool:
        return self.lower * (1 - _ROUNDING) <= sigma <= self.upper * (1 + _ROUNDING)


@dataclass(frozen=True)
class Window:
    """Start and end as elapsed fractions of the pass, 0 to 1."""

    start: float
    end: float

    @property
    def is_empty(self) -> bool:
        return self.start >= self.end

    def resolve(self, run: Run) -> SigmaRange:
        """The window in the run's own noise levels. An empty window resolves to a range that contains nothing."""
        if self.is_empty:
            return SigmaRange(0.0, float("inf"))
        return SigmaRange(run.sigma_at(self.start), run.sigma_at(self.end))


class Windowed:
    """For settings with the fields `start` and `end` (see settings.window_start and window_end)."""

    start: float
    end: float

    def window(self, run: Run) -> SigmaRange:
        return Window(self.start, self.end).resolve(run)

    def problem(self) -> str | None:
        if not Window(self.start, self.end).is_empty:
            return None
        return f"start {self.start:g} is not before end {self.end:g}, so it would never act: lower Start, or raise End"
