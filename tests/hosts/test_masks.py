"""Masks at the hosts' denoisers. The stand-ins blend in the order of theirs: A1111's k-diffusion denoiser after the
model, its timestep denoiser before it with a clean latent, Forge's before with fresh noise and after."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from lib_hires.generation import Generation
from lib_hires.hosts import masks, webui
from lib_hires.noise import NoiseSchedule
from lib_hires.run import ModelFacts
from lib_hires.techniques.inpaint import differential_diffusion as dd
from lib_hires.techniques.inpaint.differential_diffusion import DifferentialDiffusionSettings, mask_in_force

SD = NoiseSchedule.scaled_linear()
TIMESTEPS = (901, 701, 501, 301, 101)
LEVELS = tuple(SD.sigma(t) for t in TIMESTEPS)
KINDS = ("A1111", "A1111 timesteps", "Forge", "Forge timesteps")


class Denoiser(nn.Module):
    """x0 = x / (1 + sigma^2) in VE; told what the model saw and which masks stood there."""

    def __init__(self, p, kind):
        super().__init__()
        self.kind, self.eps = kind, kind.endswith("timesteps")
        self.mask_before_denoising = kind == "A1111 timesteps"
        if kind == "Forge timesteps":
            self.classic_ddim_eps_estimation = True
        self.mask, self.nmask, self.init_latent = p.mask, p.nmask, p.init_latent
        self.last_noise_uncond, self.step, self.fail_at, self.seen = None, 0, None, []

    def forward(self, x, level):
        sigma = torch.tensor([SD.sigma(float(t)) for t in level]) if self.eps else level
        scale = (1 + sigma[0] ** 2) ** 0.5 if self.eps else 1.0
        before_model = self.kind.startswith("Forge")
        if before_model:
            x = x * scale
            noise = torch.randn_like(self.init_latent) * sigma[0]
            x = x * self.nmask + (self.init_latent + noise) * self.mask
        elif self.mask_before_denoising:
            x = x * self.nmask + self.init_latent * self.mask
        webui.on_cfg_denoiser(SimpleNamespace(denoiser=self, sigma=sigma if before_model else level, x=x))
        if self.step == self.fail_at:
            raise RuntimeError("interrupted")
        ve = x if before_model else x * scale
        self.seen.append((ve, float(sigma[0]), self.nmask))
        self.step += 1
        denoised = ve / (1 + sigma[0] ** 2)
        if self.mask_before_denoising:
            self.last_noise_uncond = (ve - denoised) / sigma[0]
            return self.last_noise_uncond.clone()
        denoised = denoised * self.nmask + self.init_latent * self.mask
        return (x - denoised) / sigma[0] if self.eps else denoised


class Adapter:
    name = "test"

    def model_facts(self, sd_model):
        return ModelFacts("SD 1.x", (9, 13), SD, None)

    def unet_identity(self, sd_model):
        return None

    def call_sigma(self, params, facts):
        return float(params.sigma[0])

    def counts_timesteps(self, denoiser):
        return denoiser.eps

    def sigmas(self, sampler, arguments, facts):
        return (*LEVELS, 0.0)

    def installation(self, sd_model, plan):
        from contextlib import nullcontext

        return lambda call, params: nullcontext()


def euler(model, x, sigmas):
    """In the scaling of the denoiser: VE with x0, or VP with eps (which is DDIM)."""
    following = (*LEVELS[1:], 0.0)
    for i, (sigma, after) in enumerate(zip(LEVELS, following, strict=True)):
        if model.eps:
            eps = model(x, torch.full((len(x),), float(TIMESTEPS[i])))
            x0 = x * (1 + sigma**2) ** 0.5 - sigma * eps
            x = (x0 + after * eps) / (1 + after**2) ** 0.5
        else:
            x0 = model(x, torch.full((len(x),), sigma))
            x = x0 + (x - x0) * after / sigma
    return x


@pytest.fixture
def adapter(monkeypatch):
    monkeypatch.setattr(webui, "adapter_for", lambda sd_model: Adapter())


def make_p(kind, batch=2):
    g = torch.Generator().manual_seed(4)
    nmask = torch.linspace(0, 1, 13).expand(4, 9, 13).clone()
    p = SimpleNamespace(nmask=nmask, mask=1 - nmask, init_latent=torch.randn(batch, 4, 9, 13, generator=g))
    p.noise = torch.randn(batch, 4, 9, 13, generator=g)
    p.sd_model, p.seeds = None, [1]
    p.sampler = SimpleNamespace(func=euler, model_wrap_cfg=Denoiser(p, kind))
    return p


def sample(p, generation=None, seed=7):
    torch.manual_seed(seed)
    generation = generation or Generation()
    webui.attach(p, generation, p.init_latent, p.noise)
    denoiser = p.sampler.model_wrap_cfg
    denoiser.step, denoiser.seen = 0, []
    scale = (1 + LEVELS[0] ** 2) ** 0.5 if denoiser.eps else 1.0
    out = p.sampler.func(denoiser, (p.init_latent + LEVELS[0] * p.noise) / scale, sigmas=(*LEVELS, 0.0))
    args = SimpleNamespace(
        current_latent=out, nmask=p.nmask, init_latent=p.init_latent, mask=p.mask,
        blended_latent=out * p.nmask + p.init_latent * p.mask,
    )  # fmt: skip
    masks.blend_at_end(generation.blends, args)
    return args.blended_latent


def differential(**values):
    return Generation({"differential_diffusion": DifferentialDiffusionSettings(**values)})


def expected(p, strength=1.0, before=False):
    """Without any host: x0 blended by the mask in force, from the sampler's own latent. `before`: the model sees a
    latent that is blended too, as in the reference."""
    x = p.init_latent + LEVELS[0] * p.noise
    for sigma, after in zip(LEVELS, (*LEVELS[1:], 0.0), strict=True):
        mask = mask_in_force(p.nmask, SD.timestep(sigma) / SD.timestep(LEVELS[0]), strength)
        seen = x * mask + (p.init_latent + sigma * p.noise) * (1 - mask) if before else x
        x0 = seen / (1 + sigma**2) * mask + p.init_latent * (1 - mask)
        x = x0 + (x - x0) * after / sigma
    mask = mask_in_force(p.nmask, 0.0, strength)
    return x * mask + p.init_latent * (1 - mask)


@pytest.mark.parametrize("kind", KINDS)
def test_every_host_and_sampler_family_gives_the_same_picture(adapter, kind):
    p = make_p(kind)
    generation = differential()
    torch.testing.assert_close(sample(p, generation), expected(p), rtol=1e-4, atol=1e-4)
    assert generation.acted == {"differential_diffusion"} and not generation.refused


@pytest.mark.parametrize("kind", ["A1111", "A1111 timesteps"])
def test_between_soft_and_threshold(adapter, kind):
    p = make_p(kind)
    want = expected(p, 0.4, before=kind != "A1111")
    torch.testing.assert_close(sample(p, differential(strength=0.4)), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_black_is_the_picture_bit_for_bit(adapter, kind):
    p = make_p(kind)
    for strength in (0.3, 1.0):
        out = sample(p, differential(strength=strength))
        assert torch.equal(out[..., 0], p.init_latent[..., 0])
        assert (out[..., 1:] != p.init_latent[..., 1:]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_sees_held_cells_at_the_noise_level_of_the_call(adapter, kind):
    p = make_p(kind)
    p.sampler.model_wrap_cfg.step = 0
    sample(p, differential())
    for x, sigma, nmask in p.sampler.model_wrap_cfg.seen:
        held = (nmask == 0).expand_as(x)
        assert set(nmask.unique().tolist()) <= {0.0, 1.0} and held.any()
        noise = ((x - p.init_latent) / sigma)[held]
        assert 0.85 < float(noise.std()) < 1.15
        if not kind.startswith("Forge"):
            torch.testing.assert_close(noise, p.noise[held], rtol=1e-3, atol=1e-3)


def test_cfg_pp_gets_the_uncond_noise_of_held_cells(adapter):
    p = make_p("A1111 timesteps")
    sample(p, differential())
    denoiser = p.sampler.model_wrap_cfg
    held = (denoiser.seen[-1][2] == 0).expand_as(p.noise)
    torch.testing.assert_close(denoiser.last_noise_uncond[held], p.noise[held], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fail_at", [None, 0, 2])
def test_afterwards_the_denoiser_is_as_it_was(adapter, kind, fail_at):
    p = make_p(kind)
    plain = sample(p)
    denoiser = p.sampler.model_wrap_cfg
    before = {name: value for name, value in vars(denoiser).items() if name not in ("step", "seen", "fail_at")}
    denoiser.fail_at = fail_at
    generation = differential()
    if fail_at is None:
        sample(p, generation)
        assert generation.blends
    else:
        with pytest.raises(RuntimeError, match="interrupted"):
            sample(p, generation)
        assert not generation.blends, "an unfinished run is blended as the host does"
    after = vars(denoiser)
    assert after["mask"] is p.mask and after["nmask"] is p.nmask and after["init_latent"] is p.init_latent
    assert set(before) == set(after) - {"step", "seen", "fail_at"}
    denoiser.fail_at, denoiser.last_noise_uncond = None, None
    assert torch.equal(sample(p), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_the_hosts_own_blend(adapter, kind):
    p = make_p(kind)
    assert torch.equal(sample(p, differential(strength=0.0)), sample(p))


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_generator_is_drawn_from_as_often_as_without_us(adapter, kind):
    p = make_p(kind)
    states = []
    for generation in (Generation(), differential()):
        sample(p, generation)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_defect_of_ours_costs_the_technique_and_not_the_picture(adapter, monkeypatch):
    p = make_p("A1111")
    plain = sample(p)

    def broken(*_):
        raise KeyError("a defect")

    monkeypatch.setattr(dd, "mask_in_force", broken)
    generation = differential()
    assert torch.equal(sample(p, generation), plain)
    assert "internal error" in generation.refused["Differential Diffusion"]


def test_without_a_mask_it_rests(adapter):
    p = make_p("A1111")
    p.mask = p.nmask = p.sampler.model_wrap_cfg.mask = p.sampler.model_wrap_cfg.nmask = None
    assert masks.repaint_mask(p) is None
    generation = differential()
    webui.attach(p, generation, p.init_latent, p.noise)
    p.sampler.func = euler
    plan = webui.SamplingRun(Adapter(), p, generation, p.init_latent, {}, None, None)._current_plan()
    assert "no mask" in plan.report() and not plan.patches


class Script:
    args_from, args_to = 1, 3

    def title(self):
        return "Soft Inpainting"


@pytest.mark.parametrize("on", [True, False])
def test_beside_soft_inpainting_it_refuses(adapter, on):
    p = make_p("A1111")
    p.scripts, p.script_args = SimpleNamespace(alwayson_scripts=[Script()]), [True, on, 1.0]
    generation = differential()
    plain = sample(p)
    assert torch.equal(sample(p, generation), plain) is on
    assert ("Soft Inpainting is on" in generation.refused.get("Differential Diffusion", "")) is on


def test_rounding_is_off_only_while_the_masks_are_made():
    p = SimpleNamespace(mask_round=True, image_mask=None)
    masks.keep_grey(p)
    masks.keep_grey(p)
    assert p.mask_round is False
    cell = SimpleNamespace(**vars(p))  # a shallow copy, as grids make
    for one in (p, cell):
        masks.restore_rounding(one)
        masks.restore_rounding(one)
        assert vars(one) == {"mask_round": True, "image_mask": None}


def test_what_another_extension_set_is_kept():
    p = SimpleNamespace(mask_round=False, image_mask=None)
    masks.keep_grey(p)
    masks.restore_rounding(p)
    assert p.mask_round is False
    masks.keep_grey(SimpleNamespace())  # txt2img has no masks


class Ramp:
    def shown(self, mask, usual):
        return (mask * 4).clamp(max=1)


def overlay_of(usual):
    picture = Image.new("RGBA", usual.size, (200, 100, 50, 255))
    picture.putalpha(usual.point(lambda v: 255 - v))
    return SimpleNamespace(index=0, mask_for_overlay=usual, overlay_image=picture)


@pytest.mark.parametrize("only_masked", [False, True])
def test_the_overlay_covers_less(only_masked):
    grey = Image.linear_gradient("L")
    usual = grey if only_masked else grey.point(lambda v: min(255, 2 * v))
    args = overlay_of(usual)
    p = SimpleNamespace(paste_to=(0, 0, 256, 256) if only_masked else None)
    masks.show_result([Ramp()], p, args)
    alpha = torch.tensor(list(args.overlay_image.getchannel("A").getdata())).view(256, 256)[:, 0] / 255
    want = 1 - (torch.arange(256) / 255 * 4).clamp(max=1)
    assert (alpha - want).abs().max() < 0.005 and alpha[0] == 1
    assert args.overlay_image.getpixel((0, 30))[:3] == (200, 100, 50)
    assert args.mask_for_overlay.getpixel((0, 200)) == 255


def test_without_patches_the_overlay_is_the_hosts():
    args = overlay_of(Image.linear_gradient("L"))
    before = dict(vars(args))
    masks.show_result([], SimpleNamespace(paste_to=None), args)
    masks.show_result([Ramp()], SimpleNamespace(), SimpleNamespace(mask_for_overlay=None, overlay_image=None))
    assert vars(args) == before
