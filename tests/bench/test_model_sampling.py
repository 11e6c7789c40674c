"""The bench with other prediction types and noise levels: pictures, plans and what is left afterwards."""

import pytest
import torch

from lib_hires.generation import Generation
from lib_hires.hosts.bench.pipeline import Request
from lib_hires.noise import NoiseSchedule
from lib_hires.run import LCM, V
from lib_hires.techniques.guidance.apg import APGSettings
from lib_hires.techniques.guidance.rescale_cfg import RescaleCFGSettings
from lib_hires.techniques.schedule.model_sampling import ModelSamplingSettings

SD = NoiseSchedule.scaled_linear()
REQUEST = Request(("red circle",), (3,), width=64, height=64, steps=4, hires_scale=1.5)


def generation(*others, **settings):
    named = {"rescale_cfg": RescaleCFGSettings(), "apg": APGSettings()}
    return Generation({"model_sampling": ModelSamplingSettings(**settings)} | {name: named[name] for name in others})


@pytest.fixture
def as_v(bench, monkeypatch):
    """The eps model, saying v: with alpha = 1 / sqrt(1 + sigma^2), v = eps / alpha - sigma x (x in VP scaling)."""
    unet, forward = bench.models.unet, bench.models.unet.forward

    def convert():
        def says_v(x, timesteps, context=None, **kwargs):
            sigma = torch.tensor([SD.sigma(float(t)) for t in timesteps]).view(-1, 1, 1, 1)
            return forward(x, timesteps, context=context, **kwargs) * (1 + sigma**2).sqrt() - sigma * x

        monkeypatch.setattr(unet, "forward", says_v)

    return convert


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM++ 2M SDE", "DPM adaptive"])
def test_an_eps_model_that_says_v_gives_the_same_picture(bench, as_v, sampler):
    request = Request(("red circle",), (3,), width=64, height=64, steps=4, sampler=sampler)
    plain = bench.generate(request).latents
    as_v()
    wrong = bench.generate(request).latents
    right = bench.generate(request, generation(prediction="v")).latents
    assert torch.allclose(right, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    assert (wrong - plain).abs().mean() > 100 * (right - plain).abs().mean()


def test_it_is_in_force_in_both_passes_and_known_to_the_others(bench):
    asked = generation("rescale_cfg", "apg", prediction="v", zero_snr="On")
    result = bench.generate(REQUEST, asked)
    assert [plan.run.model.prediction for plan in result.plans] == [V, V]
    first, hires = (plan.run for plan in result.plans)
    assert first.sigmas[0] == pytest.approx(4518.76, rel=1e-5)
    assert first.elapsed(first.sigmas[0]) == 0 and first.elapsed(float(first.model.schedule.sigmas[500])) > 0.4
    assert hires.sigmas[0] < 4518 and hires.start is not None
    assert asked.acted == {"model_sampling", "rescale_cfg", "apg"} and not asked.refused
    assert result.latents.isfinite().all()


def test_lcm_levels_and_its_warning(bench):
    asked = generation(prediction="LCM")
    plan = bench.generate(REQUEST, asked).plans[0]
    assert plan.run.model.prediction == LCM
    assert plan.run.sigmas[-2] == pytest.approx(SD.sigma(19), rel=1e-4)
    assert "LCM sampler" in asked.warned["Model sampling"]


def test_karras_takes_the_new_range(bench):
    request = Request(("red circle",), (3,), width=64, height=64, steps=4, schedule="Karras")
    sigmas = bench.generate(request, generation(prediction="v", zero_snr="On")).plans[0].run.sigmas
    assert sigmas[0] == pytest.approx(4518.76, rel=1e-5) and sigmas[-2] == pytest.approx(SD.sigma(0), rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"prediction": "eps"}, {"zero_snr": "On"}, {"shift": "Value"}])
def test_what_rests_or_is_refused_changes_nothing(bench, settings):
    plain, asked = bench.generate(REQUEST).latents, generation(**settings)
    assert torch.equal(bench.generate(REQUEST, asked).latents, plain)
    assert not asked.acted and (asked.refused or asked.rested)


@pytest.mark.parametrize("passes", ["First pass", "Hires pass"])
def test_passes(bench, passes):
    result = bench.generate(REQUEST, generation(prediction="v", passes=passes))
    wanted = [V, "eps"] if passes == "First pass" else ["eps", V]
    assert [plan.run.model.prediction for plan in result.plans] == wanted


def test_nothing_is_left_after_a_fault(bench):
    plain = bench.generate(REQUEST).latents

    def fail(step, of):
        if step == 2:
            raise RuntimeError("stop")

    bench.after_call = fail
    with pytest.raises(RuntimeError):
        bench.generate(REQUEST, generation(prediction="v", zero_snr="On"))
    bench.after_call = lambda step, of: None
    assert torch.equal(bench.generate(REQUEST).latents, plain)
