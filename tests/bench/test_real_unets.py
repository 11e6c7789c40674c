"""DeepShrink on the real UNet classes: SD 1.x, SD 2.x and SDXL block layouts, every block."""

import pytest
import torch

from lib_hires.hosts.bench.ldm_import import import_ldm
from lib_hires.hosts.bench.model import UNET_CONFIG
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import make_plan
from lib_hires.run import FIRST_PASS, Call, ModelFacts, Run
from lib_hires.techniques.unet.deep_shrink import DeepShrinkSettings
from lib_hires.topology import unet_topology
from tests.bench.conftest import refill_zero_layers

SD = NoiseSchedule.scaled_linear()
SD2 = UNET_CONFIG | {"num_heads": -1, "num_head_channels": 16, "use_linear_in_transformer": True}


def sdxl():
    """The edited SGM UNet of imaginAIry: SDXL's nine input blocks and deep transformers, in narrow."""
    from imaginairy.modules.sgm.attention import SpatialTransformer
    from imaginairy.modules.sgm.diffusionmodules import openaimodel

    openaimodel.SpatialTransformer = SpatialTransformer
    return openaimodel.UNetModel(
        in_channels=4, out_channels=4, model_channels=32, num_res_blocks=2, channel_mult=[1, 2, 4],
        attention_resolutions=[4, 2], num_head_channels=16, use_linear_in_transformer=True,
        transformer_depth=[1, 2, 3], context_dim=64, adm_in_channels=32, num_classes="sequential", use_checkpoint=False,
        spatial_transformer_attn_type="softmax",
    )  # fmt: skip


def build(family):
    torch.manual_seed(0)
    if family == "SDXL":
        return refill_zero_layers(sdxl())
    return refill_zero_layers(import_ldm().UNetModel(**(SD2 if family == "SD 2.x" else UNET_CONFIG)))


@pytest.fixture(scope="module", params=["SD 1.x", "SD 2.x", "SDXL"])
def unet(request):
    return request.param, build(request.param)


def evaluate(family, network, x):
    arguments = {"context": torch.ones(x.shape[0], 7, 64)}
    if family == "SDXL":
        arguments["y"] = torch.ones(x.shape[0], 32)
    with torch.inference_mode():
        return network(x, timesteps=torch.full((x.shape[0],), 900.0), **arguments)


def test_every_block_of_the_family(unet):
    family, network = unet
    topology = unet_topology(network)
    assert topology.input_blocks == {"SDXL": 9}.get(family, 12)
    assert topology.downsamplers == {"SDXL": (3, 6)}.get(family, (3, 6, 9))
    x = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    plain = evaluate(family, network, x)
    run = Run("test", FIRST_PASS, ModelFacts(family, (8, 8), SD, topology), (16, 24), (14.6, 0.0))
    for block in range(1, topology.input_blocks):
        for after_skip in (True, False):
            plan = make_plan({"deep_shrink": DeepShrinkSettings(block=block, after_skip=after_skip)}, run)
            call = Call(14.0, 0)
            with HookedUnet(network, plan).open(call):
                out = evaluate(family, network, x)
            assert out.shape == plain.shape and out.isfinite().all()
            acted = plan.patches["deep_shrink"].fired > 0
            assert torch.equal(out, plain) != acted, (block, after_skip)
    assert torch.equal(evaluate(family, network, x), plain)


def test_a_block_that_the_family_does_not_have_is_refused_with_the_range(unet):
    family, network = unet
    topology = unet_topology(network)
    run = Run("test", FIRST_PASS, ModelFacts(family, (8, 8), SD, topology), (16, 24), (14.6, 0.0))
    plan = make_plan({"deep_shrink": DeepShrinkSettings(block=topology.input_blocks)}, run)
    assert f"set Block number to 1 to {topology.input_blocks - 1}" in plan.refused["DeepShrink"]
