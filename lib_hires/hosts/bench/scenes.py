"""Procedural scenes that hold exactly one object, rendered analytically at any resolution.

A scene is a grey sky over a grey ground with one saturated, striped object in front. Positions are fractions of the
frame and the object's radius is a fraction of the frame's shorter side, so the same scene at twice the size is the same
picture with twice the pixels, and a 1x2 frame still holds one undistorted object. Everything is drawn from signed
distances with edges one pixel wide: a render at any size is a ground truth, never a resampled image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("disc", "square", "diamond", "ring")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.10),
    "yellow": (0.88, 0.84, 0.08),
    "green": (0.10, 0.74, 0.14),
    "cyan": (0.08, 0.80, 0.84),
    "blue": (0.12, 0.20, 0.90),
    "magenta": (0.86, 0.10, 0.80),
}
CAPTION_FORMS = ("a {colour} {shape}", "{colour} {shape}", "a photo of a {colour} {shape}", "one {colour} {shape}")
CAPTIONS = tuple(CAPTION_FORMS[0].format(colour=colour, shape=shape) for colour in COLOURS for shape in SHAPES)

CENTRE_X = (0.38, 0.62)
CENTRE_Y = (0.40, 0.60)
RADIUS = (0.17, 0.27)
HORIZON = (0.45, 0.80)
SKY = (0.62, 0.92)
GROUND = (0.18, 0.48)
TINT = 0.012
STRIPES_PER_RADIUS = 1.1
STRIPE_SHADE = 0.68
RING_INNER = 0.46


@dataclass(frozen=True)
class Scene:
    """One object on a two-tone background; lengths are fractions of the frame, angles radians, tones 0 to 1."""

    shape: str
    colour: str
    centre_x: float
    centre_y: float
    radius: float
    horizon: float
    sky: float
    ground: float
    tint: float
    stripe_angle: float
    stripe_phase: float


@dataclass(frozen=True)
class Window:
    """A part of the frame as fractions of its height and width; the whole frame by default."""

    top: float = 0.0
    left: float = 0.0
    height: float = 1.0
    width: float = 1.0


def caption(scene: Scene, form: int = 0) -> str:
    """Describe a scene in words; `form` selects one of `CAPTION_FORMS`."""
    return CAPTION_FORMS[form].format(colour=scene.colour, shape=scene.shape)


def sample_scene(source: torch.Generator | int, shape: str | None = None, colour: str | None = None) -> Scene:
    """Draw a scene from a generator, or from a fresh one with the given seed; shape and colour may be prescribed."""
    generator = torch.Generator().manual_seed(source) if isinstance(source, int) else source
    draws = torch.rand(11, generator=generator, dtype=torch.float64).tolist()

    def between(index: int, bounds: tuple[float, float]) -> float:
        return bounds[0] + draws[index] * (bounds[1] - bounds[0])

    return Scene(
        shape=shape or SHAPES[int(draws[0] * len(SHAPES))],
        colour=colour or tuple(COLOURS)[int(draws[1] * len(COLOURS))],
        centre_x=between(2, CENTRE_X),
        centre_y=between(3, CENTRE_Y),
        radius=between(4, RADIUS),
        horizon=between(5, HORIZON),
        sky=between(6, SKY),
        ground=between(7, GROUND),
        tint=between(8, (-TINT, TINT)),
        stripe_angle=between(9, (0.0, math.pi)),
        stripe_phase=between(10, (0.0, 2 * math.pi)),
    )


def sample_scenes(source: torch.Generator | int, count: int) -> list[Scene]:
    """Draw `count` scenes from one generator or seed."""
    generator = torch.Generator().manual_seed(source) if isinstance(source, int) else source
    return [sample_scene(generator) for _ in range(count)]


def balanced_scenes(source: torch.Generator | int, count: int) -> list[Scene]:
    """Draw `count` scenes whose captions run through all shapes and colours in turn."""
    generator = torch.Generator().manual_seed(source) if isinstance(source, int) else source
    pairs = [(shape, colour) for colour in COLOURS for shape in SHAPES]
    return [sample_scene(generator, *pairs[index % len(pairs)]) for index in range(count)]


def _column(values: Sequence[float]) -> Tensor:
    """Return per-scene numbers as a (B,1,1) tensor that broadcasts over pixels."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _pixel_grid(windows: Sequence[Window], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return frame coordinates (x, y) in 0..1 of the pixel centres, as (B,1,W) and (B,H,1)."""
    rows = ((torch.arange(height) + 0.5) / height)[None, :, None]
    columns = ((torch.arange(width) + 0.5) / width)[None, None, :]
    x = _column([w.left for w in windows]) + _column([w.width for w in windows]) * columns
    y = _column([w.top for w in windows]) + _column([w.height for w in windows]) * rows
    return x, y


def shape_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to a shape's edge, negative inside, in units of the shape's radius."""
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.86
    if shape == "diamond":
        return (x.abs() + y.abs()) / math.sqrt(2) - 0.80
    distance = torch.sqrt(x * x + y * y)
    if shape == "disc":
        return distance - 1
    if shape == "ring":
        middle, half_thickness = (1 + RING_INNER) / 2, (1 - RING_INNER) / 2
        return (distance - middle).abs() - half_thickness
    raise ValueError(f"unknown shape {shape!r}")


def _coverage(signed_distance_in_pixels: Tensor) -> Tensor:
    """How much of a pixel lies inside an edge, 0 to 1."""
    return (0.5 - signed_distance_in_pixels).clamp(0, 1)


def _background(scenes: Sequence[Scene], y: Tensor, pixel: Tensor) -> Tensor:
    """Grey sky over grey ground with a slight warm or cold tint, (B,3,H,1)."""
    horizon = _column([s.horizon for s in scenes])
    sky = _column([s.sky for s in scenes]) - 0.10 * (1 - y / horizon).clamp(0, 1)
    ground = _column([s.ground for s in scenes]) + 0.08 * ((y - horizon) / (1 - horizon)).clamp(0, 1)
    below = _coverage((horizon - y) / pixel)
    tone = sky + (ground - sky) * below
    tint = _column([s.tint for s in scenes])
    return torch.stack((tone + tint, tone, tone - tint), dim=1)


def _stripe_shade(scenes: Sequence[Scene], x: Tensor, y: Tensor, pixel: Tensor) -> Tensor:
    """Brightness factor of the stripes at object coordinates in radii; `pixel` is one pixel in radii."""
    angle = _column([s.stripe_angle for s in scenes])
    cycles = 2 * math.pi * STRIPES_PER_RADIUS
    wave = torch.cos(cycles * (x * torch.cos(angle) + y * torch.sin(angle)) + _column([s.stripe_phase for s in scenes]))
    return 1 - (1 - STRIPE_SHADE) * _coverage(wave / (cycles * pixel))


def _object_mask(scenes: Sequence[Scene], x: Tensor, y: Tensor, pixel: Tensor) -> Tensor:
    """Coverage of the object per pixel at object coordinates in radii, (B,H,W)."""
    mask = x.new_zeros(torch.broadcast_shapes(x.shape, y.shape))
    for shape in {scene.shape for scene in scenes}:
        chosen = torch.tensor([index for index, scene in enumerate(scenes) if scene.shape == shape])
        mask[chosen] = _coverage(shape_distance(shape, x[chosen], y[chosen]) / pixel[chosen])
    return mask


def render_batch(
    scenes: Sequence[Scene], height: int, width: int, windows: Sequence[Window] | None = None, aspect: float = 0.0
) -> Tensor:
    """Render scenes to (B,3,H,W) in 0..1.

    `windows` renders only that part of each frame, enlarged to the full size: a crop of a larger render. `aspect` is
    the frame's height over its width; by default it follows from the size and the window of the first scene.
    """
    parts = list(windows) if windows is not None else [Window()] * len(scenes)
    if not aspect:
        aspect = (height / parts[0].height) / (width / parts[0].width)
    to_short_x, to_short_y = max(1.0, 1 / aspect), max(1.0, aspect)
    x, y = _pixel_grid(parts, height, width)
    pixel_y = _column([part.height / height for part in parts])
    radius = _column([s.radius for s in scenes])
    object_x = (x - _column([s.centre_x for s in scenes])) * to_short_x / radius
    object_y = (y - _column([s.centre_y for s in scenes])) * to_short_y / radius
    object_pixel = pixel_y * to_short_y / radius
    mask = _object_mask(scenes, object_x, object_y, object_pixel)[:, None]
    shade = _stripe_shade(scenes, object_x, object_y, object_pixel)[:, None]
    colour = torch.tensor([COLOURS[s.colour] for s in scenes])[:, :, None, None]
    background = _background(scenes, y, pixel_y)
    return (background + (colour * shade - background) * mask).clamp(0, 1)


def render(scene: Scene, height: int, width: int) -> Tensor:
    """Render one scene to (3,H,W) in 0..1."""
    return render_batch([scene], height, width)[0]


def object_area(scene: Scene, height: int, width: int) -> float:
    """The fraction of a frame of this size that the object covers."""
    unit_area = {
        "disc": math.pi,
        "square": (2 * 0.86) ** 2,
        "diamond": 2 * (0.80 * math.sqrt(2)) ** 2,
        "ring": math.pi * (1 - RING_INNER**2),
    }[scene.shape]
    return unit_area * (scene.radius * min(height, width)) ** 2 / (height * width)
