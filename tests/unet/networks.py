"""Real UNet classes with the widths of SD 1.x, SD 2.x and SDXL, at a tenth; and plans for one technique."""

import functools

import torch

from lib_hires.hosts.bench.ldm_import import import_ldm
from lib_hires.hosts.bench.model import UNET_CONFIG
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan
from lib_hires.run import FIRST_PASS, ModelFacts, Run
from lib_hires.topology import unet_topology
from tests.bench.conftest import refill_zero_layers
from tests.bench.test_real_unets import SD2, sdxl

SD = NoiseSchedule.scaled_linear()
FAMILIES = ("SD 1.x", "SD 2.x", "SDXL")
WIDTH = 32
SD_WIDTHS = {"model_channels": WIDTH, "channel_mult": [1, 2, 4, 4]}
EARLY, LATE = 14.0, 0.05


@functools.cache
def network(family):
    """Do not change it: tests share it."""
    torch.manual_seed(0)
    if family == "SDXL":
        return refill_zero_layers(sdxl())
    config = UNET_CONFIG if family == "bench" else (SD2 if family == "SD 2.x" else UNET_CONFIG) | SD_WIDTHS
    return refill_zero_layers(import_ldm().UNetModel(**config))


@functools.cache
def topology(family):
    return unet_topology(network(family))


def a_run(family="SD 1.x", latent=(128, 128), native=(64, 64), unet=None, sigma_first=SD.sigma_max):
    sigmas = tuple(SD.sigma(SD.timestep(sigma_first) * (1 - i / 20)) for i in range(20))
    return Run("test", FIRST_PASS, ModelFacts(family, native, SD, unet or topology(family)), latent, sigmas)


def without_unet():
    return Run("test", FIRST_PASS, ModelFacts("SD3", (128, 128), SD, None), (256, 256), (14.6, 0.0))


def planned(technique, settings, run):
    return Plan(run, {technique.name: technique.begin(settings, run)})
