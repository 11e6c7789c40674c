"""Tables, timesteps, scalings and denoised formulas against k-diffusion, diffusers and the golden arrays."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.hosts.bench.samplers import import_k_diffusion
from lib_hires.model_sampling import (
    ModelSampling,
    ScheduledDenoiser,
    TimestepDenoiser,
    flow_schedule,
    has_zero_snr,
    model_sampling,
    shift_for_size,
    zero_terminal_snr,
)
from lib_hires.noise import NoiseSchedule
from lib_hires.run import EPS, FLOW, IMG_TO_IMG, LCM, X0, V

SD = NoiseSchedule.scaled_linear()
ZERO = zero_terminal_snr(SD)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ABAR = torch.cumprod(1 - BETAS, dim=0)
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "model_sampling.npz")
CASES = json.loads(str(GOLDEN["meta"]))["cases"]
TYPES = {"eps": EPS, "v_prediction": V, "x0": X0, "lcm": LCM, "img_to_img": IMG_TO_IMG, "flow": FLOW}


def cases(kind):
    return [pytest.param(case, id=case["name"]) for case in CASES if case["parameters"]["kind"] == kind]


def array(case, name):
    return GOLDEN[f"case_{case['case']}_{name}"]


def assert_close(got, want, tolerance):
    got = got.numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    bound = tolerance["atol"] + tolerance["rtol_of_max"] * np.abs(want).max()
    assert np.abs(got.astype(np.float64) - want).max() <= bound


@pytest.mark.parametrize("case", cases("table"))
def test_golden_table(case):
    sampling = model_sampling(TYPES[case["parameters"]["sampling"]], ZERO if case["parameters"]["zsnr"] else SD)
    assert_close(sampling.table(), array(case, "out"), case["tolerance"])
    # entry by entry too: of the maximum, 14.6, the small levels would be allowed an error of a tenth of a percent
    relative = 1e-6 if not case["parameters"]["zsnr"] else 5e-6
    assert sampling.levels == pytest.approx(array(case, "out").astype(np.float64), rel=relative)
    assert (sampling.timestep(torch.tensor(array(case, "in_sigma"))).numpy() == array(case, "out_timestep")).all()
    assert_close(sampling.sigma(torch.tensor(array(case, "in_t"))), array(case, "out_sigma_of_t"), case["tolerance"])


@pytest.mark.parametrize("case", cases("flow_table"))
def test_golden_flow_table(case):
    shift = case["parameters"]["equivalent_shift"]
    flux = case["parameters"]["node"] == "ModelSamplingFlux"
    table = flow_schedule(shift, 10000 if flux else 1000).sigmas
    assert_close(table[9::10] if flux else table, array(case, "out"), case["tolerance"])


@pytest.mark.parametrize("case", cases("denoised"))
def test_golden_denoised(case):
    sampling = model_sampling(TYPES[case["parameters"]["sampling"]], SD)
    x, output, sigma = (torch.tensor(array(case, f"in_{name}")) for name in ("x", "F", "sigma"))
    latent, noise = torch.tensor(array(case, "in_latent")), torch.tensor(array(case, "in_noise"))
    assert_close(sampling.denoised(output, x, sigma), array(case, "out"), case["tolerance"])
    assert_close(sampling.model_input(x, sigma), array(case, "out_model_input"), case["tolerance"])
    assert_close(sampling.noised(latent, noise, sigma[0]), array(case, "out_noised"), case["tolerance"])
    if case["parameters"]["sampling"] != "flow":
        got = sampling.noised(latent, noise, sigma[0], from_pure_noise=True)
        assert_close(got, array(case, "out_noised_max"), case["tolerance"])


@pytest.mark.parametrize("case", cases("zsnr_alphas_cumprod"))
def test_golden_zero_snr(case):
    abar = np.cumprod(1 - array(case, "in_betas"))
    got = zero_terminal_snr(NoiseSchedule.from_alphas_cumprod(abar))
    # through sigma and back, where abar near 1 loses digits
    assert 1 / (1 + got.sigmas[:-1] ** 2) == pytest.approx(array(case, "out"), abs=1e-12, rel=1e-9)


def test_zero_snr_against_diffusers():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    want = torch.cumprod(1 - rescale_zero_terminal_snr(BETAS), dim=0).numpy()
    assert 1 / (1 + ZERO.sigmas[:-1] ** 2) == pytest.approx(want[:-1], rel=1e-6)
    assert want[-1] == 0 and ZERO.sigma_max == pytest.approx(4518.76, rel=1e-6)
    assert ZERO.sigmas[-2] == pytest.approx(2254.24, rel=1e-5)
    assert has_zero_snr(ZERO) and not has_zero_snr(SD)


@pytest.mark.parametrize("levels", [SD, ZERO], ids=["plain", "zero SNR"])
@pytest.mark.parametrize("quantize", [False, True])
def test_timesteps_against_k_diffusion(levels, quantize):
    external = import_k_diffusion().external
    abar = torch.tensor(1 / (1 + levels.sigmas**2))
    theirs = external.DiscreteEpsDDPMDenoiser(None, abar, quantize=quantize)
    ours = ScheduledDenoiser(None, ModelSampling(EPS, levels), quantize)
    assert torch.allclose(ours.sigmas.double(), theirs.sigmas, rtol=1e-6, atol=0)
    sigma = torch.logspace(-2, 4, 400, dtype=torch.float64)
    sigma = sigma[sigma < levels.sigma_max]
    # float32 against float64: half a unit of the last place of log sigma is worth 1e-4 timesteps where levels are close
    assert torch.allclose(ours.sigma_to_t(sigma).double(), theirs.sigma_to_t(sigma).double(), rtol=1e-6, atol=3e-4)
    t = torch.linspace(0, 999, 777, dtype=torch.float64)
    assert torch.allclose(ours.t_to_sigma(t).double(), theirs.t_to_sigma(t).double(), rtol=3e-6, atol=0)
    for n in (1, 2, 7, 30):
        assert torch.allclose(ours.get_sigmas(n).double(), theirs.get_sigmas(n), rtol=1e-4, atol=0)
    assert torch.allclose(ours.get_sigmas().double(), theirs.get_sigmas(), rtol=1e-6, atol=0)
    assert (ours.sigma_min, ours.sigma_max) == (ours.sigmas[0], ours.sigmas[-1])


class Net:
    """Any network: a fixed nonlinear function of what it is shown and of the timestep."""

    def __init__(self):
        self.alphas_cumprod = ABAR.float()

    def apply_model(self, x, t, cond=0.0):
        return torch.tanh(x * 0.7 + t.view(-1, 1, 1, 1) / 1000 + cond)


@pytest.mark.parametrize("kind", [EPS, V])
def test_denoiser_against_k_diffusion(kind):
    external = import_k_diffusion().external
    wrapper = external.CompVisDenoiser if kind == EPS else external.CompVisVDenoiser
    theirs, ours = wrapper(Net()), ScheduledDenoiser(Net(), ModelSampling(kind, SD))
    sigma = torch.tensor([14.6, 3.0, 0.05])
    x = torch.randn(3, 4, 5, 7) * sigma.view(-1, 1, 1, 1)
    # their float32 table has an error of 1e-5 in the smallest levels
    assert torch.allclose(ours(x, sigma, cond=0.1), theirs(x, sigma, cond=0.1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [(EPS, "epsilon"), (V, "v_prediction"), (X0, "sample")])
@pytest.mark.parametrize("step", [0, 4, 8])
def test_denoised_against_diffusers(kind, name, step):
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=name
    )
    scheduler.set_timesteps(10)
    sigma, timestep = scheduler.sigmas[step], scheduler.timesteps[step]
    scheduler._step_index = step
    x, output = torch.randn(2, 4, 5, 7) * sigma, torch.randn(2, 4, 5, 7)
    want_shown = scheduler.scale_model_input(x, timestep)
    want = scheduler.step(output, timestep, x).pred_original_sample
    ours = ModelSampling(kind, SD)
    got = ours.denoised(output, x, sigma.repeat(2))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    shown = ours.model_input(x, sigma.repeat(2))
    assert torch.allclose(shown, want_shown, rtol=1e-6, atol=1e-6)


def test_lcm_boundary_against_diffusers():
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sampling = model_sampling(LCM, SD)
    assert len(sampling.levels) == 50
    for timestep in (19, 259, 999):
        sigma = torch.tensor([float(SD.sigmas[timestep])])
        assert int(sampling.timestep(sigma)) == timestep
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        x, output = torch.randn(1, 4, 5, 7, dtype=torch.float32), torch.randn(1, 4, 5, 7)
        want = c_out * (x - sigma * output) + c_skip * x
        assert torch.allclose(sampling.denoised(output, x, sigma), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 1.73, 3.0, 0.4])
def test_shift_against_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    want = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift).sigmas.flip(0).double().numpy()
    assert flow_schedule(shift, 1000).sigmas == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("latent", [(128, 128), (32, 32), (96, 168)])
def test_shift_from_resolution_against_diffusers(latent):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    mu = calculate_shift(latent[0] * latent[1] / 4)
    t = torch.linspace(0.1, 1, 10)
    want = FlowMatchEulerDiscreteScheduler().time_shift(mu, 1.0, t)
    assert flow_schedule(shift_for_size(latent), 10).sigmas == pytest.approx(want.double().numpy(), rel=1e-6)


@pytest.mark.parametrize("kind", [EPS, V, X0, IMG_TO_IMG, LCM])
@pytest.mark.parametrize("timestep", [19.0, 519.0, 999.0])
def test_timestep_denoiser_is_the_sigma_denoiser_in_vp_scaling(kind, timestep):
    sampling = ModelSampling(kind, SD)
    t = torch.tensor([timestep, timestep])
    sigma = sampling.sigma(t)
    x = torch.randn(2, 4, 5, 7) * sigma.view(-1, 1, 1, 1)
    root = (sigma**2 + 1).sqrt().view(-1, 1, 1, 1)
    eps = TimestepDenoiser(Net(), sampling)(x / root, t)
    denoised = ScheduledDenoiser(Net(), sampling, quantize=True)(x, sigma)
    assert torch.allclose(x - sigma.view(-1, 1, 1, 1) * eps, denoised, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [V, X0])
def test_half_precision_at_zero_snr_is_finite(dtype, kind):
    sampling = ModelSampling(kind, ZERO)
    sigma = torch.tensor([4518.76], dtype=dtype)
    x = (torch.randn(1, 4, 9, 7) * 4518.76).to(dtype)
    shown = sampling.model_input(x, sigma)
    denoised = sampling.denoised(torch.randn(1, 4, 9, 7).to(dtype), x, sigma)
    assert shown.dtype == denoised.dtype == dtype
    assert shown.isfinite().all() and denoised.isfinite().all()
    assert 0.5 < shown.float().std() < 2 and denoised.float().std() < 3


@given(st.sampled_from([SD, ZERO]), st.sampled_from([EPS, LCM]), st.floats(0, 999))
def test_sigma_and_timestep_are_inverse(schedule, kind, t):
    sampling = model_sampling(kind, schedule)
    clamped = min(max(t, sampling.skip - 1), 999)
    assert float(sampling.sigma(torch.tensor(t))) == pytest.approx(
        float(np.exp(np.interp(clamped, np.arange(sampling.skip - 1, 1000, sampling.skip), np.log(sampling.levels)))),
        rel=1e-4,
    )
    back = float(sampling.timestep(sampling.sigma(torch.tensor(t)), quantize=False))
    assert back == pytest.approx(clamped, abs=0.05 if kind == EPS else sampling.skip / 2 + 0.05)


@given(st.sampled_from([EPS, V, X0]), st.integers(0, 998), st.integers(0, 2**31))
def test_every_type_finds_the_same_picture(kind, timestep, seed):
    """A model that knows the picture, whatever it is trained to say of it."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(1, 4, 3, 5, generator=generator) for _ in range(2))
    sampling = ModelSampling(kind, ZERO)
    sigma = torch.tensor([float(ZERO.sigmas[timestep])])
    alpha = float(1 / (1 + ZERO.sigmas[timestep] ** 2) ** 0.5)
    output = {EPS: noise, V: alpha * noise - float(sigma) * alpha * clean, X0: clean}[kind]
    x = clean + sigma * noise
    got = sampling.denoised(output, x, sigma)
    assert torch.allclose(got, clean, atol=1e-5 + 2e-6 * float(sigma))  # eps subtracts two numbers of that size


def test_one_picture_does_not_depend_on_its_batch_mates():
    sampling = ModelSampling(V, ZERO)
    x, output, sigma = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), torch.tensor([0.1, 9.0, 4518.0])
    whole = sampling.denoised(output, x, sigma)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(whole[one], sampling.denoised(output[one], x[one], sigma[one]))


@pytest.mark.parametrize("kind", [EPS, V, X0, LCM, IMG_TO_IMG, FLOW])
def test_odd_sizes_and_other_ranks(kind):
    sampling = model_sampling(kind, flow_schedule(3, 1000) if kind == FLOW else SD)
    x = torch.randn(2, 16, 3, 17, 31)
    assert sampling.denoised(x, x, torch.tensor([0.5, 0.9])).shape == x.shape
