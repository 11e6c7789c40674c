"""Guidance on a UNet patcher: chunks, composed prompts, memory, other extensions. The stand-in host goes the same way
from conditions to a denoised result; what it should predict is computed condition by condition beside it."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.guidance import GuidancePipeline
from lib_hires.hosts.patcher_guidance import install_guidance
from lib_hires.hosts.patcher_unet import PatchedUnet
from lib_hires.run import COND, UNCOND, Call
from lib_hires.techniques.guidance import sag
from tests.doubles import FakePatcher
from tests.hosts.toy import ToyUNet, Trace, host_attention, identity_attention, plan_of

UNET = ToyUNet().eval().requires_grad_(False)
SIGMA = 2.0


class Model:
    """The host's model object: x0 of a batch of rows."""

    def apply_model(self, x, timestep, c_crossattn, transformer_options, **rest):
        assert len(x) == len(timestep) == len(c_crossattn) == len(transformer_options["cond_mark"])
        return UNET(x, c_crossattn, options=transformer_options)


class Patcher(FakePatcher):
    def clone(self):
        return Patcher(self.model.diffusion_model, copy.deepcopy(self.model_options))

    def set_model_attn1_replace(self, patch, side, block, depth=None):
        replace = self.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault("attn1", {})
        replace[(side, block) if depth is None else (side, block, depth)] = patch

    def add_conditioning_modifier(self, modifier):
        self.model_options.setdefault("conditioning_modifiers", []).append(modifier)

    def set_model_sampler_post_cfg_function(self, function):
        before = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*before, function]


class Host:
    """Sampling functions as a host with a UNet patcher has them. `one_by_one`: no memory for more than one chunk."""

    def __init__(self, one_by_one=False):
        self.one_by_one = one_by_one
        self.evaluated = []  # rows of every UNet evaluation

    def calc_cond_uncond_batch(self, model, cond, uncond, x, sigma, options):
        chunks = [(entry, 0) for entry in cond] + [(entry, 1) for entry in uncond or []]
        sums = [[torch.zeros_like(x), 1e-37], [torch.zeros_like(x), 1e-37]]
        chunks.reverse()
        groups = [[chunk] for chunk in chunks] if self.one_by_one else [chunks]
        for group in groups:
            marks = [mark for _, mark in group]
            transformer = dict(options["transformer_options"])
            transformer["cond_or_uncond"] = marks[:]
            transformer["cond_mark"] = torch.tensor([float(mark) for mark in marks for _ in x])
            c = {"c_crossattn": torch.cat([entry["text"] for entry, _ in group]), "transformer_options": transformer}
            args = {"input": torch.cat([x] * len(group)), "timestep": torch.cat([sigma] * len(group)), "c": c}
            args["cond_or_uncond"] = marks

            def counted(x, timestep, **c):
                self.evaluated.append(len(x))
                return model.apply_model(x, timestep, **c)

            wrapper = options.get("model_function_wrapper")
            out = wrapper(counted, args) if wrapper else counted(args["input"], args["timestep"], **c)
            assert len(out) == len(args["input"])
            for (entry, mark), part in zip(group, out.chunk(len(group)), strict=True):
                sums[mark][0] = sums[mark][0] + part * entry["strength"]
                sums[mark][1] += entry["strength"]
        return tuple(total / weight for total, weight in sums)

    def sample(self, patcher, x, cond, uncond, scale):
        options, model, sigma = patcher.model_options, Model(), torch.full((len(x),), SIGMA)
        for modify in options.get("conditioning_modifiers", []):
            model, x, _, uncond, cond, scale, options, _ = modify(model, x, sigma, uncond, cond, scale, options, 0)
        asked = None if math.isclose(scale, 1.0) else uncond
        c, u = self.calc_cond_uncond_batch(model, cond, asked, x, sigma, options)
        strength = sum(entry["strength"] for entry in cond)
        shared = {"input": x, "sigma": sigma, "timestep": sigma, "model": model, "model_options": options}
        shared |= {"cond_denoised": c, "uncond_denoised": u}
        if "sampler_cfg_function" in options:
            noise = options["sampler_cfg_function"]({**shared, "cond": x - c, "uncond": x - u, "cond_scale": scale})
            denoised = x - noise
        else:
            denoised = u + (c - u) * scale * strength
        for function in options.get("sampler_post_cfg_function", []):
            denoised = function({**shared, "denoised": denoised, "cond": cond, "uncond": uncond})
        return denoised


def draw(composed=1, seed=0, pictures=2):
    g = torch.Generator().manual_seed(seed)
    entry = lambda strength: {"text": torch.randn(pictures, 3, 5, generator=g), "strength": strength}
    return SimpleNamespace(
        x=torch.randn(pictures, 4, 8, 6, generator=g) * 2,
        cond=[entry([1.0, 0.6, 1.3][i]) for i in range(composed)],
        uncond=[entry(1.0)],
    )


def one_of(inputs, picture):
    """One picture of a batch, as a batch of its own."""
    one = slice(picture, picture + 1)
    part = lambda entries: [{**entry, "text": entry["text"][one]} for entry in entries]
    return SimpleNamespace(x=inputs.x[one], cond=part(inputs.cond), uncond=part(inputs.uncond))


def expected(inputs, perturbed=False):
    predict = identity_attention if perturbed else (lambda unet, *args: unet(*args))
    total = sum(entry["strength"] for entry in inputs.cond)
    cond = sum(predict(UNET, inputs.x, entry["text"]) * (entry["strength"] / total) for entry in inputs.cond)
    return cond, UNET(inputs.x, inputs.uncond[0]["text"])


def guided(inputs, patch, host, scale=7.0, base=None, fits=True, call=None):
    plan = plan_of(patch, UNET)
    patched = PatchedUnet(base or Patcher(UNET), plan, host_attention=host_attention, fits=lambda *_: fits)
    install_guidance(patched.patcher, patched.cell, GuidancePipeline(plan), host.calc_cond_uncond_batch)
    with patched.open(call or Call(SIGMA, 0)):
        return host.sample(patched.patcher, inputs.x, inputs.cond, inputs.uncond, scale)


LAYOUTS = {"composed": st.integers(1, 3), "one_by_one": st.booleans(), "fits": st.booleans()}


@given(**LAYOUTS)
def test_raw_predictions_are_those_of_every_single_condition(composed, one_by_one, fits):
    inputs, patch = draw(composed), Trace()
    guided(inputs, patch, Host(one_by_one), fits=fits)
    cond, uncond = expected(inputs)
    _assert_close(patch.raw.cond, cond)
    _assert_close(patch.raw.uncond, uncond)
    _assert_close(patch.raw.perturbed, expected(inputs, perturbed=True)[0])
    assert patch.raw.scale == pytest.approx(7.0 * sum(entry["strength"] for entry in inputs.cond))


@given(**LAYOUTS)
def test_a_patch_that_does_nothing_changes_no_bit_of_the_mix(composed, one_by_one, fits):
    inputs = draw(composed)
    want = Host(one_by_one).sample(Patcher(UNET), inputs.x, inputs.cond, inputs.uncond, 7.0)
    got = guided(inputs, Trace(perturbed=False), Host(one_by_one), fits=fits)
    assert torch.equal(got, want)


def test_the_perturbed_prediction_rides_along_where_it_can():
    inputs = draw()
    for fits, one_by_one, rows in ((True, False, [6]), (False, False, [4, 2]), (True, True, [2, 4])):
        host = Host(one_by_one)
        guided(inputs, Trace(), host, fits=fits)
        assert host.evaluated == rows


def test_changed_predictions_are_mixed_with_the_weights_of_the_prompts():
    inputs = draw(composed=2)
    cond, uncond = expected(inputs)
    got = guided(inputs, Trace(before=lambda c, u: (c * 2, u / 2)), Host())
    _assert_close(got, uncond / 2 + 7 * 1.6 * (cond * 2 - uncond / 2))


def test_another_extensions_cfg_function_mixes_what_we_hand_it():
    inputs, base = draw(), Patcher(UNET)
    base.model_options["sampler_cfg_function"] = lambda args: args["uncond"] * 3 + args["cond"] * args["cond_scale"]
    cond, uncond = expected(inputs)
    x = inputs.x
    got = guided(inputs, Trace(before=lambda c, u: (c * 2, u)), Host(), base=base)
    _assert_close(got, x - ((x - uncond) * 3 + (x - cond * 2) * 7))
    got = guided(inputs, Trace(after=lambda d, raw: d / 2), Host(), base=base)
    _assert_close(got, (x - ((x - uncond) * 3 + (x - cond) * 7)) / 2)


def test_other_extensions_post_cfg_functions_see_our_result():
    inputs, base = draw(), Patcher(UNET)
    base.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + 100)
    got = guided(inputs, Trace(before=lambda c, u: (c, c)), Host(), base=base)
    _assert_close(got, expected(inputs)[0] + 100)


@pytest.mark.parametrize("way", ["CFG scale 1", "skipped by a technique"])
def test_without_uncond_there_is_none(way):
    inputs, host = draw(), Host()
    patch = Trace(skip=way != "CFG scale 1")
    got = guided(inputs, patch, host, scale=1.0 if way == "CFG scale 1" else 7.0)
    assert patch.raw.uncond is None and sum(host.evaluated) == 4
    _assert_close(got, expected(inputs)[0])
    _assert_close(patch.raw.perturbed, expected(inputs, perturbed=True)[0])


@given(kind=st.sampled_from([COND, UNCOND]), **LAYOUTS)
def test_one_more_evaluation_uses_the_prompts_it_was_asked_for(kind, composed, one_by_one, fits):
    inputs = draw(composed)
    other = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(9))
    got = guided(inputs, Trace(after=lambda d, raw: raw.predict(other, kind)), Host(one_by_one), fits=fits)
    moved = SimpleNamespace(**{**vars(inputs), "x": other})
    _assert_close(got, expected(moved)[0 if kind == COND else 1])


@given(**LAYOUTS)
def test_only_uncond_rows_are_recorded(composed, one_by_one, fits):
    inputs, patch = draw(composed), Trace(perturbed=False)
    guided(inputs, patch, Host(one_by_one), fits=fits)
    whole = [(len(q), size) for q, size in patch.recorded if len(q)]
    assert (2, (8, 6)) in whole


@given(kind=st.sampled_from([COND, UNCOND]), **LAYOUTS)
def test_every_row_tells_whose_it_is(kind, composed, one_by_one, fits):
    inputs, call, shown = draw(composed, pictures=3), Call(SIGMA, 0), []

    def note(_, args, __):
        for x, row in zip(args[0], call.rows, strict=True):
            shown.append(torch.equal(x, inputs.x[row.picture]))

    handle = UNET.register_forward_hook(note)
    guided(inputs, Trace(after=lambda d, raw: raw.predict(raw.x, kind)), Host(one_by_one), fits=fits, call=call)
    handle.remove()
    assert all(shown) and len(shown) >= 12


@given(pictures=st.integers(2, 3), cfg_scale=st.sampled_from([1.0, 7.0]), **LAYOUTS)
def test_sag_makes_each_picture_of_a_batch_as_if_it_were_alone(pictures, cfg_scale, composed, one_by_one, fits):
    inputs = draw(composed, pictures=pictures)

    def made(part):
        patch = sag.begin(sag.SagSettings(scale=5.0), plan_of(None, UNET).run)
        return guided(part, patch, Host(one_by_one), cfg_scale, fits=fits)

    _assert_close(made(inputs), torch.cat([made(one_of(inputs, picture)) for picture in range(pictures)]))


def test_another_extensions_attention_serves_the_plain_rows_and_sees_the_hosts_rows():
    inputs, base, seen = draw(), Patcher(UNET), []

    def theirs(q, k, v, extra):
        seen.append((len(q), extra["cond_or_uncond"]))
        return torch.zeros_like(v)

    base.set_model_attn1_replace(theirs, "middle", 0)
    patch = Trace()
    guided(inputs, patch, Host(), base=base)
    assert seen == [(4, [1, 0])]
    _assert_close(patch.raw.perturbed, expected(inputs, perturbed=True)[0])
    assert not torch.allclose(patch.raw.cond, expected(inputs)[0])


def test_a_closed_patcher_does_nothing_even_if_the_host_keeps_it():
    inputs, host = draw(), Host()
    plan = plan_of(Trace(before=lambda c, u: (c * 2, u)), UNET)
    patched = PatchedUnet(Patcher(UNET), plan, host_attention=host_attention, fits=lambda *_: True)
    install_guidance(patched.patcher, patched.cell, GuidancePipeline(plan), host.calc_cond_uncond_batch)
    kept = host.sample(patched.patcher.clone(), inputs.x, inputs.cond, inputs.uncond, 7.0)
    assert torch.equal(kept, Host().sample(Patcher(UNET), inputs.x, inputs.cond, inputs.uncond, 7.0))


def _assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
