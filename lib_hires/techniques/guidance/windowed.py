"""What all guidance techniques with a window share."""

from __future__ import annotations

from lib_hires.run import Call, Run
from lib_hires.sites import Guidance
from lib_hires.technique import Patch
from lib_hires.window import Windowed


class WindowedGuidance(Patch, Guidance):
    """A guidance patch that acts in the window of its settings."""

    def __init__(self, settings: Windowed, run: Run) -> None:
        super().__init__()
        self._window = settings.window(run)
        self._sigma_first = run.sigma_first

    def acts_in(self, call: Call) -> bool:
        return call.sigma in self._window

    def describe(self) -> str:
        return f"sigma {min(self._window.upper, self._sigma_first):.4g} to {self._window.lower:.4g}"
