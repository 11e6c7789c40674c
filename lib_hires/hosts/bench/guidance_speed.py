"""What guidance costs, alternating in one process, beside one UNet evaluation of SD 1.5's layout.

    ./dev guidance-speed

Modifiers are timed by themselves (their share of an evaluation with cond and uncond is far below what two timings of
it would differ by), those of the hires pass with a reference; PAG as rows of the same evaluation and as an evaluation
of its own; TCFG's closed form beside the singular value decomposition that it replaces. Times are minima over
interleaved repeats on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lib_hires.guidance import GuidancePipeline
from lib_hires.hosts.bench import webui_ldm
from lib_hires.hosts.bench.model import UNET_CONFIG, build_unet
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan, make_plan
from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.run import COND, EPS, HIRES_PASS, PERTURBED, UNCOND, Call, ModelFacts, Row, Run, Start
from lib_hires.samplers import Sampler
from lib_hires.sites import NoisyLatent, PerturbedAttention, Predictions, RecordedAttention
from lib_hires.techniques.guidance.tcfg import damped_uncond
from lib_hires.topology import unet_topology

WIDTH_64 = UNET_CONFIG | {"model_channels": 64, "channel_mult": [1, 2, 4, 4], "num_heads": 8}
LATENT = (64, 64)
SIGMA = 2.0
SCHEDULE = NoiseSchedule.scaled_linear()
# what the techniques of the hires pass cost in their several forms, each acting at SIGMA
HIRES_CASES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "mixing, noisy latent": ("iterative_mixing", {"space": "Latent"}),
    "mixing, denoised": ("iterative_mixing", {"space": "Denoised"}),
    "mixing, detail map": ("iterative_mixing", {"space": "Latent", "detail": "Automatic"}),
    "mixing, slerp": ("iterative_mixing", {"space": "Latent", "function": "Slerp"}),
    "low-band lock, Haar": ("low_band_lock", {"end": 1.0}),
    "low-band lock, Gaussian": ("low_band_lock", {"end": 1.0, "filter": "Gaussian"}),
}


def fastest(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The shortest of interleaved runs of every variant, in seconds."""
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(repeats):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


class Setup:
    """A UNet of SD 1.5's layout, one picture with cond and uncond, and plans of single techniques."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        webui_ldm.install()
        unet: Any = build_unet(WIDTH_64)
        self.unet = unet.eval().requires_grad_(False)
        self.x = torch.randn(1, 4, *LATENT)
        self.context = torch.randn(3, 77, self.unet.input_blocks[1][1].transformer_blocks[0].attn2.to_k.in_features)

    def plan(self, name: str, **changes: object) -> Plan:
        facts = ModelFacts("SD 1.x (bench)", LATENT, SCHEDULE, unet_topology(self.unet), prediction=EPS)
        levels = tuple(SCHEDULE.sigma(999 * (1 - i / 20)) for i in range(20))
        start = Start(torch.randn_like(self.x), torch.randn_like(self.x))
        run = Run("bench", HIRES_PASS, facts, LATENT, levels, sampler=Sampler("sample_euler"), start=start)
        return make_plan({name: replace(BY_NAME[name].settings(), **changes)}, run)

    def evaluate(self, kinds: tuple[str, ...], unet: HookedUnet | None = None) -> Tensor:
        rows = len(kinds)
        x, t, context = self.x.expand(rows, -1, -1, -1), torch.full((rows,), 400.0), self.context[:rows]
        if unet is None:
            return self.unet(x, t, context=context)
        call = Call(SIGMA, 0, rows=tuple(Row(kind, 0) for kind in kinds))
        with unet.open(call):
            return self.unet(x, t, context=context)

    def modifier(self, name: str, **changes: object) -> Callable[[], Tensor]:
        """One technique at the noisy latent and in the guidance pipeline, on predictions at unit scale."""
        plan = self.plan(name, **changes)
        pipeline, latent_patches = GuidancePipeline(plan), plan.at(NoisyLatent)
        cond, uncond = torch.randn_like(self.x), torch.randn_like(self.x)
        call = Call(SIGMA, 0)
        raw = Predictions(self.x * SIGMA, cond, uncond, 7.0, call, None, lambda x, kind: x)

        def mix(cond: Tensor, uncond: Tensor) -> Tensor:
            return uncond + 7.0 * (cond - uncond)

        def act() -> Tensor:
            for patch in latent_patches:
                patch.before_call(raw.x, call)
            return pipeline.guide(raw, mix(cond, uncond), mix)

        act()
        assert plan.patches and not plan.unfired(), f"{name} does not act: {plan.report()}"
        return act


def print_modifiers(setup: Setup, repeats: int) -> None:
    names = [
        technique.name
        for technique in TECHNIQUES
        if technique.family == "Guidance"
        and not any(
            isinstance(p, PerturbedAttention | RecordedAttention) for p in setup.plan(technique.name).patches.values()
        )
    ]
    variants: dict[str, Callable[[], object]] = {BY_NAME[name].title: setup.modifier(name) for name in names}
    variants |= {title: setup.modifier(name, **changes) for title, (name, changes) in HIRES_CASES.items()}
    times = fastest(variants, 20 * repeats)
    whole = fastest({"evaluation": lambda: setup.evaluate((COND, UNCOND))}, repeats)["evaluation"]
    print(f"one evaluation, cond and uncond, latent {LATENT[1]}x{LATENT[0]}, width 64: {whole:.3f} s")
    for name, seconds in times.items():
        print(f"  {name:24} {seconds * 1e3:7.3f} ms  {seconds / whole:7.3%} of it")


def print_perturbed(setup: Setup, repeats: int) -> None:
    unet = HookedUnet(setup.unet, setup.plan("pag"))

    def apart() -> None:
        setup.evaluate((COND, UNCOND), unet)
        setup.evaluate((PERTURBED,), unet)

    times = fastest(
        {
            "plain": lambda: setup.evaluate((COND, UNCOND)),
            "in the same evaluation": lambda: setup.evaluate((COND, PERTURBED, UNCOND), unet),
            "in an evaluation of its own": apart,
        },
        repeats,
    )
    print(f"PAG, beside an evaluation without it of {times['plain']:.3f} s")
    for name in list(times)[1:]:
        print(f"  {name:28} {times[name]:.3f} s, {times[name] / times['plain']:.2f} times as long")


def print_tcfg(repeats: int) -> None:
    """Each in turns with the decomposition, which empties the caches, and by itself."""
    g = torch.Generator().manual_seed(0)
    x, cond, uncond = (torch.randn(4, 4, 128, 128, generator=g) for _ in range(3))

    def decomposed() -> Tensor:
        return torch.linalg.svd(torch.stack([(x - uncond).flatten(1), (x - cond).flatten(1)], 1), full_matrices=False)[
            2
        ]

    def tcfg_of_svd() -> Tensor:
        direction = decomposed()[:, :1]
        shared = (x - uncond).flatten(1).unsqueeze(1) @ direction.mT
        return x - (shared * direction).view_as(x)

    variants: dict[str, Callable[[], Tensor]] = {
        "closed form": lambda: damped_uncond(x, cond, uncond),
        "SVD": decomposed,
        "TCFG by SVD": tcfg_of_svd,
    }
    in_turns = fastest(variants, 20 * repeats)
    alone = {name: fastest({name: run}, 20 * repeats)[name] for name, run in variants.items()}
    print("TCFG, 4 latents of 4x128x128")
    for how, times in (("in turns", in_turns), ("alone", alone)):
        of = ", ".join(
            f"{name} {times[name] * 1e3:.2f} ms = {times[name] / times['closed form']:.1f}x" for name in variants
        )
        print(f"  {how:9} {of}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="./dev guidance-speed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    setup = Setup()
    print_modifiers(setup, repeats)
    print_perturbed(setup, repeats)
    print_tcfg(repeats)


if __name__ == "__main__":
    main()
