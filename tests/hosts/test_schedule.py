"""Prediction type and noise levels of one pass, on stand-ins for the samplers of A1111 and Forge: in force while the
sampler works, on objects that are as they were afterwards."""

import copy
import itertools
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib_hires.generation import Generation
from lib_hires.hosts import a1111_schedule, patcher_schedule, webui
from lib_hires.hosts.bench.samplers import import_k_diffusion
from lib_hires.hosts.forge import ADAPTER
from lib_hires.model_sampling import ModelSampling, flow_schedule, has_zero_snr, model_sampling, zero_terminal_snr
from lib_hires.noise import NoiseSchedule
from lib_hires.run import EPS, FLOW, LCM, ModelFacts, V
from lib_hires.technique import Refusal
from lib_hires.techniques.schedule.model_sampling import ModelSamplingSettings
from lib_hires.techniques.unet.deep_shrink import DeepShrinkSettings
from lib_hires.topology import unet_topology
from tests.doubles import LdmMiniUNet

SD = NoiseSchedule.scaled_linear()
ZERO = zero_terminal_snr(SD)
ABAR = torch.tensor(1 / (1 + SD.sigmas**2), dtype=torch.float32)
V_ZERO = Generation({"model_sampling": ModelSamplingSettings(prediction="v", zero_snr="On")})


class CFGDenoiserTimesteps(nn.Module):
    """Stand-in for the host's class, by which our adapter knows a timestep sampler."""


@pytest.fixture(autouse=True)
def host_modules(monkeypatch):
    timesteps, common = types.ModuleType("timesteps"), types.ModuleType("common")
    timesteps.CFGDenoiserTimesteps = CFGDenoiserTimesteps
    common.setup_img2img_steps = lambda p, steps=None: (10, 4)
    package = types.ModuleType("modules")
    monkeypatch.setitem(sys.modules, "modules", package)
    monkeypatch.setitem(sys.modules, "modules.sd_samplers_timesteps", timesteps)
    monkeypatch.setitem(sys.modules, "modules.sd_samplers_common", common)


def sd_model(seed=0, abar=ABAR):
    unet = LdmMiniUNet(seed=seed).eval()
    return SimpleNamespace(
        unet=unet, alphas_cumprod=abar, apply_model=lambda x, t, cond: unet(x) * (t / 1000).view(-1, 1, 1, 1)
    )


# --- A1111


class A1111Denoiser(nn.Module):
    """As the host's: makes its wrapper lazily, and anew after a refiner switch."""

    def __init__(self, p):
        super().__init__()
        self.p, self.step, self.model_wrap, self.refine = [p], 0, None, lambda step: None
        self.seen = []

    @property
    def inner_model(self):
        if self.model_wrap is None:
            self.model_wrap = import_k_diffusion().external.CompVisDenoiser(self.p[0].sd_model)
        return self.model_wrap

    def update_inner_model(self):
        self.model_wrap = None

    def forward(self, x, sigma):
        self.refine(self.step)
        webui.on_cfg_denoiser(SimpleNamespace(denoiser=self, sigma=sigma))
        self.seen.append(self.inner_model)
        self.step += 1
        return self.inner_model(x, sigma, cond=None)


def euler(model, x, sigmas, extra_args=None, callback=None):
    for sigma, after in itertools.pairwise(sigmas):
        denoised = model(x, sigma.repeat(x.shape[0]))
        x = x + (x - denoised) / sigma * (after - sigma)
    return x


class A1111Sampler:
    def __init__(self, p):
        self.func = euler
        self.model_wrap_cfg = A1111Denoiser(p)
        self.model_wrap = self.model_wrap_cfg.inner_model
        self.sigmas = None

    def sample(self, p, x, steps=None):
        self.sigmas = self.model_wrap.get_sigmas(4)
        return self.func(self.model_wrap_cfg, x * self.sigmas[0], sigmas=self.sigmas)

    def sample_img2img(self, p, x, noise, steps=None):
        self.sigmas = self.model_wrap.get_sigmas(4)[2:]
        return self.func(self.model_wrap_cfg, x + noise * self.sigmas[0], sigmas=self.sigmas)


class Adapter:
    name = "test"

    def model_facts(self, model):
        return ModelFacts("SD 1.x", (2, 2), SD, unet_topology(model.unet))

    def unet_identity(self, model):
        return model.unet

    def call_sigma(self, params, facts):
        return float(params.sigma[0])

    def sigmas(self, sampler, arguments, facts):
        return webui.planned_sigmas(arguments, facts.schedule.sigma)

    def installation(self, model, plan):
        raise AssertionError("nothing to do in the UNet")

    def scheduled(self, p, sampling):
        return a1111_schedule.scheduled(p.sampler, p.sd_model, sampling)

    def start_latent(self, p, steps, x, noise, sampling):
        return a1111_schedule.start_latent(p, steps, x, noise, sampling)


@pytest.fixture
def p(monkeypatch):
    monkeypatch.setattr(webui, "adapter_for", lambda model: Adapter())
    p = SimpleNamespace(sd_model=sd_model(), seeds=[1], is_hr_pass=False, enable_hr=False, width=64, height=64)
    p.sampler = A1111Sampler(p)
    return p


@torch.no_grad()
def sample(p, generation=None, method="sample"):
    p.sampler.model_wrap_cfg.step, p.sampler.model_wrap_cfg.seen = 0, []
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    if generation:
        webui.attach(p, generation, noise, noise)
    return p.sampler.sample(p, noise) if method == "sample" else p.sampler.sample_img2img(p, noise, noise)


def v_zero(**changes):
    settings = {"prediction": "v", "zero_snr": "On"} | changes
    return Generation({"model_sampling": ModelSamplingSettings(**settings)})


def assert_as_made(p, wrap, denoiser_wrap=None):
    assert p.sampler.func is euler
    assert "sample" not in vars(p.sampler) and "sample_img2img" not in vars(p.sampler)
    assert p.sampler.model_wrap is wrap
    assert p.sampler.model_wrap_cfg.model_wrap is (denoiser_wrap or wrap)
    assert set(vars(p.sampler.model_wrap_cfg)) & {"forward", "hires_plus_run", "update_inner_model"} == set()
    assert p.sd_model.alphas_cumprod is ABAR


@pytest.mark.parametrize("method", ["sample", "sample_img2img"])
def test_in_force_while_the_sampler_works_and_gone_afterwards(p, method):
    wrap, plain = p.sampler.model_wrap, sample(p, method=method)
    generation = v_zero()
    changed = sample(p, generation, method)
    assert generation.acted == {"model_sampling"} and not torch.equal(changed, plain)
    wanted = 4518.76 if method == "sample" else None
    assert wanted is None or float(p.sampler.sigmas[0]) == pytest.approx(wanted, rel=1e-5)
    assert {inner.sampling.prediction for inner in p.sampler.model_wrap_cfg.seen} == {V}
    assert_as_made(p, wrap)
    assert torch.equal(sample(p, method=method), plain)


def test_the_whole_run_is_that_of_a_host_with_a_v_model(p):
    changed = sample(p, v_zero(zero_snr="Auto"))
    p.sampler.model_wrap = p.sampler.model_wrap_cfg.model_wrap = import_k_diffusion().external.CompVisVDenoiser(
        p.sd_model
    )
    assert torch.allclose(changed, sample(p), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("step", [0, 2])
def test_after_an_exception(p, step):
    wrap, plain = p.sampler.model_wrap, sample(p)

    def fail(at):
        if at == step:
            raise RuntimeError("interrupted")

    p.sampler.model_wrap_cfg.refine = fail
    with pytest.raises(RuntimeError, match="interrupted"):
        sample(p, v_zero())
    p.sampler.model_wrap_cfg.refine = lambda at: None
    assert_as_made(p, wrap)
    assert torch.equal(sample(p), plain)


def test_a_hook_called_twice_and_a_hook_never_used(p):
    wrap, plain = p.sampler.model_wrap, sample(p)
    webui.attach(p, v_zero(), torch.ones(1, 4, 8, 8))
    sample(p, v_zero())
    assert_as_made(p, wrap)
    webui.attach(p, v_zero(), torch.ones(1, 4, 8, 8))
    webui.attach(p, Generation({"deep_shrink": DeepShrinkSettings(passes="Hires pass")}))
    webui.attach(p, v_zero(prediction="Auto", zero_snr="Auto"), torch.ones(1, 4, 8, 8))
    assert torch.equal(sample(p), plain)
    assert_as_made(p, wrap)


def test_several_batches_with_one_sampler(p):
    first = sample(p, v_zero())
    assert torch.equal(sample(p, v_zero()), first)


def test_the_refiner_gets_the_same_schedule(p):
    wrap, second = p.sampler.model_wrap, sd_model(seed=1)

    def refine(step):
        if step == 2:
            p.sd_model = second
            p.sampler.model_wrap_cfg.update_inner_model()

    p.sampler.model_wrap_cfg.refine = refine
    generation = v_zero()
    sample(p, generation)
    seen = p.sampler.model_wrap_cfg.seen
    assert [inner.sampling.prediction for inner in seen] == [V] * 4
    assert seen[1].inner_model is not second and seen[2].inner_model is second
    assert p.sampler.model_wrap is wrap and p.sampler.model_wrap_cfg.model_wrap is None, "made anew by the host"
    assert generation.acted == {"model_sampling"}


def test_a_refusal_is_told_and_harmless(p):
    wrap, plain, generation = p.sampler.model_wrap, sample(p), v_zero(prediction="eps")
    assert torch.equal(sample(p, generation), plain)
    assert "zero SNR" in generation.refused["Model sampling"] and not generation.acted
    assert_as_made(p, wrap)


@pytest.mark.parametrize("name", ["model_facts", "scheduled"])
def test_a_defect_of_ours_costs_the_schedule_and_not_the_picture(p, monkeypatch, name):
    wrap, plain, generation = p.sampler.model_wrap, sample(p), v_zero()
    monkeypatch.setattr(Adapter, name, lambda *_: 1 / 0)
    assert torch.equal(sample(p, generation), plain)
    assert "internal error" in generation.refused["Model sampling"] and not generation.acted
    assert_as_made(p, wrap)


def test_another_extension_around_the_samplers_method(p):
    original, seen = p.sampler.sample, []

    def theirs(*args, **kwargs):
        seen.append(args)
        return original(*args, **kwargs)

    p.sampler.sample = theirs
    sample(p, v_zero())
    assert p.sampler.sample is theirs and len(seen) == 1


class TimestepSampler:
    def __init__(self, p):
        self.model_wrap_cfg = CFGDenoiserTimesteps()
        self.model_wrap_cfg.alphas = p.sd_model.alphas_cumprod
        self.model_wrap = self.model_wrap_cfg.model_wrap = nn.Identity()

    def get_timesteps(self, p, steps):
        return torch.arange(0, 1000, 1000 // steps) + 1


def test_timestep_samplers_find_the_new_table_where_they_look(p):
    sampler = p.sampler = TimestepSampler(p)
    wrap, alphas = sampler.model_wrap, sampler.model_wrap_cfg.alphas
    with a1111_schedule.scheduled(sampler, p.sd_model, model_sampling(V, ZERO)):
        inner = sampler.model_wrap_cfg.model_wrap.inner_model
        assert float(inner.alphas_cumprod[-1]) == pytest.approx(4.897e-8, rel=1e-3)
        assert inner.unet is p.sd_model.unet and sampler.model_wrap_cfg.alphas is inner.alphas_cumprod
        assert sampler.model_wrap is sampler.model_wrap_cfg.model_wrap
    assert sampler.model_wrap is sampler.model_wrap_cfg.model_wrap is wrap
    assert sampler.model_wrap_cfg.alphas is alphas and p.sd_model.alphas_cumprod is ABAR
    with (
        pytest.raises(Refusal),
        a1111_schedule.scheduled(sampler, p.sd_model, ModelSampling(FLOW, flow_schedule(3, 9))),
    ):
        pass


def test_timestep_samplers_start_from_the_new_level(p):
    p.sampler = TimestepSampler(p)
    picture, noise, extra = (torch.randn(1, 4, 5, 7) for _ in range(3))

    def noised(abar):  # timesteps[4] of 10: 401
        return picture * abar[401].sqrt() + noise * (1 - abar[401]).sqrt() + extra * 0.3 * abar[401].sqrt()

    sampling = model_sampling(V, ZERO)
    got = a1111_schedule.start_latent(p, None, noised(ABAR), noise, sampling)
    assert torch.allclose(got, noised(torch.tensor(sampling.alphas_cumprod, dtype=torch.float32)), atol=1e-5)


def test_the_lcm_sampler_keeps_its_levels(p):
    class LCMCompVisDenoiser(nn.Module):
        quantize, sigmas = None, torch.ones(50)

    p.sampler.model_wrap = LCMCompVisDenoiser()
    for kind, wanted in ((EPS, LCM), (V, V)):
        with a1111_schedule.scheduled(p.sampler, p.sd_model, model_sampling(kind, SD)):
            assert len(p.sampler.model_wrap.sigmas) == 50
            assert p.sampler.model_wrap.sampling.prediction == wanted


# --- Forge


class Prediction(nn.Module):
    """As the host's: scalings, timesteps and the table, by prediction type."""

    def __init__(self, kind="epsilon"):
        super().__init__()
        self.prediction_type = kind
        self.register_buffer("alphas_cumprod", ABAR)
        self.register_buffer("sigmas", torch.tensor(SD.sigmas, dtype=torch.float32))
        self.register_buffer("log_sigmas", self.sigmas.log())

    def calculate_input(self, sigma, noise):
        raise AssertionError

    def sigma(self, timestep):
        raise AssertionError

    def percent_to_sigma(self, percent):
        return float(self.sigma(torch.tensor((1 - percent) * 999.0)))


class PredictionDiscreteFlow(nn.Module):
    def __init__(self, shift=3.0):
        super().__init__()
        self.shift, self.prediction_type = shift, "const"
        self.register_buffer("sigmas", torch.tensor(flow_schedule(shift, 1000).sigmas, dtype=torch.float32))

    def timestep(self, sigma):
        return sigma * 1000

    def sigma(self, timestep):
        t = timestep / 1000
        return self.shift * t / (1 + (self.shift - 1) * t)


class Linker(nn.Module):
    def __init__(self, predictor):
        super().__init__()
        self.predictor = predictor

    @property
    def sigmas(self):
        return self.predictor.sigmas


def forge(predictor, name="predictor", wrap=None, **engine):
    model = nn.Module()
    setattr(model, name, predictor)
    patcher = SimpleNamespace(model=model, object_patches={})
    sd = SimpleNamespace(forge_objects=SimpleNamespace(unet=patcher), alphas_cumprod=ABAR)
    denoiser = nn.Module()
    wrap = wrap or Linker(predictor)
    denoiser.inner_model = wrap
    for key, value in engine.items():
        setattr(denoiser, key, value)
    return SimpleNamespace(model_wrap=wrap, model_wrap_cfg=denoiser), sd


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()} | dict(vars(module).items())


def test_forge_works_with_a_changed_copy():
    own = Prediction()
    before = copy.deepcopy(own.state_dict())
    sampler, sd = forge(own)
    sampling = model_sampling(V, ZERO)
    with patcher_schedule.scheduled(sampler, sd, sampling):
        changed = sd.forge_objects.unet.model.predictor
        assert changed is sampler.model_wrap.predictor is not own
        assert changed.prediction_type == "v_prediction"
        assert float(sampler.model_wrap.sigmas[-1]) == pytest.approx(4518.76, rel=1e-5)
        assert changed.percent_to_sigma(0.5) == pytest.approx(ZERO.sigma(499.5), rel=1e-4)
        x, sigma = torch.randn(2, 4, 5, 7), torch.tensor([1.0, 9.0])
        assert torch.equal(changed.calculate_denoised(sigma, x, x * 2), sampling.denoised(x, x * 2, sigma))
        assert torch.equal(changed.calculate_input(sigma, x), sampling.model_input(x, sigma))
    assert sd.forge_objects.unet.model.predictor is sampler.model_wrap.predictor is own
    assert own.prediction_type == "epsilon" and "calculate_input" not in vars(own)
    assert all(torch.equal(before[key], value) for key, value in own.state_dict().items())


def test_forge_after_an_exception():
    own = Prediction()
    sampler, sd = forge(own, classic_ddim_eps_estimation=True)
    with pytest.raises(RuntimeError), patcher_schedule.scheduled(sampler, sd, model_sampling(V, ZERO)):
        sd.alphas_cumprod = sd.alphas_cumprod.clone()  # the host moves it to its device
        raise RuntimeError
    assert sd.forge_objects.unet.model.predictor is sampler.model_wrap.predictor is own
    assert sd.alphas_cumprod is ABAR


def test_forge_timestep_samplers_read_the_table_from_the_model():
    sampler, sd = forge(Prediction(), classic_ddim_eps_estimation=True)
    with patcher_schedule.scheduled(sampler, sd, model_sampling(V, ZERO)):
        assert float(sd.alphas_cumprod[-1]) == pytest.approx(4.897e-8, rel=1e-3)
        assert len(sd.alphas_cumprod) == 1000
    assert sd.alphas_cumprod is ABAR


def test_forge_lcm_has_50_levels_for_every_scheduler():
    sampler, sd = forge(Prediction())
    with patcher_schedule.scheduled(sampler, sd, model_sampling(LCM, SD)):
        levels = sampler.model_wrap.get_sigmas(4)
        assert float(levels[0]) == pytest.approx(SD.sigma_max, rel=1e-5) and float(levels[-1]) == 0
        assert float(levels[-2]) == pytest.approx(SD.sigma(19), rel=1e-4)
        assert len(sampler.model_wrap.sigmas) == 50
    assert "get_sigmas" not in vars(sampler.model_wrap)


def test_forge_shift():
    own = PredictionDiscreteFlow(3.0)
    sampler, sd = forge(own)
    wanted = flow_schedule(1.5, 1000)
    with patcher_schedule.scheduled(sampler, sd, ModelSampling(FLOW, wanted, shift=1.5)):
        changed = sampler.model_wrap.predictor
        assert changed.sigmas.double().numpy() == pytest.approx(wanted.sigmas, rel=1e-6)
        assert float(changed.sigma(torch.tensor(500.0))) == pytest.approx(wanted.sigmas[499], rel=1e-6)
        assert float(changed.timestep(torch.tensor(0.5))) == 500, "the network is told the same timestep"
    assert own.shift == 3.0 and sampler.model_wrap.predictor is own


class ModelSamplingDiscrete(Prediction):
    """Of reForge and Classic. reForge's has no alphas_cumprod."""

    def __init__(self):
        super().__init__()
        del self.alphas_cumprod


def test_relatives_have_a_table_in_the_wrapper():
    own = ModelSamplingDiscrete()
    wrap = import_k_diffusion().external.CompVisDenoiser(SimpleNamespace(alphas_cumprod=ABAR))
    before = wrap.sigmas
    sampler, sd = forge(own, "model_sampling", wrap)
    with patcher_schedule.scheduled(sampler, sd, model_sampling(V, ZERO)):
        assert float(wrap.get_sigmas(3)[0]) == pytest.approx(4518.76, rel=1e-4)
        assert sd.forge_objects.unet.model.model_sampling is not own
    assert wrap.sigmas is before and sd.forge_objects.unet.model.model_sampling is own


@pytest.mark.parametrize("name", ["predictor", "model_sampling"])
def test_the_levels_before_the_hosts_own_zero_snr_are_found(monkeypatch, name):
    """Forge rescales its sigmas beside alphas_cumprod, reForge both tables, and keeps the old one on the engine."""
    monkeypatch.setitem(sys.modules, "modules.shared", SimpleNamespace(opts=SimpleNamespace(data={})))
    levels = Prediction("v_prediction") if name == "predictor" else ModelSamplingDiscrete()
    levels.sigmas = torch.tensor(ZERO.sigmas, dtype=torch.float32)
    _, sd = forge(levels, name)
    sd.forge_objects.unet.model.diffusion_model = LdmMiniUNet()
    if name == "model_sampling":
        sd.alphas_cumprod, sd.alphas_cumprod_original = 1 / (1 + levels.sigmas**2), ABAR
    facts = ADAPTER.model_facts(sd)
    assert has_zero_snr(facts.schedule)
    assert facts.trained_schedule.sigmas == pytest.approx(SD.sigmas, rel=1e-4)


def test_what_cannot_be_replaced_is_refused():
    class PredictionEDM(Prediction):
        pass

    sampler, sd = forge(PredictionEDM())
    with pytest.raises(Refusal, match="EDM"), patcher_schedule.scheduled(sampler, sd, model_sampling(V, SD)):
        pass
    sampler, sd = forge(Prediction())
    sd.forge_objects.unet.object_patches["predictor"] = object()
    with (
        pytest.raises(Refusal, match="another extension"),
        patcher_schedule.scheduled(sampler, sd, model_sampling(V, SD)),
    ):
        pass
