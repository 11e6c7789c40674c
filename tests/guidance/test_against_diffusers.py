"""Against diffusers' guiders. They work on the model's raw output, ours on x0: the conventions are converted here."""

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers.guiders import adaptive_projected_guidance as theirs_apg
from diffusers.guiders import tangential_classifier_free_guidance as theirs_tcfg
from diffusers.guiders.guider_utils import rescale_noise_cfg

from lib_hires.run import FLOW
from lib_hires.techniques.guidance import apg, rescale_cfg, tcfg
from lib_hires.techniques.guidance.apg import APGSettings
from lib_hires.techniques.guidance.rescale_cfg import RescaleCFGSettings
from lib_hires.techniques.guidance.tcfg import TCFGSettings

from .stand_ins import LEVELS, a_run, guide, predictions

SHAPES = [(1, 4, 16, 16), (2, 4, 13, 9), (3, 16, 8, 1)]
SCALE = 7.0


def pictures(shape, seed):
    """cond and uncond x0 of unit scale that resemble each other, as predictions do, and noise."""
    generator = torch.Generator().manual_seed(seed)
    shared, cond, uncond, noise = (torch.randn(shape, generator=generator) for _ in range(4))
    return 0.9 * shared + 0.3 * cond, 0.9 * shared + 0.3 * uncond, noise


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum", [0.0, -0.5, 0.3])
@pytest.mark.parametrize(("eta", "threshold"), [(0.0, 15.0), (0.5, 4.0), (1.0, 0.0), (-0.5, 2.0)])
@pytest.mark.parametrize("comfy_strength", [False, True])
def test_apg(shape, momentum, eta, threshold, comfy_strength):
    settings = APGSettings(
        eta=eta, norm_threshold=threshold, momentum=momentum, scale_threshold=False, comfy_strength=comfy_strength
    )
    patches = [] if settings.is_neutral else [apg.begin(settings, a_run())]
    buffer = theirs_apg.MomentumBuffer(momentum) if momentum else None
    strength = SCALE if comfy_strength else SCALE - 1
    for step, sigma in enumerate(LEVELS[:4]):
        cond, uncond, _ = pictures(shape, step)
        want = theirs_apg.normalized_guidance(
            cond, uncond, strength, buffer, eta, threshold, use_original_formulation=True
        )
        got = guide(patches, predictions(cond, cond, uncond, SCALE, sigma, step))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def their_tcfg(monkeypatch, cond, uncond):
    """Their result for raw outputs, in float64: they ask for float32, whose decomposition errs by more than 1e-5."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        return theirs_tcfg.normalized_guidance(cond.double(), uncond.double(), SCALE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [0.1, 1.0, 14.6, 4518.0])
def test_tcfg_of_noise_predictions(shape, sigma, monkeypatch):
    cond, uncond, noise = pictures(shape, 1)
    x = cond + sigma * noise
    exact = x.double()
    want = exact - sigma * their_tcfg(monkeypatch, (exact - cond) / sigma, (exact - uncond) / sigma)
    got = guide([tcfg.begin(TCFGSettings(), a_run())], predictions(x, cond, uncond, SCALE, sigma))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.2, 0.9])
def test_tcfg_of_a_flow_model(sigma, monkeypatch):
    cond, uncond, noise = pictures(SHAPES[1], 2)
    x = (1 - sigma) * cond + sigma * noise
    exact = x.double()
    want = exact - sigma * their_tcfg(monkeypatch, (exact - cond) / sigma, (exact - uncond) / sigma)
    got = guide([tcfg.begin(TCFGSettings(), a_run(prediction=FLOW))], predictions(x, cond, uncond, SCALE, sigma))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("multiplier", [0.35, 0.7, 1.0])
@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6, 4518.0])
def test_rescale_cfg_of_velocities(shape, multiplier, sigma):
    cond, uncond, noise = pictures(shape, 3)
    x = cond + sigma * noise
    skip, factor = x.double() / (sigma**2 + 1), sigma / (sigma**2 + 1) ** 0.5  # x0 = skip - factor v
    v_cond, v_uncond = ((skip - x0) / factor for x0 in (cond, uncond))
    v = rescale_noise_cfg(v_uncond + SCALE * (v_cond - v_uncond), v_cond, multiplier)
    patch = rescale_cfg.begin(RescaleCFGSettings(multiplier=multiplier), a_run())
    got = guide([patch], predictions(x, cond, uncond, SCALE, sigma))
    torch.testing.assert_close(got.double(), skip - factor * v, rtol=0, atol=1e-5)


@pytest.mark.parametrize("multiplier", [0.35, 1.0])
def test_rescale_cfg_of_a_flow_model_works_on_x0(multiplier):
    cond, uncond, noise = pictures(SHAPES[1], 4)
    want = rescale_noise_cfg(uncond + SCALE * (cond - uncond), cond, multiplier)
    patch = rescale_cfg.begin(RescaleCFGSettings(multiplier=multiplier), a_run(prediction=FLOW))
    got = guide([patch], predictions(noise, cond, uncond, SCALE, 0.6))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
