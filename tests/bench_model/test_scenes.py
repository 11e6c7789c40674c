"""Scenes: the same picture at every size, exactly one object in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lib_hires.hosts.bench import scenes


def test_a_seed_gives_the_same_scene() -> None:
    assert scenes.sample_scene(3) == scenes.sample_scene(3)
    assert scenes.sample_scene(3) != scenes.sample_scene(4)


def test_shape_and_colour_can_be_prescribed() -> None:
    scene = scenes.sample_scene(0, "ring", "red")
    assert scenes.caption(scene) == "a red ring"
    assert scenes.caption(scene, 1) == "red ring"


def test_balanced_scenes_run_through_all_captions() -> None:
    captions = [scenes.caption(scene) for scene in scenes.balanced_scenes(0, len(scenes.CAPTIONS))]
    assert captions == list(scenes.CAPTIONS)


@pytest.mark.parametrize("height, width", [(128, 128), (128, 256), (200, 136), (64, 320)])
def test_renders_have_the_asked_size_and_range(height: int, width: int) -> None:
    image = scenes.render(scenes.sample_scene(1), height, width)
    assert image.shape == (3, height, width)
    assert 0 <= float(image.min()) < float(image.max()) <= 1


@pytest.mark.parametrize("factor", [2, 4])
def test_a_larger_render_is_the_same_picture(factor: int) -> None:
    batch = scenes.balanced_scenes(5, 8)
    small = scenes.render_batch(batch, 128, 128)
    large = scenes.render_batch(batch, 128 * factor, 128 * factor)
    assert F.mse_loss(F.avg_pool2d(large, factor), small) < 2e-4


def test_a_window_is_a_crop_of_the_frame() -> None:
    scene = scenes.sample_scene(9)
    frame = scenes.render(scene, 256, 256)
    crop = scenes.render_batch([scene], 64, 64, [scenes.Window(0.25, 0.5, 0.25, 0.25)])[0]
    assert torch.allclose(crop, frame[:, 64:128, 128:192], atol=1e-4)


@pytest.mark.parametrize("height, width", [(128, 128), (128, 256), (256, 128)])
def test_the_object_keeps_its_proportions_in_any_frame(height: int, width: int) -> None:
    for scene in scenes.balanced_scenes(2, 8):
        image = scenes.render(scene, height, width)
        coloured = (image.amax(0) - image.amin(0)) > 0.3
        assert float(coloured.float().mean()) == pytest.approx(scenes.object_area(scene, height, width), rel=0.05)
        rows, columns = coloured.any(1).sum(), coloured.any(0).sum()
        assert abs(int(rows) - int(columns)) <= 2


def test_backgrounds_are_grey() -> None:
    image = scenes.render_batch(scenes.sample_scenes(4, 32), 128, 128)[:, :, :8]
    assert float((image.amax(1) - image.amin(1)).max()) < 0.05
