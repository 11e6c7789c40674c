"""PAG and SEG against diffusers: its blur of queries, its identity attention and its combinations."""

import math

import pytest
import torch
from diffusers.guiders import PerturbedAttentionGuidance, SmoothedEnergyGuidance
from diffusers.hooks.smoothed_energy_guidance_utils import _gaussian_blur_2d
from diffusers.models.attention_processor import Attention, PAGIdentitySelfAttnProcessor2_0

from lib_hires.attention import attend
from lib_hires.attention_walk import AttentionPatches, AttentionWalk, HostLayer
from lib_hires.run import COND, PERTURBED, Call, Row
from lib_hires.sites import Projections
from lib_hires.techniques.guidance.pag import PagSettings, begin, smoothed_attention
from lib_hires.topology import MIDDLE
from tests.guidance.test_pag import M0, a_run, noise, raw


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.0])
def test_blurred_queries(sigma):
    q, k, v = (noise(2, 19 * 19, 8, seed=seed) for seed in range(3))
    taps = 2 * math.ceil(3 * sigma) + 1
    # this release tells the two branches of its blur apart the wrong way round; -1 leads to the Gaussian one
    blurred = _gaussian_blur_2d(q.clone(), taps, sigma, -1)
    got = smoothed_attention(q, k, v, 2, (19, 19), sigma)
    assert (got - attend(blurred, k, v, 2)).abs().max() <= 1e-5


def test_mean_queries():
    q, k, v = (noise(2, 36, 8, seed=seed) for seed in range(3))
    mean = _gaussian_blur_2d(q.clone(), 3, 1.0, math.inf)
    torch.testing.assert_close(smoothed_attention(q, k, v, 2, (6, 6), math.inf), attend(mean, k, v, 2))


@torch.no_grad()
def test_identity_attention_of_the_perturbed_rows():
    torch.manual_seed(0)
    layer = Attention(query_dim=8, heads=2, dim_head=4)
    x = noise(4, 15, 8)
    layer.set_processor(PAGIdentitySelfAttnProcessor2_0())
    want = layer(x)  # it perturbs the second half of a batch
    patch = begin(PagSettings(), a_run())
    call = Call(
        1.0, 0, sizes={(MIDDLE, 0): (3, 5)}, rows=tuple(Row(kind) for kind in (COND, COND, PERTURBED, PERTURBED))
    )

    def project(rows):
        part = x[list(rows)]
        return Projections(lambda: layer.to_q(part), lambda: layer.to_k(part), lambda: layer.to_v(part))

    def plain(rows):
        p = project(rows)
        return layer.to_out[0](attend(p.q, p.k, p.v, 2))

    host = HostLayer(M0, 2, 4, project, plain, changed=None, finish=layer.to_out[0])
    got = AttentionWalk(AttentionPatches([patch]), call).attention(host)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["pag", "seg"])
def test_the_combination(kind):
    c, u, p = (noise(2, 4, 9, 7, seed=seed) for seed in range(3))
    if kind == "pag":
        guider = PerturbedAttentionGuidance(
            7.5, perturbed_guidance_scale=2.8, perturbed_guidance_layers=[0], perturbed_guidance_start=0.0,
            perturbed_guidance_stop=1.0,
        )  # fmt: skip
    else:
        guider = SmoothedEnergyGuidance(
            7.5, seg_guidance_scale=2.8, seg_guidance_layers=[0], seg_guidance_start=0.0, seg_guidance_stop=1.0
        )
    guider.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(500))
    want = guider.forward(c, u, p).pred
    patch = begin(PagSettings(scale=2.8), a_run())
    torch.testing.assert_close(patch.after_mix(u + 7.5 * (c - u), raw(c, u, p)), want, rtol=1e-5, atol=1e-5)
