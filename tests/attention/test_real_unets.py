"""The attention techniques on the real UNet classes: SD 1.x, SD 2.x and SDXL block layouts."""

import pytest
import torch

from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.plan import Plan
from lib_hires.run import Call
from lib_hires.techniques.attention import near_sighted_attention, near_sighted_tile, scale_fusion, slothful
from lib_hires.techniques.attention.near_sighted_attention import NearSightedAttentionSettings
from lib_hires.techniques.attention.near_sighted_tile import NearSightedTileSettings
from lib_hires.techniques.attention.scale_fusion import NEIGHBOURHOOD, ScaleFusionSettings
from lib_hires.techniques.attention.slothful import SlothfulSettings
from lib_hires.topology import unet_topology
from tests.attention.oracle import a_run, sigma_at
from tests.bench.test_real_unets import build, evaluate

ALL = [
    (slothful, SlothfulSettings()),
    (near_sighted_tile, NearSightedTileSettings(base_tile_size=8, peak_tile_size=8)),
    (near_sighted_attention, NearSightedAttentionSettings(base_tile_size=8, peak_tile_size=8)),
    (scale_fusion, ScaleFusionSettings()),
    (scale_fusion, ScaleFusionSettings(mode=NEIGHBOURHOOD)),
]


@pytest.mark.parametrize("family", ["SD 1.x", "SD 2.x", "SDXL"])
def test_every_family(family):
    network = build(family)
    topology = unet_topology(network)
    x = torch.randn(1, 4, 32, 40, generator=torch.Generator().manual_seed(1))
    plain = evaluate(family, network, x)
    run = a_run(latent=(32, 40), native=(16, 16), unet=topology)
    for module, settings in ALL:
        patch = module.begin(settings, run)
        with HookedUnet(network, Plan(run, patches={"x": patch})).open(Call(sigma_at(run, 0.4), 0)):
            out = evaluate(family, network, x)
        assert out.shape == plain.shape and out.isfinite().all(), module
        assert patch.fired > 0 and not torch.equal(out, plain), module
    assert torch.equal(evaluate(family, network, x), plain)
