"""Prediction type, noise levels and shift for one generation: as the host itself would do it, and gone afterwards."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest

from .client import A1111, FORGE, NOTE, REFORGE, distance, is_alive, same
from .test_xyz import plot  # noqa: F401 - a fixture

AXIS = "[Hires Plus] Model sampling Prediction type"
V_ZERO = {"prediction": "v", "zero_snr": "On"}


def sampling(**settings):
    return {"model_sampling": settings}


def with_window(**settings):
    """RescaleCFG tells in the log at which noise levels it acts."""
    return {"model_sampling": settings, "rescale_cfg": {"start": 0.5}}


@contextmanager
def zero_snr_option(webui):
    """The host's own setting."""
    before = webui.get("/sdapi/v1/options")["sd_noise_schedule"]
    webui.set_options(sd_noise_schedule="Zero Terminal SNR")
    try:
        yield
    finally:
        webui.set_options(sd_noise_schedule=before)


@pytest.fixture(scope="module")
def v_title(webui):
    title = webui.checkpoint("v-prediction")
    if title is None:
        pytest.skip("no v-prediction checkpoint is installed")
    return title


def test_a_wrong_type_is_put_right(webui, v_title, unharmed):
    """A v model said to be eps, and the other way round: another picture, and the host's own is back afterwards."""
    with webui.using_checkpoint(v_title):
        right = webui.txt2img()
        wrong = webui.txt2img(sampling(prediction="eps"))
        assert wrong.acted("model_sampling") and distance(wrong.picture, right.picture) > 1
        own = webui.txt2img(sampling(prediction="v"))
        assert same(own.picture, right.picture) and "already" in own.note
        assert same(webui.txt2img().picture, right.picture)
    unharmed()


def test_saying_v_is_what_a_v_checkpoint_gives(webui, v_title, plain, unharmed):
    """Where both checkpoints have the same weights, as test checkpoints do, one said to be v is the other."""
    with webui.using_checkpoint(v_title):
        as_eps, as_v = webui.txt2img(sampling(prediction="eps")).picture, webui.txt2img().picture
    if distance(as_eps, plain) > 0.2:
        pytest.skip("the checkpoints have other weights")
    assert distance(webui.txt2img(sampling(prediction="v")).picture, as_v) < 0.2
    unharmed()


SAMPLERS = [
    ("Euler", "Normal", 4),
    ("Euler a", "Karras", 4),
    ("DPM++ 2M", "Automatic", 4),
    ("DPM++ SDE", "SGM Uniform", 3),
    ("DPM++ 3M SDE", "Exponential", 4),
    ("Heun", "Normal", 3),
    ("LMS", "Normal", 3),
    ("DPM fast", "Normal", 4),
    ("Restart", "Karras", 20),
    ("LCM", "Normal", 3),
    ("DDIM", "Normal", 4),
    ("DDIM CFG++", "Normal", 4),
    ("PLMS", "Normal", 4),
    ("UniPC", "Normal", 4),
]


@pytest.mark.parametrize(("sampler", "scheduler", "steps"), SAMPLERS, ids=str)
def test_every_sampler_is_as_with_the_hosts_own_setting(webui, v_title, sampler, scheduler, steps):
    if sampler not in webui.samplers:
        pytest.skip(f"{webui.host} has no {sampler}")
    request = {"sampler_name": sampler, "scheduler": scheduler, "steps": steps}
    with webui.using_checkpoint(v_title):
        off, on = webui.txt2img(**request), webui.txt2img(sampling(zero_snr="On"), **request)
        assert on.status == 200 and on.acted("model_sampling"), on.body
        assert is_alive(on.picture)
        again = webui.txt2img(**request)
        assert same(again.picture, off.picture) and not again.keys
        assert not same(on.picture, off.picture)
        with zero_snr_option(webui):
            wanted = webui.txt2img(**request)
            back = webui.txt2img(sampling(zero_snr="Off"), **request)
        if sampler == "LCM" and webui.host == A1111:
            return  # there the host's own takes every model for one that predicts eps
        # UniPC asks between timesteps: A1111 rounds them down to look a v model's scalings up, we do not
        bound = 1.5 if sampler == "UniPC" else 0.5
        assert distance(on.picture, wanted.picture) < bound
        assert distance(back.picture, off.picture) < bound


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DDIM", "UniPC"])
def test_img2img(webui, v_title, sampler):
    request = {"sampler_name": sampler, "steps": 5}
    with webui.using_checkpoint(v_title):
        off, on = webui.img2img(**request), webui.img2img(sampling(zero_snr="On"), **request)
        assert on.acted("model_sampling") and not same(on.picture, off.picture)
        assert same(webui.img2img(**request).picture, off.picture)
        early = {FORGE: ("DDIM", "UniPC"), REFORGE: ("Euler", "Euler a")}
        if sampler in early.get(webui.host, ()):
            return  # in img2img the host makes these, with a table of their own, before it applies its setting
        with zero_snr_option(webui):
            assert distance(on.picture, webui.img2img(**request).picture) < 0.5


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_a_hires_pass_starts_from_the_new_noise_level(webui, v_title, sampler):
    request = {"sampler_name": sampler, "steps": 4, "hr_second_pass_steps": 4, "denoising_strength": 0.8}
    with webui.using_checkpoint(v_title):
        off, on = webui.hires(**request), webui.hires(sampling(zero_snr="On"), **request)
        assert on.acted("model_sampling") and not same(on.picture, off.picture)
        with zero_snr_option(webui):
            assert distance(on.picture, webui.hires(**request).picture) < 0.5
        assert same(webui.hires(**request).picture, off.picture)


@pytest.mark.parametrize("passes", ["Both", "First pass", "Hires pass"])
def test_hires(webui, v_title, unharmed, server_log, passes):
    off, on = webui.hires(), webui.hires(sampling(prediction="v", passes=passes))
    assert on.acted("model_sampling") and distance(on.picture, off.picture) > 0.3
    told = re.findall(r"\[(first|hires) pass[^\n]*Model sampling: v", server_log())
    if server_log():
        assert told == {"Both": ["first", "hires"], "First pass": ["first"], "Hires pass": ["hires"]}[passes]
    assert same(webui.hires().picture, off.picture)
    unharmed()


def test_windows_count_in_the_new_noise_levels(webui, v_title, server_log):
    with webui.using_checkpoint(v_title):
        answer = webui.txt2img({**sampling(zero_snr="On"), "rescale_cfg": {}}, steps=4)
        assert answer.acted("model_sampling", "rescale_cfg")
    if not server_log():
        pytest.skip("needs HIRES_WEBUI_LOG")
    line = [line for line in server_log().splitlines() if "Model sampling: v" in line][-1]
    assert "RescaleCFG: multiplier 0.7, sigma 4519 to" in line and "sigma 4518.76 to 0.02917 in 1000 levels" in line


def test_lcm(webui, server_log, unharmed):
    answer = webui.txt2img(sampling(prediction="LCM"), sampler_name="Euler", scheduler="Automatic", steps=4)
    assert answer.acted("model_sampling") and is_alive(answer.picture)
    assert "LCM sampler" in answer.note
    right = webui.txt2img(sampling(prediction="LCM"), sampler_name="LCM", scheduler="Automatic", steps=4)
    assert right.acted("model_sampling") and NOTE not in right.keys
    unharmed()


@pytest.mark.parametrize("prediction", ["x0", "img_to_img"])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_types_that_no_host_knows(webui, unharmed, prediction, sampler):
    answer = webui.txt2img(sampling(prediction=prediction), sampler_name=sampler, steps=3)
    assert answer.acted("model_sampling") and is_alive(answer.picture) and prediction in answer.note
    unharmed()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"zero_snr": "On"}, "zero SNR"), ({"shift": "Value"}, "no flow model"), ({"prediction": "eps"}, "already")],
)
def test_what_cannot_be_is_told_and_harmless(webui, plain, settings, words):
    answer = webui.txt2img(sampling(**settings))
    assert same(answer.picture, plain)
    assert words in answer.note and not answer.acted("model_sampling")


def test_xyz_over_the_prediction_type(quick, plot, quick_unharmed):  # noqa: F811
    cells = plot((AXIS, ["v", "Auto", "x0"]), cfg_scale=1)
    for picture, prediction in zip(cells.pictures, ("v", "Auto", "x0"), strict=True):
        assert same(picture, quick(sampling(prediction=prediction)).picture), prediction
        quick_unharmed()
    assert [keys.get("Model sampling Prediction type") for keys in cells.keys] == ["v", None, "x0"]


@pytest.mark.parametrize("sampler", ["Euler", "DDIM", "LCM"])
@pytest.mark.parametrize("kind", ["raise", "interrupt"])
def test_a_fault_at_step_3(webui, faults, unharmed, sampler, kind):
    answer = webui.txt2img(sampling(**V_ZERO), fault=(kind, 3), steps=5, sampler_name=sampler)
    assert answer.status == (500 if kind == "raise" else 200)
    unharmed()


def test_a_fault_in_the_hires_pass(webui, faults, unharmed):
    before = webui.hires()
    assert webui.hires(sampling(**V_ZERO), fault=("raise", 3)).status == 500
    assert same(webui.hires().picture, before.picture)
    unharmed()


def test_batches_and_counts(webui, unharmed):
    request = {"n_iter": 2, "batch_size": 2, "steps": 2}
    answer = webui.txt2img(sampling(prediction="v"), **request)
    one = webui.txt2img(sampling(prediction="v"), steps=2, seed=3)
    pictures = answer.pictures[-4:]
    assert distance(pictures[2], one.picture) < 1
    again = webui.img2img(sampling(prediction="v"), n_iter=2, seed=2)
    assert distance(again.pictures[-1], webui.img2img(sampling(prediction="v"), seed=3).picture) < 1
    unharmed()


def test_the_infotext_gives_the_same_picture(webui, plain):
    first = webui.txt2img(sampling(**V_ZERO))
    assert first.keys["Model sampling Prediction type"] == "v"
    assert first.keys["Model sampling Zero-terminal SNR"] == "On"
    again = webui.txt2img(infotext=first.infotext)
    assert same(again.picture, first.picture)


@pytest.mark.parametrize(("shift", "at_half"), [(1.5, "0.6"), (6.0, "0.857")])
def test_the_shift_of_a_flow_model(on_family, server_log, shift, at_half):
    webui = on_family("dit")
    if webui.host != FORGE:
        pytest.skip("a flow model is tested on Forge")
    request = {"scheduler": "Simple", "steps": 4}
    off = webui.txt2img(**request)
    on = webui.txt2img(with_window(shift="Value", shift_value=shift), **request)
    assert on.acted("model_sampling") and distance(on.picture, off.picture) > 0.1
    if server_log():
        line = [line for line in server_log().splitlines() if "Model sampling: flow" in line][-1]
        assert f"shift {shift:g}, sigma 1 to" in line
        assert re.search(rf"RescaleCFG: multiplier 0.7, sigma {at_half}\d* to 0", line), line
    assert same(webui.txt2img(**request).picture, off.picture)


def test_shift_from_resolution_and_what_a_flow_model_refuses(on_family, server_log):
    webui = on_family("dit")
    if webui.host != FORGE:
        pytest.skip("a flow model is tested on Forge")
    request = {"scheduler": "Simple", "steps": 2}
    off = webui.txt2img(**request)
    on = webui.txt2img(sampling(shift="From resolution"), **request)
    assert on.acted("model_sampling") and not same(on.picture, off.picture)
    if server_log():
        assert "Model sampling: flow, shift 1.596" in server_log()  # exp(0.5 + 0.65 (64 - 256) / 3840) at 128 x 128
    own = webui.txt2img(sampling(shift="Value", shift_value=3.0), **request)
    assert same(own.picture, off.picture)
    refused = webui.txt2img(sampling(prediction="v"), **request)
    assert same(refused.picture, off.picture) and "flow model" in refused.note
