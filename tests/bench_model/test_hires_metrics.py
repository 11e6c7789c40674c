"""The measures of a hires pass, on true renders and on renders spoilt in a known way."""

import math

import numpy as np
import pytest
from scipy import ndimage

from lib_hires.hosts.bench import scenes
from lib_hires.hosts.bench.hires_metrics import (
    cross_scale_psnr,
    high_band_ratio,
    radial_spectrum,
    shown_attributes,
    spectrum_distance,
    true_spectrum,
)

ALL = tuple((shape, colour) for colour in scenes.COLOURS for shape in scenes.SHAPES)


def renders(seed, size=256, count=24):
    return [picture(scene, size) for scene in scenes.balanced_scenes(seed, count)]


def picture(scene, size):
    return as_bytes(scenes.render(scene, size, size).permute(1, 2, 0).numpy() * 255)


def as_bytes(values):
    return values.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_shape_and_colour_of_true_renders(size):
    for scene in scenes.balanced_scenes(7, 48):
        assert shown_attributes(picture(scene, size)) == (scene.shape, scene.colour)


def test_a_picture_without_an_object_has_no_attributes():
    assert shown_attributes(np.full((128, 128, 3), 120, np.uint8)) is None


def test_cross_scale_psnr():
    base = renders(1, 64, 1)[0]
    doubled = base.repeat(2, 0).repeat(2, 1)
    assert cross_scale_psnr(doubled, base) == math.inf
    shifted = np.clip(doubled, 20, 200) + 10
    clipped = np.clip(base, 20, 200)
    assert cross_scale_psnr(shifted, clipped) == pytest.approx(20 * math.log10(255 / 10), abs=1e-6)
    assert cross_scale_psnr(renders(2, 128, 1)[0], base) < 20


def test_a_wave_lands_in_its_ring():
    wave = np.cos(2 * np.pi * 0.2 * np.arange(256))[None, :, None]
    spectrum = radial_spectrum([as_bytes(np.broadcast_to(120 + 100 * wave, (256, 256, 3)))])
    assert spectrum.argmax() == int(0.2 * 64) and spectrum[20:].max() < 1e-3 * spectrum.max()


def test_true_renders_are_near_the_true_spectrum_and_spoilt_ones_are_not():
    true = true_spectrum(ALL, 256, 256)
    good = renders(3)
    blurred = [as_bytes(ndimage.gaussian_filter(p.astype(float), (1, 1, 0))) for p in good]
    random = np.random.default_rng(0)
    grainy = [as_bytes(p + random.normal(0, 8, (*p.shape[:2], 1))) for p in good]
    near, soft, rough = (radial_spectrum(pictures) for pictures in (good, blurred, grainy))
    assert spectrum_distance(near, true) < 1.5
    assert spectrum_distance(soft, true) > 5 and spectrum_distance(rough, true) > 3
    assert high_band_ratio(near, true) == pytest.approx(1, abs=0.25)
    assert high_band_ratio(soft, true) < 0.2 and high_band_ratio(rough, true) > 1.5
    assert spectrum_distance(true, true) == 0 and high_band_ratio(true, true) == 1
