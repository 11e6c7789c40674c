"""A labelled contact sheet: one row per condition, one column per prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL_WIDTH, HEADER = 160, 6, 190, 26
PAPER, INK = (250, 250, 250), (30, 30, 30)
FONTS = ("DejaVuSans.ttf", "Arial.ttf", "Helvetica.ttc")


def contact_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str]) -> Image.Image:
    """Rows of (label, pictures [H, W, 3] uint8) under column headings. Pictures keep their proportions."""
    heights = [max(_fitted(picture).height for picture in pictures) for _, pictures in rows]
    size = (LABEL_WIDTH + len(columns) * (CELL + GAP), HEADER + sum(heights) + GAP * len(rows))
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), _font(13)
    for number, heading in enumerate(columns):
        draw.text((LABEL_WIDTH + number * (CELL + GAP), 6), heading, INK, font)
    top = HEADER
    for (label, pictures), height in zip(rows, heights, strict=True):
        draw.multiline_text((8, top + 8), _wrap(label), INK, font)
        for number, picture in enumerate(pictures):
            sheet.paste(_fitted(picture), (LABEL_WIDTH + number * (CELL + GAP), top))
        top += height + GAP
    return sheet


def _fitted(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    scale = CELL / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrap(label: str) -> str:
    return label.replace(", ", ",\n")


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default()
