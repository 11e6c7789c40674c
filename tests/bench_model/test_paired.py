"""Comparisons of rows picture by picture, and long jobs that are continued."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lib_hires.hosts.bench.compare import Task
from lib_hires.hosts.bench.drawn import Drawn
from lib_hires.hosts.bench.hires_metrics import grain
from lib_hires.hosts.bench.outcome import Batch
from lib_hires.hosts.bench.paired import discordance, mean_difference, statistic_difference


def wrong(*indices, n=20):
    return np.isin(np.arange(n), indices)


def test_only_pictures_that_differ_count():
    found = discordance(wrong(0, 1), wrong(1, 5, 6, 7, 8, 9))
    assert (found.only_here, found.only_there) == (1, 5)
    # both tails of a fair coin that falls 1 of 6 times: 2 (6 over 0 + 6 over 1) / 2^6
    assert found.p == pytest.approx(2 * (1 + 6) / 64)
    assert discordance(wrong(3), wrong(3)).p == 1


def test_a_mean_difference_has_the_width_of_its_standard_error():
    random = np.random.default_rng(1)
    there = random.normal(10, 3, 400)
    here = there + 0.5 + random.normal(0, 1, 400)
    value, low, high = mean_difference(here, there)
    assert value == pytest.approx((here - there).mean())
    error = (here - there).std(ddof=1) / math.sqrt(400)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05) and low < value < high


def test_a_statistic_is_taken_over_the_same_pictures_in_both_rows():
    values = np.random.default_rng(2).normal(size=30)

    def median(sample):
        return float(np.median(values[sample]))

    assert statistic_difference(30, median, median) == (0.0, 0.0, 0.0)
    _, low, high = statistic_difference(30, lambda sample: median(sample) + 1, median)
    assert low == pytest.approx(1) and high == pytest.approx(1)


@pytest.mark.parametrize("sigma", [2.0, 6.0])
def test_grain_is_the_noise_of_plain_areas(sigma):
    random = np.random.default_rng(3)
    y, x = np.mgrid[0:255, 0:256]
    picture = 90 + 40 * (x / 256) + 60 * ((x - 100) ** 2 + (y - 120) ** 2 < 40**2)
    noisy = picture + random.normal(0, sigma, picture.shape)
    assert grain(np.repeat(noisy[..., None], 3, -1)) == pytest.approx(sigma, rel=0.05)
    assert grain(np.repeat(picture[..., None], 3, -1)) < 0.05


def test_a_batch_is_found_again_by_what_was_asked_for(tmp_path):
    task = Task("lock", (0, 1), 20, 3.0, "Euler")
    pictures = np.random.default_rng(4).integers(0, 255, (2, 8, 8, 3), np.uint8)
    Drawn(tmp_path, True).keep(task, Batch(task.indices, pictures, 1.5, 40, 7))
    found = Drawn(tmp_path, True).find(task)
    assert (found.pictures == pictures).all() and found.indices == (0, 1)
    assert (found.seconds, found.unet_calls, found.operations) == (1.5, 40, 7)
    others = [{"row": "relay"}, {"indices": (0, 2)}, {"steps": 21}, {"cfg_scale": 4.0}, {"sampler": "Heun"}]
    assert all(Drawn(tmp_path, True).find(replace(task, **other)) is None for other in others)


def test_nothing_is_kept_or_found_unless_asked_for(tmp_path):
    task = Task("lock", (0,), 20, 3.0, "Euler")
    batch = Batch((0,), np.zeros((1, 8, 8, 3), np.uint8), 1.0, 1, 1)
    Drawn(tmp_path, False).keep(task, batch)
    assert not list(tmp_path.iterdir())
    Drawn(tmp_path, True).keep(task, batch)
    assert Drawn(tmp_path, False).find(task) is None
