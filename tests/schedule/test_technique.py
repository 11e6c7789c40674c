"""What the technique decides for a model: the schedule in force, what it refuses, warns of and rests at."""

from dataclasses import replace

import pytest
from hypothesis import given

from lib_hires.generation import Generation
from lib_hires.model_sampling import flow_schedule, has_zero_snr, shift_for_size, zero_terminal_snr
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import make_plan, prepare_plan
from lib_hires.registry import BY_NAME
from lib_hires.run import EPS, FIRST_PASS, FLOW, HIRES_PASS, LCM, X0, ModelFacts, Run, V
from lib_hires.samplers import Sampler
from lib_hires.sites import Schedule
from lib_hires.technique import Refusal, Rest
from lib_hires.techniques.guidance.rescale_cfg import RescaleCFGSettings
from lib_hires.techniques.schedule.model_sampling import ModelSamplingSettings, begin
from lib_hires.webui import infotext
from tests.webui_layer.strategies import settings_of

SD = NoiseSchedule.scaled_linear()
ZERO = zero_terminal_snr(SD)
SD3 = flow_schedule(3.0, 1000)


def a_run(prediction=EPS, schedule=SD, latent=(64, 64), sampler="sample_euler", **changes):
    model = ModelFacts("SD3" if prediction == FLOW else "SD 1.x", (64, 64), schedule, None, prediction=prediction)
    model = replace(model, **{k: changes.pop(k) for k in list(changes) if k == "trained_schedule"})
    return Run("test", FIRST_PASS, model, latent, (14.6, 0.03), sampler=Sampler(sampler), **changes)


def sampling(run, **settings):
    return begin(ModelSamplingSettings(**settings), run).model_sampling()


@pytest.mark.parametrize(("name", "kind"), [("v", V), ("x0", X0), ("LCM", LCM)])
def test_prediction_type(name, kind):
    got = sampling(a_run(), prediction=name)
    assert got.prediction == kind and got.schedule is SD
    assert len(got.levels) == (50 if kind == LCM else 1000)


def test_zero_snr_on_and_off():
    assert sampling(a_run(V), zero_snr="On").levels[-1] == pytest.approx(4518.76, rel=1e-6)
    off = sampling(a_run(V, ZERO, trained_schedule=SD), zero_snr="Off")
    assert off.schedule is SD and off.prediction == V


@pytest.mark.parametrize(
    ("run", "settings"),
    [
        (a_run(), {}),
        (a_run(), {"prediction": "eps"}),
        (a_run(), {"zero_snr": "Off"}),
        (a_run(V, ZERO), {"prediction": "v", "zero_snr": "On"}),
        (a_run(EPS, ZERO), {}),  # the host's own setting, though a bad one
        (a_run(FLOW, SD3), {}),
        (a_run(FLOW, SD3), {"shift": "Value", "shift_value": 3.0}),
    ],
)
def test_rests_where_the_model_is_so_already(run, settings):
    with pytest.raises(Rest):
        sampling(run, **settings)


@pytest.mark.parametrize(
    ("run", "settings", "words"),
    [
        (a_run(), {"zero_snr": "On"}, ("zero SNR", "Prediction type to v")),
        (a_run(V, ZERO), {"prediction": "eps"}, ("zero SNR", "Off")),
        (a_run(), {"prediction": "LCM", "zero_snr": "On"}, ("zero SNR",)),
        (a_run(), {"shift": "Value"}, ("no flow model", "Model's own")),
        (a_run(V), {"shift": "From resolution"}, ("no flow model",)),
        (a_run(FLOW, SD3), {"prediction": "v"}, ("flow model", "Auto")),
        (a_run(FLOW, SD3), {"zero_snr": "On", "shift": "Value"}, ("flow model", "Auto")),
        (a_run(V, ZERO), {"zero_snr": "Off"}, ("unknown", "Auto")),
    ],
)
def test_refuses_with_the_value_to_change(run, settings, words):
    with pytest.raises(Refusal) as refusal:
        sampling(run, **settings)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_shift():
    assert sampling(a_run(FLOW, SD3), shift="Value", shift_value=1.5).levels == pytest.approx(
        flow_schedule(1.5, 1000).sigmas
    )
    tall = a_run(FLOW, SD3, latent=(256, 64))
    got = sampling(tall, shift="From resolution", base_shift=0.4, max_shift=1.3)
    assert got.shift == pytest.approx(shift_for_size((256, 64), 0.4, 1.3))
    assert got.levels == pytest.approx(flow_schedule(got.shift, 1000).sigmas)


def test_warnings():
    assert "LCM sampler" in begin(ModelSamplingSettings(prediction="LCM"), a_run()).warning()
    assert not begin(ModelSamplingSettings(prediction="LCM"), a_run(sampler="sample_lcm")).warning()
    assert "x0" in begin(ModelSamplingSettings(prediction="x0"), a_run()).warning()
    assert not begin(ModelSamplingSettings(prediction="v"), a_run()).warning()


def test_a_warning_reaches_log_comment_and_infotext():
    selection = {"model_sampling": ModelSamplingSettings(prediction="x0")}
    prepared = prepare_plan(selection, a_run())
    prepared.at(Schedule)[0].model_sampling()
    plan = make_plan(selection, a_run(), prepared)
    assert "Model sampling WARNING: nothing tells" in plan.report()
    generation, params = Generation(selection), {}
    generation.finish_run(plan)
    told = infotext.settle(params, generation)
    assert params["Model sampling"] == "on" and "x0" in params[infotext.NOTE] and len(told) == 1


def test_the_prepared_decision_is_taken_over_in_registry_order():
    selection = {"model_sampling": ModelSamplingSettings(prediction="v"), "rescale_cfg": RescaleCFGSettings()}
    prepared = prepare_plan(selection, a_run())
    assert list(prepared.patches) == ["model_sampling"]
    plan = make_plan(selection, a_run(), prepared)
    assert list(plan.patches) == ["rescale_cfg", "model_sampling"]
    assert plan.patches["model_sampling"] is prepared.patches["model_sampling"]
    refused = prepare_plan({"model_sampling": ModelSamplingSettings(zero_snr="On")}, a_run())
    assert "Model sampling" in make_plan(selection, a_run(), refused).refused


def test_passes():
    run = replace(a_run(), pass_name=HIRES_PASS)
    plan = prepare_plan({"model_sampling": ModelSamplingSettings(prediction="v", passes="First pass")}, run)
    assert plan.resting and not plan.patches


@given(settings_of(BY_NAME["model_sampling"]))
def test_any_settings_decide_rest_or_refuse(settings):
    for run in (a_run(), a_run(V), a_run(V, ZERO, trained_schedule=SD), a_run(FLOW, SD3), a_run(EPS, ZERO)):
        try:
            patch = begin(settings, run)
        except (Rest, Refusal):
            continue
        got = patch.model_sampling()
        assert not (got.prediction in (EPS, LCM) and has_zero_snr(got.schedule))
        assert patch.describe()


@pytest.mark.parametrize(("others", "told"), [(("Advanced Model Sampling for reForge",), 1), (("Refiner",), 0)])
def test_another_script_that_does_the_same_is_named(others, told):
    selection = {"model_sampling": ModelSamplingSettings(prediction="v")}
    plan = make_plan(selection, a_run(other_scripts=others))
    assert "model_sampling" in plan.patches
    assert plan.report().count("is on as well and does the same: switch one of the two off") == told
