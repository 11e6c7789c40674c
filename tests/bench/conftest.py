"""An untrained bench: same classes, same sizes, random weights. Enough for everything that is not about pictures."""

import pytest
import torch

from lib_hires.hosts.bench.model import BenchModels, Vae, alphas_cumprod, build_autoencoder, build_unet
from lib_hires.hosts.bench.pipeline import Bench
from lib_hires.hosts.bench.text import TextEncoder


def refill_zero_layers(module: torch.nn.Module) -> torch.nn.Module:
    """A fresh LDM UNet returns exactly 0 from its zero-initialised layers, and a test on it would prove nothing."""
    for parameter in module.parameters():
        if parameter.dim() >= 2 and not parameter.detach().abs().max():
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def bench() -> Bench:
    torch.manual_seed(0)
    models = BenchModels(
        refill_zero_layers(build_unet()), Vae(build_autoencoder().eval(), 1.0), TextEncoder(), alphas_cumprod()
    )
    return Bench(models)


@pytest.fixture(autouse=True)
def forget_callback(bench: Bench):
    yield
    bench.after_call = lambda step, of: None
