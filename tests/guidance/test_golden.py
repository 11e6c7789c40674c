"""Against recorded results of the reference implementations, through the guidance pipeline."""

from dataclasses import replace

import pytest
import torch

from lib_hires.run import EPS, FLOW
from lib_hires.sites import Guidance
from lib_hires.technique import Patch
from lib_hires.techniques.guidance import apg, cfg_norm, fresca, mahiro, renorm_cfg, rescale_cfg, tcfg
from lib_hires.techniques.guidance.apg import APGSettings
from lib_hires.techniques.guidance.cfg_norm import AFTER, BEFORE, MULTIPLIER, CFGNormSettings
from lib_hires.techniques.guidance.fresca import BINS, FreScaSettings
from lib_hires.techniques.guidance.mahiro import MahiroSettings
from lib_hires.techniques.guidance.renorm_cfg import RenormCFGSettings
from lib_hires.techniques.guidance.rescale_cfg import RescaleCFGPatch, RescaleCFGSettings, rescaled
from lib_hires.techniques.guidance.tcfg import TCFGSettings

from .stand_ins import LEVELS, Golden, a_run, guide, predictions

TCFG, FRESCA, APG, RESCALE = Golden("tcfg"), Golden("fresca"), Golden("apg"), Golden("rescale_cfg")
RENORM, CFG_NORM, MAHIRO, CHAIN = Golden("renorm_cfg"), Golden("cfg_norm"), Golden("mahiro"), Golden("guidance_chain")


def cases(golden, agrees="yes", where=lambda parameters: True):
    chosen = [case for case in golden.cases if case["agrees_with_spec"] == agrees and where(case["parameters"])]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["name"])


def whole_guidance(parameters):
    return "kind" not in parameters


def without_guidance(raw):
    """As hosts hand over CFG 1, where the reference computes with an uncond of zeros."""
    return replace(raw, uncond=None)


def assert_reproduces(golden, case, patches):
    for i, raw in golden.samples(case):
        got = guide(patches, without_guidance(raw) if raw.scale == 1 else raw)
        golden.assert_close(case, got, sample=i)


@cases(TCFG)
def test_tcfg(case):
    assert_reproduces(TCFG, case, [tcfg.begin(TCFGSettings(), a_run())])


@cases(TCFG)
def test_tcfg_gives_the_recorded_uncond(case):
    for i, raw in TCFG.samples(case):
        got = tcfg.damped_uncond(raw.x, raw.cond, raw.uncond)
        TCFG.assert_close(case, got, "out_uncond", sample=i)


def fresca_settings(p):
    return FreScaSettings(
        scale_low=p["scale_low"], scale_high=p["scale_high"], cutoff_as=BINS, freq_cutoff=p["freq_cutoff"]
    )


@cases(FRESCA, where=whole_guidance)
def test_fresca(case):
    patch = fresca.begin(fresca_settings(case["parameters"]), a_run())
    assert_reproduces(FRESCA, case, [patch])
    for i, raw in FRESCA.samples(case):
        cond, uncond = patch.before_mix(raw.cond, raw.uncond, raw)
        FRESCA.assert_close(case, cond, "out_cond", sample=i)
        assert uncond is raw.uncond


@cases(FRESCA, where=lambda parameters: parameters.get("kind") == "filter")
def test_fresca_filter(case):
    p, g = case["parameters"], FRESCA.tensor(case, "in_g")
    low = fresca.low_pass(g.shape[-2:], fresca_settings(p).half_box(g.shape[-2:]))
    FRESCA.assert_close(case, g + fresca.reweighted(g, low, p["scale_low"], p["scale_high"]))


def apg_sequence(case, **switches):
    """The recorded steps, one call after the other, in one run."""
    p, sigmas = case["parameters"], [float(sigma) for sigma in APG.array(case, "in_sigma")]
    settings = APGSettings(
        eta=p["eta"], norm_threshold=p["norm_threshold"], momentum=p["momentum"], scale_threshold=False, **switches
    )
    c, u = APG.tensor(case, "in_c"), APG.tensor(case, "in_u")
    patches = [] if settings.is_neutral else [apg.begin(settings, a_run(sigmas))]
    raws = [predictions(c[i], c[i], u[i], p["cfg_scale"], sigma, i) for i, sigma in enumerate(sigmas)]
    return torch.stack([guide(patches, raw) for raw in raws])


@cases(APG)
def test_apg(case):
    APG.assert_close(case, apg_sequence(case))


@cases(APG)
def test_apg_with_the_strength_of_comfyui(case):
    APG.assert_close(case, apg_sequence(case, comfy_strength=True), "out_comfy")


def rescale_patch(p):
    run = a_run(prediction=FLOW if p["model"] == "flow" else EPS)
    if p["multiplier"] == 0:
        return RescaleCFGPatch(RescaleCFGSettings(multiplier=0), run)  # begin would rest
    return rescale_cfg.begin(RescaleCFGSettings(multiplier=p["multiplier"]), run)


@cases(RESCALE, where=whole_guidance)
def test_rescale_cfg(case):
    assert_reproduces(RESCALE, case, [rescale_patch(case["parameters"])])


@cases(RESCALE, where=lambda parameters: parameters.get("kind") == "map on v")
def test_rescale_cfg_as_a_map_on_v(case):
    v_cfg, v_cond = RESCALE.tensor(case, "in_v_cfg"), RESCALE.tensor(case, "in_v_cond")
    RESCALE.assert_close(case, rescaled(v_cfg, v_cond, case["parameters"]["multiplier"]))


def test_rescale_cfg_at_zero_snr_agrees_with_v_space_in_float64_far_closer_than_the_recording():
    case = next(case for case in RESCALE.cases if case["parameters"].get("multiplier") and "4518" in case["name"])
    ((_, raw),) = RESCALE.samples(case)
    got = guide([rescale_patch(case["parameters"])], raw).double()
    x, c, u, s = raw.x.double(), raw.cond.double(), raw.uncond.double(), raw.call.sigma
    factor = (s * s + 1) ** 0.5 / s
    v_cond, v_uncond = ((x / (s * s + 1) - prediction) * factor for prediction in (c, u))
    v = v_uncond + raw.scale * (v_cond - v_uncond)
    v = 0.7 * v * v_cond.std() / v.std() + 0.3 * v
    assert (got - (x / (s * s + 1) - v / factor)).abs().max() <= 1e-5


def renorm_patch(p):
    return renorm_cfg.begin(RenormCFGSettings(renorm=p["renorm_cfg"], cfg_trunc=p["cfg_trunc"]), a_run())


def assert_renorm_reproduces(case):
    p = case["parameters"]
    n = p["in_channels"]  # the reference's further channels are not the latent's
    ((_, raw),) = RENORM.samples(case)
    raw = replace(raw, x=raw.x[:, :n], cond=raw.cond[:, :n], uncond=raw.uncond[:, :n])
    neutral = p["renorm_cfg"] == 0 and p["cfg_trunc"] == 100
    got = guide([] if neutral else [renorm_patch(p)], raw)
    RENORM.assert_close(case, torch.cat([got, RENORM.tensor(case, "in_c")[:, n:]], dim=1))


@cases(RENORM)
def test_renorm_cfg(case):
    assert_renorm_reproduces(case)


@cases(RENORM, "no")
def test_renorm_cfg_with_the_cfg_trunc_of_comfyui(case):
    assert_renorm_reproduces(case)


def cfg_norm_patch(p, after):
    mode = BEFORE if p["pre_cfg"] else after
    return cfg_norm.begin(CFGNormSettings(strength=p["strength"], mode=mode), a_run())


@cases(CFG_NORM)
def test_cfg_norm(case):
    assert_reproduces(CFG_NORM, case, [cfg_norm_patch(case["parameters"], AFTER)])


@cases(CFG_NORM, "no")
def test_cfg_norm_with_the_strength_of_comfyui(case):
    assert_reproduces(CFG_NORM, case, [cfg_norm_patch(case["parameters"], MULTIPLIER)])


@cases(MAHIRO)
def test_mahiro(case):
    assert_reproduces(MAHIRO, case, [mahiro.begin(MahiroSettings(), a_run())])


@cases(MAHIRO, "no")
def test_mahiro_has_a_similarity_for_each_picture_whose_mean_the_reference_takes(case):
    w, c, u = case["parameters"]["cfg_scale"], MAHIRO.tensor(case, "in_c"), MAHIRO.tensor(case, "in_u")
    alike = mahiro.similarity(w * u, (w * c + u + w * (c - u)) / 2)
    assert alike.mean().item() == pytest.approx(case["parameters"]["similarity"], abs=1e-6)
    assert (alike[0] - alike[1]).abs() > 1e-4


class Perturbed(Patch, Guidance):
    """The published combination with a given perturbed prediction, as the chain's recording has it."""

    def __init__(self, scale):
        super().__init__()
        self._scale = scale

    def after_mix(self, denoised, raw):
        return denoised + self._scale * (raw.cond - raw.perturbed)


def chain(p, **apg_switches):
    low, high, bins = p["FreSca"]
    run, a = a_run(), p["APG"]
    every = {
        "TCFG": lambda: tcfg.begin(TCFGSettings(), run),
        "FreSca": lambda: fresca.begin(
            FreScaSettings(scale_low=low, scale_high=high, cutoff_as=BINS, freq_cutoff=bins), run
        ),
        "APG": lambda: apg.begin(APGSettings(**a, scale_threshold=False, **apg_switches), run),
        "RescaleCFG": lambda: rescale_cfg.begin(RescaleCFGSettings(multiplier=p["RescaleCFG"]), run),
        "CFGNorm": lambda: cfg_norm.begin(CFGNormSettings(strength=p["CFGNorm"]), run),
        "Mahiro": lambda: mahiro.begin(MahiroSettings(), run),
        "PAG": lambda: Perturbed(p["PAG"]),
    }
    return [every[name]() for name in p["patches_in_order"]]


def chain_result(case, **apg_switches):
    ((_, raw),) = CHAIN.samples(case)
    raw = replace(raw, perturbed=CHAIN.tensor(case, "in_perturbed"))
    return guide(chain(case["parameters"], **apg_switches), raw), raw


@cases(CHAIN)
def test_several_at_once(case):
    CHAIN.assert_close(case, chain_result(case)[0])


def named(name):
    return next(case for case in CHAIN.cases if case["name"] == name)


def test_tcfg_fresca_and_apg_with_the_strength_of_comfyui():
    case = named("TCFG+FreSca+APG")
    CHAIN.assert_close(case, chain_result(case, comfy_strength=True)[0])


def test_a_bound_is_taken_from_the_raw_cond_whatever_acted_before():
    case = named("FreSca+CFGNorm")
    got, raw = chain_result(case)
    low, high, bins = case["parameters"]["FreSca"]
    box = fresca.low_pass(raw.cond.shape[-2:], (bins, bins))
    cond = raw.cond + fresca.reweighted(raw.cond - raw.uncond, box, low, high)
    mixed = raw.uncond + raw.scale * (cond - raw.uncond)
    raw_bound = (raw.cond.norm(dim=1, keepdim=True) / mixed.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(got, mixed * raw_bound, rtol=1e-5, atol=1e-5)
    assert (got - CHAIN.tensor(case, "out")).abs().max() > 1e-2, "the recording bounds by the changed cond"


def test_recorded_noise_levels_lie_in_the_window_of_the_stand_in_run():
    patch = tcfg.begin(TCFGSettings(), a_run())
    assert all(patch.acts_in(predictions(None, None, None, 1, s).call) for s in (0.03, *LEVELS, 4518.0))
