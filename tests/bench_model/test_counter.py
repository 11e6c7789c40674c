"""The counter's thresholds, validated on true renders, mosaics of them and drawn overlaps only."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from lib_hires.hosts.bench import scenes
from lib_hires.hosts.bench.counter import count_objects, wilson_interval


def to_uint8(image: Tensor) -> np.ndarray:
    return (image.permute(1, 2, 0) * 255).round().byte().numpy()


def mosaic(parts: list[scenes.Scene], rows: int, columns: int, size: int = 128) -> np.ndarray:
    tiles = scenes.render_batch(parts, size, size).reshape(rows, columns, 3, size, size)
    return to_uint8(tiles.permute(2, 0, 3, 1, 4).reshape(3, rows * size, columns * size))


@pytest.mark.parametrize("factor, number", [(1, 96), (2, 48), (4, 24)])
def test_a_true_render_holds_one_object(factor: int, number: int) -> None:
    for scene in scenes.balanced_scenes(10 + factor, number):
        result = count_objects(to_uint8(scenes.render(scene, 128 * factor, 128 * factor)), scene.colour)
        assert (result.count, result.any_colour_count) == (1, 1), scene
        assert result.holes == (scene.shape == "ring")
        assert result.area == pytest.approx(scenes.object_area(scene, 1, 1), rel=0.05)
        assert result.solidity > 0.93
        assert result.centre == pytest.approx((scene.centre_y, scene.centre_x), abs=0.02)


@pytest.mark.parametrize("height, width", [(128, 256), (256, 128)])
def test_a_true_render_of_another_aspect_holds_one_object(height: int, width: int) -> None:
    for scene in scenes.balanced_scenes(3, 24):
        assert count_objects(to_uint8(scenes.render(scene, height, width)), scene.colour).is_single


@pytest.mark.parametrize("rows, columns", [(1, 2), (2, 1), (2, 2)])
def test_a_mosaic_holds_an_object_per_tile(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for colour in [*scenes.COLOURS] * 4:
        parts = [scenes.sample_scene(generator, None, colour) for _ in range(rows * columns)]
        result = count_objects(mosaic(parts, rows, columns), colour)
        assert (result.count, result.any_colour_count) == (rows * columns, rows * columns)


def test_a_mosaic_at_twice_the_size_holds_an_object_per_tile() -> None:
    for scene in scenes.balanced_scenes(6, 12):
        assert count_objects(mosaic([scene] * 4, 2, 2, 256), scene.colour).count == 4


def test_other_colours_count_only_as_any_colour() -> None:
    red, blue = (scenes.sample_scene(7, "disc", colour) for colour in ("red", "blue"))
    result = count_objects(mosaic([red, blue], 1, 2), "red")
    assert (result.count, result.any_colour_count) == (1, 2)
    assert count_objects(mosaic([red], 1, 1), "green").count == 0


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_touching_objects_are_told_apart(shape: str, ratio: float) -> None:
    base = dataclasses.replace(scenes.sample_scene(8, shape, "magenta"), centre_x=0.3, centre_y=0.5, radius=0.10)
    other = dataclasses.replace(base, radius=base.radius * ratio, stripe_phase=0.0)
    # Diamonds meet at their corners, which lie beyond the radius, the others nearly at the radius.
    reach = {"disc": 1.7, "ring": 1.7, "square": 1.7, "diamond": 1.9}[shape] / 2
    moved = dataclasses.replace(other, centre_x=base.centre_x + reach * (base.radius + other.radius))
    if shape == "square":
        moved = dataclasses.replace(moved, centre_y=base.centre_y + 0.8 * other.radius)
    first, second = scenes.render_batch([base, moved], 256, 256)
    chroma = second.amax(0) - second.amin(0)
    image = to_uint8(torch.where(chroma > 0.2, second, first))
    assert count_objects(image, "magenta").count == 2


def test_an_empty_frame_holds_nothing() -> None:
    result = count_objects(np.full((128, 128, 3), 128, np.uint8), "red")
    assert (result.count, result.any_colour_count, result.area, result.centre) == (0, 0, 0.0, None)


def test_wilson_interval() -> None:
    assert wilson_interval(0, 64) == pytest.approx((0.0, 0.0566), abs=1e-3)
    low, high = wilson_interval(52, 64)
    assert (low, high) == pytest.approx((0.70, 0.89), abs=0.01)
    assert wilson_interval(0, 0) == (0.0, 1.0)
