"""APG: adaptive projected guidance.

The guidance difference g = cond - uncond (x0) is changed in three steps, in this order:

    momentum     G = g + momentum G_before                    (negative: less of what earlier steps already did)
    threshold    G* = min(1, threshold / |G|) G               (|.| over channels and cells; 0 switches it off)
    projection   g' = G* - (1 - eta) (<G*, cond> / <cond, cond>) cond    (the part along cond saturates colours)

and the result is cond + (w - 1) g', which is plain CFG at eta 1, threshold 0, momentum 0. ComfyUI's node gives
cond + w g', which at these values is CFG at w + 1.

Momentum belongs to steps, not to evaluations: samplers with two evaluations a step would apply it twice. A step begins
at a planned noise level below the one before.

Reference: Sadat et al., "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models" (2024),
Algorithm 1; ComfyUI's APG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lib_hires.run import Run
from lib_hires.settings import Settings, number, passes_choice, toggle, window_end, window_start
from lib_hires.sites import Predictions
from lib_hires.technique import Rest, Technique
from lib_hires.techniques.guidance.reductions import inner, norm, times
from lib_hires.techniques.guidance.windowed import WindowedGuidance
from lib_hires.window import Windowed

_SAME_LEVEL = 1e-4  # relative; hosts hand sigmas over rounded, and steps are further apart than that
_FEWEST_STEPS = 3  # a run with fewer planned levels gives only its range: an adaptive sampler


@dataclass(frozen=True)
class APGSettings(Windowed, Settings):
    eta: float = number(
        0.0, -10.0, 10.0, 0.01,
        label="Eta",
        help="How much is kept of the part of guidance that saturates colours. 0, the paper's choice, removes it; "
        "1 keeps it as plain CFG does; above 1 saturates more. Below 0 makes little sense.",
    )  # fmt: skip
    norm_threshold: float = number(
        15.0, 0.0, 50.0, 0.1,
        label="Norm threshold",
        help="The longest that guidance may be in one step. Lower tames a high CFG scale more. The paper uses 15 for "
        "SDXL; 7.5 is the same for SD 1.x and 2.x, whose pictures have a quarter of the pixels. 0 switches it off.",
    )  # fmt: skip
    momentum: float = number(
        -0.5, -5.0, 1.0, 0.01,
        label="Momentum",
        help="How much of the earlier steps' guidance is added. Negative, as meant, takes away what was already done, "
        "so that each step adds something new; -0.5 is the paper's for SDXL. 0 switches it off.",
    )  # fmt: skip
    scale_threshold: bool = toggle(
        True,
        label="Scale threshold with size",
        help="On: the threshold counts at the model's native size and grows with the picture, so that it means the "
        "same at every size. Off: the number as it is, as in ComfyUI.",
    )
    comfy_strength: bool = toggle(
        False,
        label="ComfyUI strength",
        help="Off: CFG scale means what it means without APG. On: as in ComfyUI's node, which guides as strongly as a "
        "CFG scale one higher.",
    )
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()

    @property
    def is_neutral(self) -> bool:
        return self.eta == 1 and self.norm_threshold == 0 and self.momentum == 0 and not self.comfy_strength

    def threshold(self, run: Run) -> float:
        """The norm threshold for the latent of a run. Lengths grow with the root of the number of cells."""
        if not self.scale_threshold:
            return self.norm_threshold
        return self.norm_threshold * math.sqrt(math.prod(run.latent) / math.prod(run.model.native))


class Steps:
    """Tells which evaluations of a run begin a new step, from their noise levels alone.

    Second evaluations of a step come at the next planned level (Heun), which then begins the next step again, or at a
    level in between (DPM2, SDE).
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        levels = {sigma for sigma in sigmas if sigma > 0}
        self._planned = levels if len(levels) >= _FEWEST_STEPS else set()

    def is_level(self, sigma: float) -> bool:
        return not self._planned or any(abs(sigma - level) <= _SAME_LEVEL * level for level in self._planned)


def _is_lower(sigma: float, than: float) -> bool:
    return sigma < than * (1 - _SAME_LEVEL)


class Momentum:
    """The running difference G of one run: reset where noise rises (a restart) or the latent changes its shape."""

    def __init__(self, momentum: float, steps: Steps) -> None:
        self._momentum = momentum
        self._steps = steps
        self._forget()

    def _forget(self) -> None:
        self._before: Tensor | None = None  # G before the step in progress
        self._current: Tensor | None = None  # G of the step in progress
        self._level = self._last = math.inf

    def __call__(self, g: Tensor, sigma: float) -> Tensor:
        """G for a difference g [B, ...] at a noise level."""
        changed_shape = self._current is not None and self._current.shape != g.shape
        if changed_shape or _is_lower(self._last, than=sigma):
            self._forget()
        self._last = sigma
        is_level = self._steps.is_level(sigma)
        if is_level and _is_lower(sigma, than=self._level):
            self._before, self._level = self._current, sigma
        used = g if self._before is None else g + self._momentum * self._before
        if is_level:
            self._current = used
        return used


def clipped(g: Tensor, threshold: float) -> Tensor:
    """`g` [B, ...], no longer than the threshold, per picture. 0: as it is."""
    if threshold == 0:
        return g
    return times(g, (threshold / norm(g).clamp(min=1e-30)).clamp(max=1.0))


def projected(g: Tensor, cond: Tensor, eta: float) -> Tensor:
    """`g` with eta of its part along `cond`; both [B, ...] in x0. A cond of zeros has no direction."""
    length = inner(cond, cond)
    along = inner(g, cond) / length.masked_fill(length == 0, 1.0)
    return g + times(cond, (eta - 1) * along)


class APGPatch(WindowedGuidance):
    def __init__(self, settings: APGSettings, run: Run) -> None:
        super().__init__(settings, run)
        self._settings = settings
        self._threshold = settings.threshold(run)
        self._momentum = Momentum(settings.momentum, Steps(run.sigmas)) if settings.momentum else None

    def before_mix(self, cond: Tensor, uncond: Tensor, raw: Predictions) -> tuple[Tensor, Tensor]:
        if not self.acts_in(raw.call):
            return cond, uncond
        self.fired += 1
        g = self._update(cond, uncond, raw.call.sigma)
        # the host mixes uncond + w (cond - uncond)
        return (cond + g, cond) if self._settings.comfy_strength else (cond, cond - g)

    def _update(self, cond: Tensor, uncond: Tensor, sigma: float) -> Tensor:
        g = cond - uncond
        if self._momentum is not None:
            g = self._momentum(g, sigma)
        return projected(clipped(g, self._threshold), cond, self._settings.eta)

    def describe(self) -> str:
        s = self._settings
        return f"eta {s.eta:g}, threshold {self._threshold:.4g}, momentum {s.momentum:g}, {super().describe()}"


def begin(settings: APGSettings, run: Run) -> APGPatch:
    """The patch for one run. Raises `Rest` where the settings amount to plain CFG."""
    if settings.is_neutral:
        raise Rest("eta 1, norm threshold 0 and momentum 0 change nothing")
    return APGPatch(settings, run)


TECHNIQUE = Technique(
    name="apg",
    title="APG",
    family="Guidance",
    summary="Adaptive projected guidance: high CFG scales without oversaturated colours and burnt contrast.",
    source="Eliminating Oversaturation and Artifacts of High Guidance Scales (Sadat et al. 2024)",
    twins=('"APG',),
    settings=APGSettings,
    begin=begin,
    presets={
        "SDXL": APGSettings(),
        "SD 1.x and 2.x": APGSettings(norm_threshold=7.5),
        "Less saturation only": APGSettings(norm_threshold=0.0, momentum=0.0),
        "v-prediction, instead of RescaleCFG": APGSettings(eta=1.0, norm_threshold=20.0, momentum=0.0),
        "As ComfyUI": APGSettings(
            eta=1.0, norm_threshold=5.0, momentum=0.0, scale_threshold=False, comfy_strength=True
        ),
        "Neutral": APGSettings(eta=1.0, norm_threshold=0.0, momentum=0.0),
    },
)
