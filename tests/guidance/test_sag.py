"""SAG: recorded results of the reference, attention written out in numpy, and what it does not act on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.attention import attend
from lib_hires.attention_walk import AttentionPatches, AttentionWalk, HostLayer
from lib_hires.blur import gaussian_blur
from lib_hires.noise import NoiseSchedule
from lib_hires.run import COND, EPS, FIRST_PASS, FLOW, PERTURBED, UNCOND, Call, ModelFacts, Row, Run
from lib_hires.sites import Place, Predictions, Projections
from lib_hires.technique import Refusal, Rest
from lib_hires.techniques.guidance import pag
from lib_hires.techniques.guidance.sag import (
    COMFYUI_RADIUS,
    TECHNIQUE,
    SagSettings,
    begin,
    degraded,
    received_attention,
)
from lib_hires.topology import INPUT, MIDDLE, AttentionLayer, UNetTopology
from tests.guidance.test_attention_blocks import SD15, SDXL

SD = NoiseSchedule.scaled_linear()
M0 = AttentionLayer(MIDDLE, 0, 0)
GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "sag.npz")
CASES = json.loads(str(GOLDEN["meta"]))["cases"]


def a_run(unet=SD15, prediction=EPS):
    facts = ModelFacts("SD 1.x", (64, 64), SD, unet, prediction=prediction)
    return Run("bench", FIRST_PASS, facts, (64, 64), (14.6, 1.0, 0.0))


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Model:
    """Answers the extra evaluation, and notes what it was asked."""

    def __init__(self, answer=lambda x: 0.5 * x):
        self.answer, self.asked = answer, []

    def __call__(self, x, kind):
        self.asked.append((x, kind))
        return self.answer(x)


def recorded(patch, call, q, k, size, heads=2, kind=UNCOND, pictures=None):
    """`pictures`: whose each row is; without it each row is another picture's."""
    if patch.records(call) and patch.records_in(M0):
        rows = tuple(Row(kind, picture) for picture in (range(len(q)) if pictures is None else pictures))
        patch.record(Projections(lambda: q, lambda: k, None), Place(M0, size, heads, call, rows))


def predictions(call, model, batch=1, size=(16, 24), uncond=True):
    x, cond, base = (noise(batch, 4, *size, seed=seed) for seed in range(3))
    return Predictions(x, cond, base if uncond else None, 6.0, call, None, model)


def golden(case, name):
    return torch.from_numpy(GOLDEN[f"case_{case['case']}_{name}"])


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["agrees_with_spec"] == "yes"], ids=lambda case: case["name"]
)
def test_it_agrees_with_the_reference(case):
    p = case["parameters"]
    x, sigma, c, u, q, k, v = (golden(case, f"in_{name}") for name in ("x", "sigma", "c", "u", "q", "k", "v"))
    torch.testing.assert_close(attend(q, k, v, p["heads"]), golden(case, "out_attention"), rtol=1e-5, atol=1e-5)
    settings = SagSettings(scale=p["scale"], blur_sigma=p["blur_sigma"], comfyui_kernel=True)
    patch, call = begin(settings, a_run()), Call(1.0, 0)
    model = Model(lambda x: 0.6 * x / (1 + sigma[:, None, None, None]) - 0.05)
    rows = slice(len(x), None) if p["chunk_order"] == ["cond", "uncond"] else slice(len(x))
    recorded(patch, call, q[rows], k[rows], tuple(p["mid_size_hw"]), p["heads"])
    got = patch.after_mix(u + p["cfg_scale"] * (c - u), Predictions(x, c, u, p["cfg_scale"], call, None, model))
    [(model_input, kind)] = model.asked
    assert kind == UNCOND and patch.fired == 1
    assert_close(model_input, golden(case, "out_model_input"), case)
    assert_close(got, golden(case, "out"), case)


def test_the_true_size_is_taken_where_the_reference_guesses_another():
    [case] = [case for case in CASES if case["agrees_with_spec"] == "no"]
    p, u = case["parameters"], golden(case, "in_u")
    q, k = (golden(case, f"in_{name}")[1:] for name in "qk")
    size = tuple(p["mid_size_hw"])
    mask = received_attention(q, k, p["heads"]).unflatten(-1, size)[:, None] > 1
    spots = F.interpolate(mask.float(), size=u.shape[-2:], mode="nearest") > 0
    got = degraded(u, mask, p["blur_sigma"], COMFYUI_RADIUS)
    assert torch.equal(got, torch.where(spots, gaussian_blur(u, p["blur_sigma"], COMFYUI_RADIUS), u))
    assert (got - golden(case, "out_degraded")).abs().max() > 0.1


def assert_close(got, want, case):
    bound = case["tolerance"]["atol"] + case["tolerance"]["rtol_of_max"] * want.abs().max()
    assert got.shape == want.shape and (got - want).abs().max() <= bound


@given(
    rows=st.integers(1, 3),
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    heads=st.sampled_from([1, 2, 4]),
    chunk=st.integers(1, 400),
)
def test_received_attention_is_the_column_sum_of_the_attention_map(rows, n, m, heads, chunk):
    q, k = noise(rows, n, 8), 2 * noise(rows, m, 8, seed=1)
    got = received_attention(q, k, heads, chunk)
    assert got.shape == (rows, m) and got.dtype == torch.float32
    for row in range(rows):
        want = 0
        for qh, kh in zip(*(np.split(t[row].double().numpy(), heads, axis=1) for t in (q, k)), strict=True):
            weights = np.exp(qh @ kh.T / np.sqrt(8 // heads))
            want = want + (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0) / heads
        assert abs(got[row].numpy() - want).max() <= 1e-5 * max(1, want.max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_huge_half_precision_logits_stay_finite(dtype):
    q, k = (300 * noise(1, 15, 8, seed=seed, dtype=dtype) for seed in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = received_attention(q, k, 2)
    assert torch.equal(got, received_attention(q.float(), k.float(), 2))
    assert got.isfinite().all() and got.sum() == pytest.approx(15, rel=1e-5)


def test_no_more_than_a_chunk_of_weights_is_held(monkeypatch):
    held = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda t, dim: held.append(t.numel()) or softmax(t, dim=dim))
    received_attention(noise(3, 50, 8), noise(3, 50, 8), 2, chunk=700)
    assert max(held) == 700 and sum(held) == 3 * 2 * 50 * 50


@given(
    size=st.tuples(st.integers(1, 23), st.integers(1, 23)),
    mid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    comfyui=st.booleans(),
    uncond=st.booleans(),
    sigma=st.floats(0.1, 10),
)
def test_pictures_of_a_batch_do_not_see_each_other_at_any_size(size, mid, comfyui, uncond, sigma):
    settings = SagSettings(comfyui_kernel=comfyui, blur_sigma=sigma)
    q, k = (noise(3, mid[0] * mid[1], 8, seed=seed) for seed in (5, 6))
    raw = predictions(Call(1.0, 0), Model(), 3, size, uncond)

    def guided(pictures):
        patch, call = begin(settings, a_run()), Call(1.0, 0)
        recorded(patch, call, q[pictures], k[pictures], mid, kind=UNCOND if uncond else COND)
        base = None if raw.uncond is None else raw.uncond[pictures]
        part = Predictions(raw.x[pictures], raw.cond[pictures], base, 6.0, call, None, Model())
        return patch.after_mix(part.cond, part)

    together = guided(slice(None))
    assert together.shape == raw.cond.shape and together.isfinite().all()
    torch.testing.assert_close(together[1:2], guided(slice(1, 2)), rtol=1e-5, atol=1e-5)


def acted(patch, call, model, **kinds):
    raw = predictions(call, model, **kinds)
    out = patch.after_mix(raw.cond, raw)
    assert (out is raw.cond) == (not model.asked)
    return bool(model.asked)


def test_without_uncond_cond_takes_its_place():
    patch, call, model = begin(SagSettings(), a_run()), Call(1.0, 0), Model()
    recorded(patch, call, noise(1, 6, 8), noise(1, 6, 8, seed=1), (2, 3), kind=COND)
    assert acted(patch, call, model, uncond=False)
    assert model.asked[0][1] == COND


def test_cond_rows_of_a_separate_evaluation_do_not_stand_in_for_uncond():
    q, k = noise(1, 6, 8), noise(1, 6, 8, seed=1)
    both, uncond_only = Model(), Model()
    for model, kinds in ((both, (COND, UNCOND)), (uncond_only, (UNCOND,))):
        patch, call = begin(SagSettings(), a_run()), Call(1.0, 0)
        for kind in kinds:
            recorded(patch, call, -q if kind == COND else q, k, (2, 3), kind=kind)
        assert acted(patch, call, model)
    assert torch.equal(both.asked[0][0], uncond_only.asked[0][0])
    patch, call = begin(SagSettings(), a_run()), Call(1.0, 0)
    recorded(patch, call, q, k, (2, 3), kind=COND)
    assert not acted(patch, call, Model()), "the uncond rows never came by"


def test_nothing_is_left_for_the_next_call():
    patch, call, model = begin(SagSettings(), a_run()), Call(1.0, 0), Model()
    q, k = noise(1, 6, 8), noise(1, 6, 8, seed=1)
    assert not acted(patch, call, Model()), "nothing was recorded"
    call = Call(0.9, 1)
    recorded(patch, call, q, k, (2, 3))
    assert not acted(patch, Call(0.8, 2), Model()), "recorded in another call"
    assert not acted(patch, call, Model()), "and gone since"
    call = Call(0.7, 3)
    recorded(patch, call, q, k, (2, 3))
    assert acted(patch, call, model) and patch.fired == 1


def test_its_own_evaluation_is_not_recorded():
    patch, call = begin(SagSettings(), a_run()), Call(1.0, 0)
    q, k = noise(1, 6, 8), noise(1, 6, 8, seed=1)
    recorded(patch, call, q, k, (2, 3))
    assert acted(patch, call, Model(lambda x: recorded(patch, call, q, k, (2, 3)) or x))
    assert not acted(patch, call, Model())


@pytest.mark.parametrize("pictures", [(0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 0)], ids=str)
def test_composed_prompts_share_their_mean_map(pictures):
    q, k = noise(4, 6, 8), noise(1, 6, 8, seed=2).expand(4, -1, -1)
    patch, call, model = begin(SagSettings(), a_run()), Call(1.0, 0), Model()
    recorded(patch, call, q, k, (2, 3), kind=COND, pictures=pictures)
    assert acted(patch, call, model, batch=2, uncond=False)
    received, whose = received_attention(q, k, 2), torch.tensor(pictures)
    mean = torch.stack([received[whose == picture].mean(0) for picture in (0, 1)]).unflatten(-1, (2, 3))[:, None]
    raw = predictions(call, Model(), 2)
    want = raw.x + degraded(raw.cond, mean > 1, 2.0) - raw.cond
    torch.testing.assert_close(model.asked[0][0], want, rtol=1e-5, atol=1e-5)


def test_rows_of_one_kind_may_come_in_several_evaluations():
    q, k = noise(2, 6, 8), noise(2, 6, 8, seed=1)
    apart, together = Model(), Model()
    for model, parts in ((apart, ([1], [0])), (together, ([0, 1],))):
        patch, call = begin(SagSettings(), a_run()), Call(1.0, 0)
        for part in parts:
            recorded(patch, call, q[part], k[part], (2, 3), pictures=part)
        assert acted(patch, call, model, batch=2)
    torch.testing.assert_close(apart.asked[0][0], together.asked[0][0])


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        ([((None, None), 6, (2, 3))], "rows of which nobody tells whose they are"),
        ([((0, 0), 6, (2, 3))], "a picture without a map"),
        ([((0, 1), 5, (2, 3))], "tokens that another extension reduced"),
        ([((0, 1), 6, (2, 3)), ((0, 1), 8, (2, 4))], "regions of different sizes"),
    ],
)
def test_maps_that_belong_nowhere_are_not_used(shapes, why):
    patch, call = begin(SagSettings(), a_run()), Call(1.0, 0)
    for pictures, tokens, size in shapes:
        q, k = (noise(len(pictures), tokens, 8, seed=seed) for seed in (0, 1))
        recorded(patch, call, q, k, size, pictures=pictures)
    assert not acted(patch, call, Model(), batch=2), why
    assert patch.fired == 0


def test_a_flow_model_keeps_its_noise():
    patch, call, model = begin(SagSettings(), a_run(prediction=FLOW)), Call(0.75, 0), Model()
    q, k = noise(1, 6, 8), noise(1, 6, 8, seed=1)
    recorded(patch, call, q, k, (2, 3))
    assert acted(patch, call, model)
    raw = predictions(call, model)
    mask = received_attention(q, k, 2).unflatten(-1, (2, 3))[:, None] > 1
    noise_part = raw.x - 0.25 * raw.uncond  # 0.75 times the noise, as the model believes
    torch.testing.assert_close(model.asked[0][0], noise_part + 0.25 * degraded(raw.uncond, mask, 2.0))


@given(threshold=st.floats(0, 4))
def test_only_spots_above_the_threshold_are_blurred(threshold):
    patch, call, model = begin(SagSettings(threshold=threshold), a_run()), Call(1.0, 0), Model()
    q, k = noise(1, 96, 8), noise(1, 96, 8, seed=1)
    recorded(patch, call, q, k, (8, 12))
    assert acted(patch, call, model)
    raw = predictions(call, model)
    changed = ((model.asked[0][0] - raw.x).abs() > 1e-6).any(dim=1)[0]
    received = received_attention(q, k, 2).view(8, 12).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(changed, received > threshold)


def test_it_records_the_first_middle_layer_inside_its_window_only():
    patch = begin(SagSettings(start=0.2, end=0.8), a_run(SDXL))
    inside = Call(a_run().sigma_at(0.5), 5)
    assert [layer for layer in SDXL.attention if patch.records_in(layer)] == [M0]
    assert patch.records(inside) and not any(patch.records(Call(sigma, 0)) for sigma in (14.6, 0.03))
    assert "m0.0" in patch.describe() and "blur sigma 2" in patch.describe()


def test_together_with_pag_in_one_layer_each_does_its_part():
    rows, size = (Row(COND, 0), Row(PERTURBED, 0), Row(UNCOND, 0)), (2, 3)
    run, call = a_run(), Call(1.0, 0, sizes={(MIDDLE, 0): size}, rows=rows)
    guide, sag = pag.begin(pag.PagSettings(), run), begin(SagSettings(), run)
    q, k, v = (noise(3, 6, 8, seed=seed) for seed in range(3))
    project = lambda rows: Projections(*(lambda t=t: t[list(rows)] for t in (q, k, v)))
    plain = lambda rows: attend(*(t[list(rows)] for t in (q, k, v)), 2)
    host = HostLayer(M0, 2, 3, project, plain, changed=None, finish=lambda t: t)
    out = AttentionWalk(AttentionPatches([guide], [sag]), call).attention(host)
    torch.testing.assert_close(out[[0, 2]], attend(q, k, v, 2)[[0, 2]])
    assert torch.equal(out[1], v[1])
    x, c, u, p, r = (noise(1, 4, 16, 24, seed=seed) for seed in range(5))
    model = Model()
    raw = Predictions(x, c, u, 6.0, call, p, model)
    got = sag.after_mix(guide.after_mix(r, raw), raw)
    worse = degraded(u, received_attention(q[2:], k[2:], 2).view(1, 1, 2, 3) > 1, 2.0)
    want = r + 3.0 * (c - p) + 0.5 * (worse - 0.5 * (x + worse - u))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "unet", "kind", "words"),
    [
        (SagSettings(), None, Refusal, "not a UNet"),
        (SagSettings(), UNetTopology(1, 1, (), (AttentionLayer(INPUT, 1, 0),)), Refusal, "no self-attention"),
        (SagSettings(scale=0.0), SD15, Rest, "scale 0"),
        (SagSettings(blur_sigma=0.0), SD15, Rest, "blur sigma 0"),
    ],
)
def test_it_does_not_act_and_says_why(settings, unet, kind, words):
    with pytest.raises(kind, match=words):
        begin(settings, a_run(unet))


@pytest.mark.parametrize("name", TECHNIQUE.presets)
def test_every_preset_acts(name):
    settings = TECHNIQUE.presets[name]
    assert settings.problem() is None and begin(settings, a_run()).records(Call(14.0, 0))
