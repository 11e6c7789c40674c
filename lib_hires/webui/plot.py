"""The small live plot of a technique: one bar per step, coloured and named by phase. An SVG string, drawn in Python.

The values come from the technique's own `curve`, that is from the formula that will act; nothing is computed twice.
"""

from __future__ import annotations

from html import escape
from itertools import cycle, groupby

from lib_hires.noise import NoiseSchedule
from lib_hires.run import FIRST_PASS, ModelFacts, Run
from lib_hires.settings import Settings
from lib_hires.technique import Curve, Technique

DEFAULT_STEPS = 20
MOST_STEPS = 150

_WIDTH, _HEIGHT = 480, 118
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 6, 24, 18  # room for the axis, and for the legend above
_COLOURS = ("#e8793a", "#d0a92c", "#3f9c86", "#5b86d6", "#b06fc4")  # readable on white and on black

_SCHEDULE = NoiseSchedule.scaled_linear()


def plot(technique: Technique, settings: Settings, steps: int = DEFAULT_STEPS) -> str:
    """The plot of a technique with these settings, empty where it has no curve."""
    if technique.curve is None:
        return ""
    curve = technique.curve(settings, synthetic_run(steps))
    # a phase keeps its colour when another one vanishes: they are handed out by the default settings' curve
    usual = technique.curve(technique.settings(), synthetic_run(DEFAULT_STEPS))
    phases = dict.fromkeys((*usual.phases, *curve.phases))
    return _svg(curve, dict(zip(phases, cycle(_COLOURS), strict=False)))


def synthetic_run(steps: int) -> Run:
    """A run as most samplers plan it: steps evenly spaced in training time, on Stable Diffusion's noise levels."""
    steps = min(max(int(steps), 1), MOST_STEPS)
    last = len(_SCHEDULE.sigmas) - 1
    sigmas = tuple([_SCHEDULE.sigma(last * (1 - step / steps)) for step in range(steps)])
    facts = ModelFacts(family="", native=(64, 64), schedule=_SCHEDULE, unet=None)
    return Run(host="", pass_name=FIRST_PASS, model=facts, latent=(128, 128), sigmas=sigmas)


def phase_texts(curve: Curve) -> list[tuple[str, str]]:
    """(phase, "phase: steps 1-7") in order of appearance."""
    texts = []
    for phase, group in groupby(enumerate(curve.phases, start=1), key=lambda pair: pair[1]):
        members = [step for step, _ in group]
        steps = f"step {members[0]}" if len(members) == 1 else f"steps {members[0]}-{members[-1]}"
        texts.append((phase, f"{phase}: {steps}"))
    return texts


def _svg(curve: Curve, colours: dict[str, str]) -> str:
    spoken = "; ".join(text for _, text in phase_texts(curve))
    parts = [
        f'<svg class="hires-plus-plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(f"{curve.caption}. {spoken}", quote=True)}">',
        *_legend(curve, colours),
        *_axes(curve),
        *_bars(curve, colours),
        "</svg>",
    ]
    return "".join(parts)


def _y(curve: Curve, value: float) -> float:
    span = (curve.high - curve.low) or 1.0
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - curve.low) / span


def _bars(curve: Curve, colours: dict[str, str]) -> list[str]:
    width = (_WIDTH - _LEFT - _RIGHT) / len(curve.values)
    gap = min(1.5, width / 6)
    base = _HEIGHT - _BOTTOM
    bars = []
    for index, (value, phase) in enumerate(zip(curve.values, curve.phases, strict=True)):
        top = min(_y(curve, value), base - 1)
        bars.append(
            f'<rect x="{_LEFT + index * width + gap:.2f}" y="{top:.2f}" width="{width - 2 * gap:.2f}" '
            f'height="{base - top:.2f}" fill="{colours[phase]}"><title>step {index + 1}: {value:.3g} '
            f"({escape(phase)})</title></rect>"
        )
    return bars


def _axes(curve: Curve) -> list[str]:
    lines = []
    for value in (curve.low, (curve.low + curve.high) / 2, curve.high):
        y = _y(curve, value)
        lines.append(_text(_LEFT - 5, y + 3.5, f"{value:.3g}", "end"))
        lines.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="currentColor" stroke-opacity="0.2"/>'
        )
    count = len(curve.values)
    width = (_WIDTH - _LEFT - _RIGHT) / count
    for step in _ticks(count):
        lines.append(_text(_LEFT + (step - 0.5) * width, _HEIGHT - 5, str(step), "middle"))
    return lines


def _ticks(count: int) -> list[int]:
    """Step numbers to print: the first, and round ones that do not crowd."""
    stride = next((stride for stride in (1, 5, 10, 20) if count / stride <= 14), 50)
    return [1, *(step for step in range(stride, count + 1, stride) if step > 1)]


def _legend(curve: Curve, colours: dict[str, str]) -> list[str]:
    """The caption, then each stretch of steps with its colour and its name."""
    parts = [f'<text class="hires-plus-legend" x="{_LEFT}" y="13"><tspan>{escape(curve.caption)}</tspan>']
    for phase, text in phase_texts(curve)[:4]:
        parts.append(f'<tspan dx="12" fill="{colours[phase]}">&#9632;</tspan><tspan dx="4">{escape(text)}</tspan>')
    return [*parts, "</text>"]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
