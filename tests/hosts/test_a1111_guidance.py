"""Guidance at A1111's CFG denoiser: rows, branches, composed prompts, both sampler families. The stand-in denoiser goes
through the same rows and branches as the host's; what it should predict is computed row by row beside it."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib_hires.guidance import GuidancePipeline
from lib_hires.hosts.a1111_guidance import DenoisedSpace, EpsSpace, GuidedCall
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.run import COND, UNCOND, Call
from lib_hires.techniques.guidance import sag
from tests.hosts.toy import ToyUNet, Trace, identity_attention, plan_of

UNET = ToyUNet().eval().requires_grad_(False)
SIGMA = 2.0


@pytest.fixture(autouse=True, scope="module")
def host_modules():
    shared = ModuleType("modules.shared")
    shared.sd_model = SimpleNamespace(model=SimpleNamespace(conditioning_key="crossattn"))
    package = ModuleType("modules")
    package.shared = shared
    before = {name: sys.modules.get(name) for name in ("modules", "modules.shared")}
    sys.modules |= {"modules": package, "modules.shared": shared}
    yield
    for name, module in before.items():
        sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)


class Denoiser(nn.Module):
    """The host's way from a noisy latent to a guided result. `eps`: it returns noise and takes VP latents."""

    def __init__(self, weights, skip_uncond=False, batch_all=True, eps=False):
        super().__init__()
        self.weights, self.skip_uncond, self.batch_all, self.eps = weights, skip_uncond, batch_all, eps
        self.callback = lambda params: None
        prompts = [[SimpleNamespace(weight=weight) for _, weight in members] for members in weights]
        self.sampler = SimpleNamespace(sampler_extra_args={"cond": SimpleNamespace(batch=prompts)})

    def inner_model(self, x, sigma, cond):
        out = UNET(x, cond["c_crossattn"][0], cond["c_concat"][0])
        return (x * (1 + SIGMA**2) ** 0.5 - out) / SIGMA if self.eps else out

    def combine_denoised(self, x_out, conds_list, uncond, cond_scale):
        plain = x_out[-uncond.shape[0] :]
        mixed = plain.clone()
        for picture, members in enumerate(conds_list):
            for row, weight in members:
                mixed[picture] += (x_out[row] - plain[picture]) * (weight * cond_scale)
        return mixed

    def forward(self, x, text, negative, image, scale):
        batch, repeats = len(x), [len(members) for members in self.weights]
        rows = [i for i, n in enumerate(repeats) for _ in range(n)] + list(range(batch))
        sigma = torch.full((len(rows),), SIGMA)
        params = SimpleNamespace(
            x=x[rows], image_cond=image[rows], sigma=sigma, text_cond=text, text_uncond=negative, denoiser=self
        )
        self.callback(params)
        x_in, image_in, sigma = params.x, params.image_cond, params.sigma
        text, negative = params.text_cond, params.text_uncond
        if self.skip_uncond:
            x_in, sigma = x_in[:-batch], sigma[:-batch]
        run = lambda a, b, c: self.inner_model(x_in[a:b], sigma[a:b], {"c_crossattn": [c], "c_concat": [image_in[a:b]]})
        if text.shape[1] == negative.shape[1] or self.skip_uncond:
            every = text if self.skip_uncond else torch.cat([text, negative])
            size = len(x_in) if self.batch_all else batch
            parts = [run(a, a + size, every[a : a + size]) for a in range(0, len(x_in), size)]
            x_out = torch.cat(parts)
        else:
            size = batch * 2 if self.batch_all else batch
            ends = [(a, min(a + size, len(text))) for a in range(0, len(text), size)]
            x_out = torch.cat([run(a, b, text[a:b]) for a, b in ends] + [run(len(text), len(x_in), negative)])
        if self.skip_uncond:
            x_out = torch.cat([x_out, torch.cat([x_out[m[0][0]][None] for m in self.weights])])
        return self.combine_denoised(x_out, self.weights, negative, 1.0 if self.skip_uncond else scale)


def draw(pictures, composed, seed=0, tokens=3, negative_tokens=3, counts=None):
    """A batch: per picture one or more prompts with weights."""
    g = torch.Generator().manual_seed(seed)
    weights, row = [], 0
    for count in counts or [1 + (picture + composed) % 2 if composed else 1 for picture in range(pictures)]:
        weights.append([(row + i, [1.0, 0.7, 1.2][i] if count > 1 or composed else 1.0) for i in range(count)])
        row += count
    return SimpleNamespace(
        x=torch.randn(pictures, 4, 8, 6, generator=g) * SIGMA,
        text=torch.randn(row, tokens, 5, generator=g),
        negative=torch.randn(pictures, negative_tokens, 5, generator=g),
        image=torch.randn(pictures, 4, 8, 6, generator=g) * 0.1,
        weights=weights,
    )


def guided(inputs, patch, scale=7.0, may_skip=True, call=None, told=True, **kwargs):
    """One call through the stand-in denoiser with a patch. Not `told`: nobody knows whose the rows are."""
    denoiser = Denoiser(inputs.weights, **kwargs)
    if not told:
        del denoiser.sampler
    eps = kwargs.get("eps", False)
    call, stack, hooks = call or Call(SIGMA, 0), [], len(UNET._forward_pre_hooks)

    def callback(params):
        plan = plan_of(patch, UNET)
        unet = HookedUnet(UNET, plan).open(call)
        pipeline = GuidancePipeline(plan)
        guide = GuidedCall(pipeline, params, call, EpsSpace(SIGMA) if eps else DenoisedSpace(), may_skip).open(UNET)
        for context in (unet, guide):
            context.__enter__()
            stack.append(context)

    denoiser.callback = callback
    out = denoiser(model_input(inputs.x, eps), inputs.text, inputs.negative, inputs.image, scale)
    for context in reversed(stack):
        context.__exit__(None, None, None)
    assert "combine_denoised" not in vars(denoiser) and len(UNET._forward_pre_hooks) == hooks
    return inputs.x - SIGMA * out if eps else out


def one_of(inputs, picture):
    """One picture of a batch, as a batch of its own."""
    one, (rows, weights) = slice(picture, picture + 1), zip(*inputs.weights[picture], strict=True)
    return SimpleNamespace(
        x=inputs.x[one],
        text=inputs.text[list(rows)],
        negative=inputs.negative[one],
        image=inputs.image[one],
        weights=[list(enumerate(weights))],
    )


def model_input(x, eps):
    """A noisy latent as the sampler family has it: VE, or VP."""
    return x / (1 + SIGMA**2) ** 0.5 if eps else x


def expected(inputs, perturbed=False, eps=False):
    """(cond, uncond) as weighted means, one row at a time."""
    inputs = SimpleNamespace(**{**vars(inputs), "x": model_input(inputs.x, eps)})
    predict = identity_attention if perturbed else (lambda unet, *args: unet(*args))
    conds = []
    for i, members in enumerate(inputs.weights):
        one = lambda row, i=i: predict(UNET, inputs.x[i : i + 1], inputs.text[row : row + 1], inputs.image[i : i + 1])
        conds.append(sum(one(row) * w for row, w in members) / sum(w for _, w in members))
    return torch.cat(conds), UNET(inputs.x, inputs.negative, inputs.image)


LAYOUTS = {
    "pictures": st.integers(1, 3),
    "composed": st.booleans(),
    "batch_all": st.booleans(),
    "long_prompt": st.booleans(),
    "eps": st.booleans(),
}


def inputs_of(pictures, composed, long_prompt, seed=0):
    return draw(pictures, composed, seed, tokens=5 if long_prompt else 3)


@given(**LAYOUTS)
def test_raw_predictions_are_those_of_every_single_row(pictures, composed, batch_all, long_prompt, eps):
    inputs = inputs_of(pictures, composed, long_prompt)
    patch = Trace()
    guided(inputs, patch, batch_all=batch_all, eps=eps)
    cond, uncond = expected(inputs, eps=eps)
    _assert_close(patch.raw.x, inputs.x)
    _assert_close(patch.raw.cond, cond)
    _assert_close(patch.raw.uncond, uncond)
    _assert_close(patch.raw.perturbed, expected(inputs, perturbed=True, eps=eps)[0])
    strengths = torch.tensor([sum(w for _, w in members) for members in inputs.weights])
    _assert_close(torch.as_tensor(patch.raw.scale).flatten().expand(pictures), 7.0 * strengths)


@given(**LAYOUTS)
def test_a_patch_that_does_nothing_changes_no_bit_of_the_mix(pictures, composed, batch_all, long_prompt, eps):
    inputs = inputs_of(pictures, composed, long_prompt)
    plain = Denoiser(inputs.weights, batch_all=batch_all, eps=eps)
    want = plain(model_input(inputs.x, eps), inputs.text, inputs.negative, inputs.image, 7.0)
    want = inputs.x - SIGMA * want if eps else want
    assert torch.equal(guided(inputs, Trace(perturbed=False), batch_all=batch_all, eps=eps), want)


@given(eps=st.booleans(), composed=st.booleans())
def test_changed_predictions_are_mixed_by_the_host(eps, composed):
    inputs = draw(2, composed)
    cond, uncond = expected(inputs, eps=eps)
    strengths = torch.tensor([sum(w for _, w in members) for members in inputs.weights])[:, None, None, None]
    want = uncond / 2 + 7.0 * strengths * (cond * 2 - uncond / 2)
    _assert_close(guided(inputs, Trace(before=lambda c, u: (c * 2, u / 2)), eps=eps), want)


def test_timestep_samplers_and_k_diffusion_give_the_same_mathematics():
    """The same x0 predictions, handed over once as x0 at VE latents and once as eps at VP latents."""
    g = torch.Generator().manual_seed(3)
    x, cond, uncond, p = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(4))
    x = x * SIGMA
    results = []
    for space in (DenoisedSpace(), EpsSpace(SIGMA)):
        host_x = space.model_input(x)
        patch = Trace(before=lambda c, u: (c * 1.5, u * 0.5), after=lambda d, raw: d * 0.9 + raw.cond - raw.perturbed)
        plan = plan_of(patch, UNET)
        negative = torch.zeros(2, 3, 5)
        denoiser = Denoiser([[(0, 1.0)], [(1, 1.0)]])
        params = SimpleNamespace(
            x=torch.cat([host_x, host_x]), image_cond=torch.zeros(4, 1), sigma=torch.zeros(4),
            text_cond=negative, text_uncond=negative, denoiser=denoiser,
        )  # fmt: skip
        call = GuidedCall(GuidancePipeline(plan), params, Call(SIGMA, 0), space, may_skip_uncond=True)
        with call.open(UNET):
            call._rows.note(UNET, (params.x,))
            rows = torch.cat([space.output(x, one) for one in (cond, p, uncond)])
            out = denoiser.combine_denoised(rows, denoiser.weights, negative, 7.0)
        results.append(space.denoised(x, out))
    _assert_close(results[0], results[1])
    want = (uncond * 0.5 + 7 * (cond * 1.5 - uncond * 0.5)) * 0.9 + cond - p
    _assert_close(results[0], want)


@given(composed=st.booleans(), batch_all=st.booleans(), perturbed=st.booleans())
def test_a_step_without_uncond_is_told_from_the_rows_that_were_evaluated(composed, batch_all, perturbed):
    inputs = draw(2, composed)
    patch = Trace(perturbed=perturbed)
    out = guided(inputs, patch, skip_uncond=True, batch_all=batch_all)
    assert patch.raw.uncond is None
    _assert_close(patch.raw.cond, expected(inputs)[0])
    plain = Denoiser(inputs.weights, skip_uncond=True, batch_all=batch_all)
    want = plain(inputs.x, inputs.text, inputs.negative, inputs.image, 7.0)
    _assert_close(out, want)


@given(composed=st.booleans(), batch_all=st.booleans(), long_prompt=st.booleans(), perturbed=st.booleans())
def test_skipping_uncond_evaluates_no_uncond_row(composed, batch_all, long_prompt, perturbed):
    inputs = inputs_of(2, composed, long_prompt)
    rows = []
    handle = UNET.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    patch = Trace(perturbed=perturbed, skip=True)
    out = guided(inputs, patch, batch_all=batch_all)
    handle.remove()
    assert sum(rows) == len(inputs.text) * (2 if perturbed else 1)
    cond = expected(inputs)[0]
    _assert_close(patch.raw.cond, cond)
    assert patch.raw.uncond is None
    _assert_close(out, cond)


def test_a_host_that_needs_uncond_evaluates_it_and_still_there_is_no_guidance():
    inputs, patch, rows = draw(2, False), Trace(perturbed=False, skip=True), []
    handle = UNET.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    out = guided(inputs, patch, may_skip=False)
    handle.remove()
    assert rows == [4] and patch.raw.uncond is None
    _assert_close(out, expected(inputs)[0])


@given(kind=st.sampled_from([COND, UNCOND]), composed=st.booleans(), eps=st.booleans())
def test_one_more_evaluation_uses_the_prompts_it_was_asked_for(kind, composed, eps):
    inputs = draw(2, composed)
    other = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(9))
    patch = Trace(after=lambda d, raw: raw.predict(other, kind))
    out = guided(inputs, patch, eps=eps)
    moved = SimpleNamespace(**{**vars(inputs), "x": other})
    _assert_close(out, expected(moved, eps=eps)[0 if kind == COND else 1])


def test_only_uncond_rows_are_recorded():
    inputs, patch = draw(2, True), Trace()
    guided(inputs, patch)
    assert [(len(q), size) for q, size in patch.recorded] == [(2, (8, 6))]


@given(composed=st.booleans(), batch_all=st.booleans(), long_prompt=st.booleans(), kind=st.sampled_from([COND, UNCOND]))
def test_every_row_tells_whose_it_is(composed, batch_all, long_prompt, kind):
    inputs, call, shown = inputs_of(3, composed, long_prompt), Call(SIGMA, 0), []

    def note(_, args, __):
        for x, row in zip(args[0], call.rows, strict=True):
            shown.append(torch.equal(x, inputs.x[row.picture]))

    handle = UNET.register_forward_hook(note)
    guided(inputs, Trace(after=lambda d, raw: raw.predict(raw.x, kind)), call=call, batch_all=batch_all)
    handle.remove()
    assert all(shown) and len(shown) > 9


COUNTS = [(1, 1, 1), (2, 2), (3, 3, 3), (2, 1), (1, 3), (1, 2, 3), (3, 1, 2)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@given(way=st.sampled_from(["CFG", "skipped by the host", "1"]), batch_all=st.booleans(), long_prompt=st.booleans())
def test_sag_makes_each_picture_of_a_batch_as_if_it_were_alone(counts, way, batch_all, long_prompt):
    inputs = draw(len(counts), True, tokens=5 if long_prompt else 3, counts=counts)
    layout = {"skip_uncond": way == "skipped by the host", "batch_all": batch_all, "scale": 1.0 if way == "1" else 7.0}
    patch = lambda: sag.begin(sag.SagSettings(scale=5.0), plan_of(None, UNET).run)
    together = guided(inputs, patch(), **layout)
    alone = [guided(one_of(inputs, picture), patch(), **layout) for picture in range(len(counts))]
    _assert_close(together, torch.cat(alone))


@given(composed=st.booleans(), skip_uncond=st.booleans())
def test_where_nobody_tells_whose_rows_of_several_prompts_are_sag_rests(composed, skip_uncond):
    inputs, patch = draw(2, composed), sag.begin(sag.SagSettings(), plan_of(None, UNET).run)
    out = guided(inputs, patch, told=False, skip_uncond=skip_uncond)
    plain = Denoiser(inputs.weights, skip_uncond=skip_uncond)(inputs.x, inputs.text, inputs.negative, inputs.image, 7.0)
    assert torch.equal(out, plain) == (composed and skip_uncond) == (not patch.fired)


def test_sdxl_conditions_carry_all_their_parts():
    class Text(dict):
        @property
        def shape(self):
            return self["crossattn"].shape

    text = Text(crossattn=torch.randn(2, 3, 5), vector=torch.randn(2, 7))
    params = SimpleNamespace(
        x=torch.randn(3, 4, 8, 8), image_cond=torch.zeros(3, 1), sigma=torch.zeros(3), text_cond=text,
        text_uncond=Text(crossattn=torch.randn(1, 3, 5), vector=torch.randn(1, 7)), denoiser=Denoiser([]),
    )  # fmt: skip
    GuidedCall(GuidancePipeline(plan_of(Trace(skip=True), UNET)), params, Call(SIGMA, 0), DenoisedSpace(), True)
    assert type(params.text_cond) is Text and params.text_cond["vector"].shape == (4, 7)
    assert torch.equal(params.text_cond["crossattn"][2:], text["crossattn"])
    assert len(params.x) == 4 and params.text_uncond["vector"].shape == (0, 7)


def _assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
