"""A sampling run in a WebUI, with stand-ins for the host's sampler and denoiser: what is wrapped comes off again."""

import inspect
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib_hires.generation import Generation
from lib_hires.hosts import webui
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.noise import NoiseSchedule
from lib_hires.run import ModelFacts
from lib_hires.techniques.schedule.model_sampling import ModelSamplingSettings
from lib_hires.techniques.unet.deep_shrink import DeepShrinkSettings
from lib_hires.topology import unet_topology
from tests.doubles import LdmMiniUNet

SD = NoiseSchedule.scaled_linear()
SIGMAS = (14.6, 5.0, 1.0, 0.1)


class Denoiser(nn.Module):
    """As the hosts': calls the callback, then the UNet; the model can be swapped before the callback."""

    def __init__(self, p):
        super().__init__()
        self.p, self.step, self.before_callback = [p], 0, lambda step: None

    def forward(self, x, sigma):
        self.before_callback(self.step)
        webui.on_cfg_denoiser(SimpleNamespace(denoiser=self, sigma=sigma))
        out = self.p[0].sd_model.unet(x)
        self.step += 1
        return out


def euler(model, x, sigmas, extra_args=None, callback=None):
    for sigma in sigmas:
        x = model(x, torch.full((x.shape[0],), sigma))
    return x


class Adapter:
    name = "test"

    def model_facts(self, sd_model):
        return ModelFacts("SD 1.x", (2, 2), SD, unet_topology(sd_model.unet))

    def unet_identity(self, sd_model):
        return sd_model.unet

    def call_sigma(self, params, facts):
        return float(params.sigma[0])

    def sigmas(self, sampler, arguments, facts):
        return webui.planned_sigmas(arguments, facts.schedule.sigma)

    def installation(self, sd_model, plan):
        return lambda call, params: HookedUnet(sd_model.unet, plan).open(call)


@pytest.fixture
def p(monkeypatch):
    monkeypatch.setattr(webui, "adapter_for", lambda sd_model: Adapter())
    p = SimpleNamespace(
        sd_model=SimpleNamespace(unet=LdmMiniUNet().eval()), seeds=[1], is_hr_pass=False, enable_hr=False
    )
    p.sampler = SimpleNamespace(func=euler, model_wrap_cfg=Denoiser(p))
    return p


@torch.no_grad()
def sample(p, *args, **kwargs):
    p.sampler.model_wrap_cfg.step = 0
    if not args and not kwargs:
        kwargs = {"sigmas": SIGMAS}
    return p.sampler.func(p.sampler.model_wrap_cfg, torch.ones(1, 4, 32, 32), *args, **kwargs)


def shrink(**changes):
    return Generation({"deep_shrink": DeepShrinkSettings(**changes)})


def assert_untouched(p):
    assert p.sampler.func is euler
    assert set(vars(p.sampler.model_wrap_cfg)) & {"forward", "hires_plus_run"} == set()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in p.sd_model.unet.modules())


def test_a_run_changes_the_result_once_and_leaves_nothing(p):
    plain = sample(p)
    generation = shrink()
    webui.attach(p, generation)
    changed = sample(p)
    assert generation.acted == {"deep_shrink"} and not torch.equal(changed, plain)
    assert_untouched(p)
    assert torch.equal(sample(p), plain)


def test_nothing_switched_on_touches_nothing(p):
    webui.attach(p, Generation())
    assert_untouched(p)


def test_the_host_still_sees_the_samplers_own_signature(p):
    webui.attach(p, shrink())
    assert list(inspect.signature(p.sampler.func).parameters) == list(inspect.signature(euler).parameters)


def test_the_hook_may_be_called_twice_before_a_pass(p, caplog):
    webui.attach(p, shrink())
    webui.attach(p, shrink())
    with caplog.at_level(logging.INFO, "hires_plus"):
        sample(p)
    assert len([r for r in caplog.records if "block 3" in r.message]) == 1
    assert_untouched(p)


def test_one_sampler_for_several_batches(p):
    plain = sample(p)
    for _ in range(2):
        webui.attach(p, shrink())
        assert not torch.equal(sample(p), plain)
        assert_untouched(p)


@pytest.mark.parametrize("also", [{}, {"model_sampling": ModelSamplingSettings(prediction="v")}])
def test_the_latents_that_a_pass_began_from_go_with_it(p, also, without_collector):
    p.is_hr_pass = p.enable_hr = True
    x, noise = torch.ones(1, 4, 32, 32), torch.ones(1, 4, 32, 32)
    alive = [weakref.ref(x), weakref.ref(noise)]
    webui.attach(p, Generation({"deep_shrink": DeepShrinkSettings()} | also), x, noise)
    wrapper = p.sampler.func  # as another extension may keep it
    sample(p)
    del x, noise
    assert wrapper is not p.sampler.func and [latent() for latent in alive] == [None, None]


def test_another_extension_may_wrap_around_ours(p, caplog):
    """Its wrapper keeps calling ours, also in later batches; one run each, and its wrapper stays where it put it."""
    webui.attach(p, shrink())
    ours = p.sampler.func
    seen = []

    def theirs(*args, **kwargs):
        seen.append(kwargs["sigmas"])
        return ours(*args, **kwargs)

    p.sampler.func = theirs
    for number in (1, 2):
        generation = shrink()
        webui.attach(p, generation)
        caplog.clear()
        with caplog.at_level(logging.INFO, "hires_plus"):
            sample(p)
        assert generation.acted == {"deep_shrink"}
        assert len([r for r in caplog.records if "block 3" in r.message]) == 1
        assert p.sampler.func is theirs and len(seen) == number
        assert set(vars(p.sampler.model_wrap_cfg)) & {"forward", "hires_plus_run"} == set()


@pytest.mark.parametrize("step", [0, 2])
def test_an_exception_at_a_step_leaves_nothing_behind(p, step):
    plain = sample(p)

    def fail(at):
        if at == step:
            raise RuntimeError("interrupted")

    generation = shrink()
    webui.attach(p, generation)
    p.sampler.model_wrap_cfg.before_callback = fail
    with pytest.raises(RuntimeError, match="interrupted"):
        sample(p)
    p.sampler.model_wrap_cfg.before_callback = lambda at: None
    assert_untouched(p)
    assert torch.equal(sample(p), plain)
    assert (generation.acted == {"deep_shrink"}) == (step > 0)


def test_an_exception_inside_the_unet_leaves_nothing_behind(p):
    plain = sample(p)
    webui.attach(p, shrink())
    handle = p.sd_model.unet.middle_block.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(p)
    handle.remove()
    assert_untouched(p)
    assert torch.equal(sample(p), plain)


def test_a_model_swapped_in_the_middle_gets_a_plan_of_its_own(p, caplog):
    second = LdmMiniUNet(seed=1).eval()

    def refine(step):
        if step == 1:
            p.sd_model = SimpleNamespace(unet=second)

    first = p.sd_model.unet
    p.sampler.model_wrap_cfg.before_callback = refine
    webui.attach(p, shrink(end=0.9))
    with caplog.at_level(logging.INFO, "hires_plus"):
        sample(p)
    assert len([r for r in caplog.records if "block 3" in r.message]) == 2
    for unet in (first, second):
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in unet.modules())


@pytest.mark.parametrize("name", ["model_facts", "call_sigma", "installation"])
def test_a_defect_of_ours_costs_the_technique_and_not_the_picture(p, monkeypatch, caplog, name):
    plain = sample(p)

    def broken(*_):
        raise KeyError("not what this host looks like")

    monkeypatch.setattr(Adapter, name, broken)
    generation = shrink()
    webui.attach(p, generation)
    with caplog.at_level(logging.INFO, "hires_plus"):
        assert torch.equal(sample(p), plain)
    assert "internal error" in generation.refused["DeepShrink"] and not generation.acted
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1, "told once, not at every step"
    assert_untouched(p)


def test_sigmas_given_by_position_are_found(p):
    generation = shrink()
    webui.attach(p, generation)
    sample(p, SIGMAS)
    assert generation.acted == {"deep_shrink"}


def test_a_window_that_no_step_falls_into_is_warned_about(p, caplog):
    webui.attach(p, shrink(start=0.01, end=0.02, gradual=0.0))
    with caplog.at_level(logging.WARNING, "hires_plus"):
        sample(p)
    assert "DeepShrink is on but never acted in this pass" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "sigmas"),
    [
        ({"sigmas": [2.0, 1.0, 0.0]}, (2.0, 1.0, 0.0)),
        ({"sigma_sched": torch.tensor([2.0, 0.0])}, (2.0, 0.0)),
        ({"timesteps": torch.tensor([1, 500, 999])}, (SD.sigma(999), SD.sigma(500), SD.sigma(1))),
        ({"sigma_min": 0.03, "sigma_max": 14.6, "n": 10}, (14.6, 0.03)),
    ],
)
def test_planned_sigmas(arguments, sigmas):
    assert webui.planned_sigmas(arguments, SD.sigma) == pytest.approx(sigmas)
