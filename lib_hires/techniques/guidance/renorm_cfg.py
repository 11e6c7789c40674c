"""RenormCFG: bound the length of the guided prediction, and switch guidance off in a part of the pass.

Renormalisation is a one-sided bound, per picture, with |.| the length over channels and cells:

    r' = min(1, rho |cond| / |r|) r

in x0 (as ComfyUI's node) or in velocities (as the model's authors do), where x0' = anchor + min(...) (x0 - anchor).

Truncation leaves out guidance, and the uncond prediction with it, so these steps take half the time. Lumina does that
late in the pass; ComfyUI's `cfg_trunc` is a noise level at and above which guidance is off, which is early.

References: Lin et al., "STIV: Scalable Text and Image Conditioned Video Generation" (2024) for renormalisation; Qin et
al., "Lumina-Image 2.0" (2025) for truncation; ComfyUI's RenormCFG.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lib_hires.run import FLOW, Call, Run
from lib_hires.settings import Settings, choice, number, passes_choice, window_end, window_start
from lib_hires.sites import Predictions
from lib_hires.technique import Rest, Technique
from lib_hires.techniques.guidance.reductions import norm, ratio, scaled_about, velocity_anchor
from lib_hires.techniques.guidance.windowed import WindowedGuidance
from lib_hires.window import Window, Windowed

IMAGE, VELOCITY = "Image (x0)", "Velocity"
_NO_TRUNCATION = 100.0  # ComfyUI's value for off; zero-terminal-SNR models do have noise levels above it


@dataclass(frozen=True)
class RenormCFGSettings(Windowed, Settings):
    renorm: float = number(
        1.0, 0.0, 100.0, 0.01,
        label="Renorm",
        help="How long the guided prediction may be, compared with that of the prompt alone. Higher acts less; below 1 "
        "the picture washes out quickly; 0 switches renorm off.",
    )  # fmt: skip
    space: str = choice(
        IMAGE, (IMAGE, VELOCITY),
        label="Measured in",
        help=f"{IMAGE}: the length of the predicted picture, as in ComfyUI. {VELOCITY}: the length of its change, as "
        "the authors of Lumina measure it.",
    )  # fmt: skip
    guidance_from: float = number(
        0.0, 0.0, 1.0, 0.01,
        label="Guidance from",
        help="Fraction of the pass before which there is no guidance, as at CFG 1. Without guidance a step takes half "
        "the time and ignores the negative prompt.",
    )  # fmt: skip
    guidance_until: float = number(
        1.0, 0.0, 1.0, 0.01,
        label="Guidance until",
        help="Fraction of the pass after which there is no guidance. Late steps need it least, and without it they "
        "take half the time.",
    )  # fmt: skip
    cfg_trunc: float = number(
        _NO_TRUNCATION, 0.0, _NO_TRUNCATION, 0.01,
        label="ComfyUI cfg_trunc",
        help="No guidance at noise levels (sigma) from this one up. 100 switches it off. For values from ComfyUI; "
        "Guidance from says the same as a fraction.",
    )  # fmt: skip
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()

    @property
    def truncates(self) -> bool:
        return self.guidance_from > 0 or self.guidance_until < 1 or self.cfg_trunc < _NO_TRUNCATION

    def problem(self) -> str | None:
        if Window(self.guidance_from, self.guidance_until).is_empty:
            return (
                f"Guidance from {self.guidance_from:g} is not before Guidance until {self.guidance_until:g}, so there "
                "would never be guidance: lower Guidance from, or raise Guidance until"
            )
        return super().problem()


def renormalised(denoised: Tensor, cond: Tensor, renorm: float, anchor: Tensor | float = 0.0) -> Tensor:
    """`denoised`, no longer than `renorm` (rho) times `cond`, both measured from the anchor.

    Both [B, ...] in one space; lengths per picture over everything else. A shorter prediction stays as it is.
    """
    bound = renorm * ratio(norm(cond - anchor), norm(denoised - anchor))
    return scaled_about(denoised, anchor, bound.clamp(max=1.0) - 1)


class RenormCFGPatch(WindowedGuidance):
    def __init__(self, settings: RenormCFGSettings, run: Run) -> None:
        super().__init__(settings, run)
        self._settings = settings
        self._guided = Window(settings.guidance_from, settings.guidance_until).resolve(run)
        self._flow = run.model.prediction == FLOW

    def skips_uncond(self, call: Call) -> bool:
        above = self._settings.cfg_trunc < _NO_TRUNCATION and call.sigma >= self._settings.cfg_trunc
        return above or call.sigma not in self._guided

    def after_mix(self, denoised: Tensor, raw: Predictions) -> Tensor:
        if self.skips_uncond(raw.call):
            self.fired += 1
            return denoised
        if raw.uncond is None or self._settings.renorm == 0 or not self.acts_in(raw.call):
            return denoised
        self.fired += 1
        return renormalised(denoised, raw.cond, self._settings.renorm, self._anchor(raw))

    def _anchor(self, raw: Predictions) -> Tensor | float:
        """The x0 that has length 0 in the chosen space. Of a flow model that is x: v = (x - x0) / sigma."""
        if self._settings.space == IMAGE:
            return 0.0
        return raw.x if self._flow else velocity_anchor(raw.x, raw.call.sigma)

    def describe(self) -> str:
        s, parts = self._settings, []
        if s.renorm:
            parts.append(f"renorm {s.renorm:g} of {s.space}, {super().describe()}")
        if s.truncates:
            upper = min(self._guided.upper, self._sigma_first)
            below = f" below {s.cfg_trunc:g}" if s.cfg_trunc < upper else ""
            parts.append(f"guidance from sigma {upper:.4g} to {self._guided.lower:.4g}{below}")
        return ", ".join(parts)


def begin(settings: RenormCFGSettings, run: Run) -> RenormCFGPatch:
    """The patch for one run. Raises `Rest` where neither renorm nor truncation is asked for."""
    if settings.renorm == 0 and not settings.truncates:
        raise Rest("renorm 0 changes nothing while there is guidance in the whole pass")
    return RenormCFGPatch(settings, run)


TECHNIQUE = Technique(
    name="renorm_cfg",
    title="RenormCFG",
    family="Guidance",
    summary="Keeps a high CFG scale from burning the picture by bounding its overall strength, and can switch guidance "
    "off in a part of the pass, which makes those steps twice as fast. Does nothing at CFG 1.",
    source="STIV (Lin et al. 2024); Lumina-Image 2.0 (Qin et al. 2025)",
    settings=RenormCFGSettings,
    begin=begin,
    presets={
        "Renorm": RenormCFGSettings(),
        "Gentle renorm": RenormCFGSettings(renorm=1.2),
        "Renorm of velocities": RenormCFGSettings(space=VELOCITY),
        "Faster, no guidance late": RenormCFGSettings(renorm=0.0, guidance_until=0.7),
        "Guidance in the middle only": RenormCFGSettings(renorm=0.0, guidance_from=0.1, guidance_until=0.7),
    },
)
