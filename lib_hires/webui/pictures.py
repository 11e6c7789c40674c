"""A row of small grey pictures in a technique's view. An SVG string, drawn from the technique's `preview`."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from lib_hires.settings import Settings
from lib_hires.technique import Picture, Technique
from lib_hires.webui.plot import DEFAULT_STEPS, synthetic_run

_WIDTH, _GAP, _CAPTION = 480, 8, 16


def pictures(technique: Technique, settings: Settings, steps: int = DEFAULT_STEPS) -> str:
    """The pictures of a technique with these settings, empty where it has none."""
    if technique.preview is None:
        return ""
    row = technique.preview(settings, synthetic_run(steps))
    # a short run has fewer pictures, not larger ones
    usual = len(technique.preview(technique.settings(), synthetic_run(DEFAULT_STEPS)))
    return _svg(row, max(usual, len(row)))


def _svg(row: tuple[Picture, ...], places: int) -> str:
    rows, columns = row[0].grey.shape
    width = (_WIDTH - _GAP * (places - 1)) / places
    height = width * rows / columns
    spoken = "; ".join(f"{picture.caption}: {picture.grey.mean():.0%} white" for picture in row)
    parts = [
        f'<svg class="hires-plus-plot hires-plus-pictures" viewBox="0 0 {_WIDTH} {height + _CAPTION:.1f}" role="img" '
        f'aria-label="{escape(spoken, quote=True)}">'
    ]
    for index, picture in enumerate(row):
        parts += _picture(picture, index * (width + _GAP), width, height)
    return "".join([*parts, "</svg>"])


def _picture(picture: Picture, x: float, width: float, height: float) -> list[str]:
    box = f'x="{x:.1f}" y="0.5" width="{width:.1f}" height="{height - 1:.1f}"'
    return [
        f'<image {box} preserveAspectRatio="none" href="data:image/png;base64,{_png(picture.grey)}"/>',
        f'<rect {box} fill="none" stroke="currentColor" stroke-opacity="0.4"/>',
        f'<text x="{x + width / 2:.1f}" y="{height + 12:.1f}" text-anchor="middle">{escape(picture.caption)}</text>',
    ]


def _png(grey: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
