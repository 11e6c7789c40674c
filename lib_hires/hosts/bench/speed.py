"""UNet time with and without a technique, alternating in one process, beside the bound that the operations allow.

    ./dev speed

The network has SD 1.5's block layout and channel proportions at 0.4 of its width (the trained bench model is flatter,
and its deep blocks weigh less). Times are minima over interleaved repeats on one thread. The bound is counted on the
very same network: floating-point operations without the technique divided by those with it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib_hires.hosts.bench import webui_ldm
from lib_hires.hosts.bench.model import LATENT_FACTOR, NATIVE_SIZE, UNET_CONFIG, build_unet
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import make_plan
from lib_hires.registry import BY_NAME
from lib_hires.run import FIRST_PASS, Call, ModelFacts, Run
from lib_hires.settings import Settings, read_settings
from lib_hires.topology import unet_topology

SD15_PROPORTIONS = UNET_CONFIG | {"model_channels": 128, "channel_mult": [1, 2, 4, 4], "num_heads": 4}
NATIVE = NATIVE_SIZE // LATENT_FACTOR
CASES: tuple[tuple[str, int, str, dict], ...] = (
    ("DeepShrink, block 3, factor 2", 2, "deep_shrink", {}),
    ("DeepShrink, block 4, factor 2", 2, "deep_shrink", {"block": 4}),
    ("DeepShrink, block 3, factor 2", 4, "deep_shrink", {}),
    ("DeepShrink, block 3, factor 4", 4, "deep_shrink", {"factor": 4.0}),
)

HEAD = "one UNet evaluation, batch 2       latent  plain s   with s  ratio  bound  reached"
Patched = Callable[[], AbstractContextManager[None]]


class Setup:
    """One UNet and one input at `scale` times the native size, cond and uncond in one batch."""

    def __init__(self, scale: int) -> None:
        torch.manual_seed(0)
        unet: Any = build_unet(SD15_PROPORTIONS)
        self.unet = unet.eval().requires_grad_(False)
        webui_ldm.install()
        side = NATIVE * scale
        self.latent = (side, side)
        self.x = torch.randn(2, 4, side, side)
        self.t = torch.full((2,), 900.0)
        self.context = torch.randn(2, 77, self.unet.input_blocks[1][1].transformer_blocks[0].attn2.to_k.in_features)

    @torch.inference_mode()
    def evaluate(self, patched: Patched) -> Tensor:
        with patched():
            return self.unet(self.x, self.t, context=self.context)

    def operations(self, patched: Patched) -> int:
        # the counter knows matrix products, not the fused attention kernel of every device
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.evaluate(patched)
        return counter.get_total_flops()

    def with_technique(self, name: str, settings: Settings) -> Patched:
        schedule = NoiseSchedule.scaled_linear()
        facts = ModelFacts("SD 1.x (bench)", (NATIVE, NATIVE), schedule, unet_topology(self.unet))
        run = Run("bench", FIRST_PASS, facts, self.latent, (schedule.sigma_max, 0.0))
        unet = HookedUnet(self.unet, make_plan({name: settings}, run))

        @contextmanager
        def patched() -> Iterator[None]:
            with unet.open(Call(schedule.sigma_max, 0)):
                yield

        return patched


def best_times(setup: Setup, variants: Sequence[Patched], repeats: int) -> list[float]:
    """The fastest of interleaved repeats for each variant, in seconds."""
    best = [float("inf")] * len(variants)
    for _ in range(repeats):
        for number, patched in enumerate(variants):
            started = time.perf_counter()
            setup.evaluate(patched)
            best[number] = min(best[number], time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="./dev speed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=4)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(HEAD)
    for title, scale, name, changes in CASES:
        _print_case(title, Setup(scale), name, read_settings(BY_NAME[name].settings, changes)[0], repeats)
    setup = Setup(2)
    plain, off = best_times(setup, [nullcontext, setup.with_technique("deep_shrink", _never())], repeats * 3)
    print(f"\nhooks on, nothing to do (outside the window): {off / plain:.4f} of the plain time")


def _print_case(title: str, setup: Setup, name: str, settings: Settings, repeats: int) -> None:
    patched = setup.with_technique(name, settings)
    plain, with_it = best_times(setup, [nullcontext, patched], repeats)
    ratio, bound = plain / with_it, setup.operations(nullcontext) / setup.operations(patched)
    reached = (1 - 1 / ratio) / (1 - 1 / bound)
    side = setup.latent[0]
    print(f"{title:32} {f'{side}x{side}':>8} {plain:8.3f} {with_it:8.3f} {ratio:6.2f} {bound:6.2f} {reached:8.0%}")


def _never() -> Settings:
    """On, but with a window that begins after the first step."""
    settings, _ = read_settings(BY_NAME["deep_shrink"].settings, {"start": 0.5, "end": 0.6, "gradual": 0.6})
    return settings


if __name__ == "__main__":
    main()
