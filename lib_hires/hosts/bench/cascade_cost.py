"""What a hires pass costs at once and as a cascade, and what the last stage of the cascade costs alone.

    ./dev cascade-cost                         2x, 4x and 8x with the bench's model, about five minutes
    ./dev cascade-cost --scales 2,4            half a minute
    ./dev cascade-cost --repeats 3             the least time and the most memory of three

at once            a picture at the base size, then one hires pass to the size
cascade            the same in stages of at most twice the size
last stage alone   img2img at the size, from a ready picture of half of it

Seconds are of the processor, because other programs disturb them less, and of the whole generation. Steps are those of
every pass. Time grows with their number; memory does not depend on it, as no step keeps anything of the one before.

Peak memory is the most that the process held (VmHWM, the high-water mark of its resident memory, set back just before)
above what it held before it generated. Everything is measured in a process of its own, after a small picture that
makes it load what it loads once. Its allocator takes blocks from 64 KiB on from the system and gives them back at
once: by default glibc raises that limit as it goes, and what it keeps for later would count as held.

growth is the exponent of the number of pixels, from the size before to this one: 1 is proportional to it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib_hires.generation import Generation
from lib_hires.hosts.bench.line_chart import Panel, line_chart
from lib_hires.hosts.bench.model import LATENT_FACTOR, NATIVE_SIZE, WEIGHTS_DIR, load_models
from lib_hires.hosts.bench.pipeline import Bench, Request
from lib_hires.stages import even_factors
from lib_hires.techniques.hires.cascade import CascadeSettings

AT_ONCE, CASCADE, LAST_STAGE = "at once", "cascade", "last stage alone"
HOWS = (AT_ONCE, CASCADE, LAST_STAGE)
LARGEST_STAGE = 2.0
PROMPT, SEED = "a photo of a red ring", 0
MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = 64 * 2**10, -1, -3  # the latter two as in glibc's malloc.h
# what a measuring process would import by itself, for most of its life; the server that forks it has no model
PRELOADED = ["lib_hires.hosts.bench.pipeline", "transformers.models.clip.modeling_clip"]


@dataclass(frozen=True)
class Job:
    """One way to a picture of `scale` times the base size (pixels)."""

    how: str
    scale: int
    base: int
    steps: int
    weights: str

    @property
    def size(self) -> int:
        return self.base * self.scale


@dataclass(frozen=True)
class Cost:
    seconds: float  # of the processor
    peak_bytes: int
    unet_calls: int


Costs = Mapping[tuple[str, int], Cost]  # by (how, scale)


def generation_of(job: Job) -> Generation:
    if job.how != CASCADE:
        return Generation()
    return Generation({"cascade": CascadeSettings(largest=LARGEST_STAGE)})


def draw(bench: Bench, job: Job) -> None:
    if job.how == LAST_STAGE:
        draw_last_stage(bench, job)
        return
    request = Request((PROMPT,), (SEED,), job.base, job.base, job.steps, hires_scale=job.scale)
    bench.generate(request, generation_of(job))


def draw_last_stage(bench: Bench, job: Job) -> None:
    side = round(job.size / even_factors(job.scale, LARGEST_STAGE)[-1])
    ready = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(SEED))
    # as the hires pass does it; at full denoise img2img leaves no step out
    images = F.interpolate(ready, size=(job.size, job.size), mode="bicubic").clamp(0, 1)
    bench.generate(Request((PROMPT,), (SEED,), job.size, job.size, job.steps, init_images=images))


def cost_of(bench: Bench, job: Job) -> Cost:
    """What it costs in this process, which must not have drawn anything as large before."""
    held, calls = start_memory_peak(), bench.unet_calls
    started = time.process_time()
    draw(bench, job)
    seconds = time.process_time() - started
    return Cost(seconds, resident("VmHWM") - held, bench.unet_calls - calls)


def start_memory_peak() -> int:
    """Set the high-water mark of this process's memory back to what it holds; returns that."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}: memory can be measured on Linux only")


def cost_of_life(job: Job) -> Cost:
    """All that a measuring process does."""
    give_memory_back_at_once()
    torch.set_num_threads(1)
    bench = Bench(load_models(job.weights))
    small = torch.zeros(1, 3, job.base, job.base)
    bench.generate(Request((PROMPT,), (SEED,), job.base, job.base, 1, init_images=small))
    return cost_of(bench, job)


def give_memory_back_at_once() -> None:
    with contextlib.suppress(AttributeError):  # a C library with another allocator
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, 0)


def measured_apart(job: Job) -> Cost:
    """The cost in a fresh process."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(cost_of_life, job).result()


def best_of(repeats: Sequence[Cost]) -> Cost:
    """The least time: other programs only add to it. The most memory: a peak can only be missed."""
    return Cost(min(cost.seconds for cost in repeats), max(cost.peak_bytes for cost in repeats), repeats[0].unet_calls)


def measure_all(options: argparse.Namespace) -> dict[tuple[str, int], Cost]:
    weights = str(options.weights)
    jobs = [Job(how, scale, options.base, options.steps, weights) for scale in options.scales for how in HOWS]
    costs: dict[tuple[str, int], Cost] = {}
    # by work, so that the last picture is not most of the bar
    total = options.repeats * sum(job.scale**2 for job in jobs)
    with tqdm(total=total, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}", leave=False) as bar:
        for job in jobs:
            bar.set_description(f"{job.size} px, {job.how}")
            repeats = []
            for _ in range(options.repeats):
                repeats.append(measured_apart(job))
                bar.update(job.scale**2)
            costs[job.how, job.scale] = best_of(repeats)
    return costs


def growth(costs: Costs, how: str, scales: Sequence[int], of: Callable[[Cost], float]) -> list[float | None]:
    """The exponents of the number of pixels, from each scale to the next; None for the first."""
    exponents: list[float | None] = [None]
    for small, large in pairwise(scales):
        ratio = of(costs[how, large]) / of(costs[how, small])
        exponents.append(math.log(ratio) / math.log((large / small) ** 2))
    return exponents


def seconds_of(cost: Cost) -> float:
    return cost.seconds


def mebibytes_of(cost: Cost) -> float:
    return cost.peak_bytes / 2**20


def rows(costs: Costs, scales: Sequence[int], base: int) -> list[dict[str, Any]]:
    """One row for each size and way, with how it compares."""
    grown = {(how, of): growth(costs, how, scales, of) for how in HOWS for of in (seconds_of, mebibytes_of)}
    return [
        {
            "size": base * scale,
            "how": how,
            "unet_calls": cost.unet_calls,
            "seconds": seconds_of(cost),
            "seconds_growth": grown[how, seconds_of][number],
            "seconds_of_at_once": cost.seconds / costs[AT_ONCE, scale].seconds,
            "mebibytes": mebibytes_of(cost),
            "mebibytes_growth": grown[how, mebibytes_of][number],
            "mebibytes_of_last_stage": cost.peak_bytes / costs[LAST_STAGE, scale].peak_bytes,
        }
        for number, scale in enumerate(scales)
        for how, cost in ((how, costs[how, scale]) for how in HOWS)
    ]


def table(measured: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"{'size':>10}  {'':16} {'UNet':>5} {'seconds':>8} {'growth':>7} {'of at once':>11} "
        f"{'peak MiB':>9} {'growth':>7} {'of last stage':>14}"
    ]
    for row in measured:
        size = f"{row['size']}x{row['size']}"
        lines.append(
            f"{size:>10}  {row['how']:16} {row['unet_calls']:>5} {row['seconds']:8.2f} "
            f"{_exponent(row['seconds_growth']):>7} {row['seconds_of_at_once']:11.2f} {row['mebibytes']:9.0f} "
            f"{_exponent(row['mebibytes_growth']):>7} {row['mebibytes_of_last_stage']:14.2f}"
        )
    return "\n".join(lines)


def _exponent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def plot(costs: Costs, scales: Sequence[int], base: int) -> str:
    """Seconds and memory against the side of the picture, as SVG."""

    def series(of: Callable[[Cost], float]) -> dict[str, list[tuple[float, float]]]:
        return {how: [(base * scale, of(costs[how, scale])) for scale in scales] for how in HOWS}

    panels = [
        Panel("Time", "processor seconds", series(seconds_of)),
        Panel("Peak memory", "MiB above what was held before", series(mebibytes_of)),
    ]
    return line_chart(panels, "side of the picture in pixels", {str(base * scale): base * scale for scale in scales})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev cascade-cost", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scales", type=_scales, default="2,4,8", help="times the base size (default 2,4,8)")
    parser.add_argument("--base", type=int, default=NATIVE_SIZE, help=f"base size in pixels (default {NATIVE_SIZE})")
    parser.add_argument("--steps", type=int, default=4, help="of every pass (default 4)")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each (default 1)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIR)
    parser.add_argument(
        "--out", type=Path, default=Path("out/cascade_cost"), help="folder for the plot and the numbers"
    )
    options = parser.parse_args(arguments)
    for name in ("steps", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1")
    if options.base < LATENT_FACTOR or options.base % LATENT_FACTOR:
        parser.error(f"--base {options.base} is not a positive multiple of {LATENT_FACTOR}")
    return options


def _scales(text: str) -> list[int]:
    scales = sorted({int(part) for part in text.split(",")})
    if len(scales) < 2 or scales[0] < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: growth needs two scales, each of them at least 2")
    return scales


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    costs = measure_all(options)
    measured = rows(costs, options.scales, options.base)
    print(table(measured))
    options.out.mkdir(parents=True, exist_ok=True)
    chart, numbers = options.out / "cascade_cost.svg", options.out / "numbers.json"
    chart.write_text(plot(costs, options.scales, options.base))
    settings = {"base": options.base, "steps": options.steps, "repeats": options.repeats}
    numbers.write_text(json.dumps({"settings": settings, "rows": measured}, indent=1))
    print(f"\nPlot: {chart.resolve()}\nNumbers: {numbers.resolve()}")


if __name__ == "__main__":
    main()
