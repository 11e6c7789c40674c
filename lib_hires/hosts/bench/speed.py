"""What the techniques cost in one UNet evaluation of cond and uncond, beside what the operations allow.

    ./dev speed                      everything but sd15, some minutes on one core
    ./dev speed --part attention     one part of it

shrink      DeepShrink on SD 1.5's block layout and channel proportions at 0.4 of its width, native 16x16 (the trained
            bench model is flatter, and its deep blocks weigh less).
attention   The attention techniques at 0.2 of SD 1.5's width, native 64x64, at that size and at twice. Attention is a
            larger part of so narrow a network than of SD 1.5, whose own bound stands in the last column.
sd15        Scale fusion at SD 1.5's own width and 1024 px. Only if asked for: an evaluation takes minutes and 6 GiB.
memory      The most memory in use, on SD 1.5 as it is, in half precision at 1024 px. Counted from the tensors that
            live at once (see evaluation.py), weights left out: they would only hide the difference.
freeu       FreeU's filter beside the Fourier transform that it replaces.

ratio is the time without divided by the time with, and bound the same of floating-point operations, counted on the very
same network; reached is the saving in time as a share of the saving that the bound allows. Times are minima over
interleaved repeats on one thread, and of the processor, so that other programs disturb them less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from lib_hires.hosts.bench.evaluation import (
    META,
    SD15,
    SD15_AT_02,
    SD15_AT_04,
    Evaluation,
    Network,
    operations,
    peak_bytes,
)
from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.settings import Settings
from lib_hires.techniques.attention.scale_fusion import FAST, NEIGHBOURHOOD
from lib_hires.techniques.unet.freeu import filter_skip


@dataclass(frozen=True)
class Case:
    """One technique, and its values where they are not the defaults."""

    title: str
    technique: str
    changes: Mapping[str, object] | None = None

    @property
    def settings(self) -> Settings:
        return replace(BY_NAME[self.technique].settings(), **(self.changes or {}))


def _tiles(ratio: float) -> Case:
    changes = {"base_tile_size": 64, "peak_tile_size": 64, "base_global_ratio": ratio, "peak_global_ratio": ratio}
    return Case(f"Near-sighted Tile 64, ratio {ratio:g}", "near_sighted_tile", changes)


def _slothful(rate: float) -> Case:
    even = {"time_decay": 0.0, "in_depth_decay": 0.0, "out_depth_decay": 0.0}  # the same in all layers at all times
    return Case(f"Slothful {rate:g}", "slothful", {"in_slothful": rate, "out_slothful": rate, **even})


SHRINK_CASES = (
    (2, Case("DeepShrink, block 3, factor 2", "deep_shrink")),
    (2, Case("DeepShrink, block 4, factor 2", "deep_shrink", {"block": 4})),
    (4, Case("DeepShrink, block 3, factor 2", "deep_shrink")),
    (4, Case("DeepShrink, block 3, factor 4", "deep_shrink", {"factor": 4.0})),
)
ATTENTION_CASES = (
    *(_tiles(ratio) for ratio in (0.1, 0.3, 0.5)),
    *(_slothful(rate) for rate in (2.0, 3.0, 4.0)),
    Case("Near-sighted Attention, default", "near_sighted_attention"),
    Case("Scale fusion", "scale_fusion"),
    Case("Scale fusion, fast", "scale_fusion", {"mode": FAST}),
    Case("Scale fusion, neighbourhood", "scale_fusion", {"mode": NEIGHBOURHOOD}),
)
# here they should step aside: it can only become slower
NATIVE_CASES = tuple(
    Case(f"{BY_NAME[name].title}, native", name)
    for name in ("near_sighted_tile", "slothful", "near_sighted_attention", "scale_fusion")
)
ONLY_IF_ASKED = ("sd15",)
FREEU_SHAPES = ((2, 1280, 32, 32), (2, 640, 64, 64))
MOST_MEMORY = 1.3  # times plain
UNET_FAMILIES = ("Composition", "Quality", "Attention")
HEAD = f"{'one UNet evaluation, batch 2':34} latent  plain s   with s  ratio  bound  reached"


def fastest(variants: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of processor time that each variant takes at best, in interleaved repeats."""
    best = [float("inf")] * len(variants)
    with tqdm(total=repeats * len(variants), leave=False, unit="evaluation") as bar:
        for _ in range(repeats):
            for number, variant in enumerate(variants):
                started = time.process_time()
                variant()
                best[number] = min(best[number], time.process_time() - started)
                bar.update()
    return best


def reached(ratio: float, bound: float) -> float | None:
    """Share of the possible saving; None where the operations allow no saving."""
    return (1 - 1 / ratio) / (1 - 1 / bound) if bound > 1 else None


def timed(network: Network, side: int, cases: Sequence[Case], repeats: int) -> list[tuple[float, float]]:
    """Seconds (plain, with the technique) of each case."""
    evaluation = Evaluation(network, side)
    patched = (evaluation.with_technique(case.technique, case.settings) for case in cases)
    plain, *changed = fastest([evaluation, *(partial(evaluation, change) for change in patched)], repeats)
    return [(plain, seconds) for seconds in changed]


def bounds(network: Network, side: int, cases: Sequence[Case]) -> list[float]:
    """Operations without each case's technique divided by those with it."""
    evaluation = Evaluation(network, side, META)
    plain = operations(evaluation)
    patched = (evaluation.with_technique(case.technique, case.settings) for case in cases)
    return [plain / operations(evaluation, change) for change in patched]


def _line(title: str, side: int, plain: float, changed: float, bound: float) -> str:
    ratio = plain / changed
    share = reached(ratio, bound)
    last = "-" if share is None else f"{share:.0%}"
    return f"{title:32} {f'{side}x{side}':>8} {plain:8.3f} {changed:8.3f} {ratio:6.2f} {bound:6.2f} {last:>8}"


def shrink(repeats: int) -> None:
    print(HEAD)
    for scale, case in SHRINK_CASES:
        side = SD15_AT_04.native[0] * scale
        ((plain, changed),) = timed(SD15_AT_04, side, [case], repeats)
        print(_line(case.title, side, plain, changed, *bounds(SD15_AT_04, side, [case])), flush=True)
    never = Case("", "deep_shrink", {"start": 0.5, "end": 0.6, "gradual": 0.6})
    ((plain, changed),) = timed(SD15_AT_04, SD15_AT_04.native[0] * 2, [never], repeats * 3)
    print(f"\nhooks on, nothing to do (outside the window): {changed / plain:.4f} of the plain time")


def attention(repeats: int) -> None:
    print(HEAD + "  SD 1.5")
    # more repeats at native size: an evaluation takes a twelfth there, and the ratios to be told are small
    for side, cases, times in ((64, NATIVE_CASES, 2 * repeats), (128, ATTENTION_CASES, (repeats + 1) // 2)):
        possible, of_sd15 = bounds(SD15_AT_02, side, cases), bounds(SD15, side, cases)
        measured = timed(SD15_AT_02, side, cases, times)
        for case, (plain, changed), bound, sd15 in zip(cases, measured, possible, of_sd15, strict=True):
            print(f"{_line(case.title, side, plain, changed, bound)} {sd15:7.2f}", flush=True)


def sd15(repeats: int) -> None:
    cases = [Case("Scale fusion, SD 1.5", "scale_fusion")]
    ((plain, changed),) = timed(SD15, 128, cases, (repeats + 3) // 4)
    print(f"{HEAD}\n{_line(cases[0].title, 128, plain, changed, *bounds(SD15, 128, cases))}")


def memory(repeats: int) -> None:
    """Every preset of every technique that acts in the UNet; a line tells the preset that takes most."""
    evaluation = Evaluation(SD15, 128, META, torch.float16)
    plain = peak_bytes(evaluation)
    print(f"{'peak memory, SD 1.5 at 128x128':34} {'MiB':>6} {'of plain':>9}  preset that takes most")
    print(f"{'plain':34} {plain / 2**20:6.0f} {1:9.3f}")
    for technique in (technique for technique in TECHNIQUES if technique.family in UNET_FAMILIES):
        taken = {
            preset: peak_bytes(evaluation, evaluation.with_technique(technique.name, settings))
            for preset, settings in technique.presets.items()
        }
        most = max(taken, key=taken.__getitem__)
        ratio = taken[most] / plain
        warning = f"  more than {MOST_MEMORY:g}" if ratio > MOST_MEMORY else ""
        print(f"{technique.title:34} {taken[most] / 2**20:6.0f} {ratio:9.3f}  {most}{warning}", flush=True)


def published_filter(skip: Tensor, s: float) -> Tensor:
    """FreeU's filter as it is published: the spectrum, shifted to the middle, times a mask."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(skip.float(), dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones_like(spectrum.real)
    row, column = spectrum.shape[-2] // 2, spectrum.shape[-1] // 2
    mask[..., row - 1 : row + 1, column - 1 : column + 1] = s
    return torch.fft.ifftn(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1)).real.to(skip.dtype)


def lean_filter(skip: Tensor, s: float) -> Tensor:
    """The same with nothing but the two transforms: the best that a Fourier form could do."""
    spectrum = torch.fft.fft2(skip.float())
    lowest = torch.tensor([0, -1])
    spectrum[..., lowest[:, None], lowest] *= s
    return torch.fft.ifft2(spectrum).real.to(skip.dtype)


def freeu(repeats: int) -> None:
    print(
        f"{'FreeU, filter of one skip, ms':34} {'ours':>6} {'published':>18} {'transforms alone':>18}"
        "  largest difference"
    )
    for shape in FREEU_SHAPES:
        skip = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        forms = [partial(form, skip, 0.2) for form in (filter_skip, published_filter, lean_filter)]
        ours, *fourier = fastest(forms, repeats * 5)
        difference = max(float((form() - forms[0]()).abs().max()) for form in forms[1:])
        columns = " ".join(f"{theirs * 1e3:8.1f} = {theirs / ours:6.2f}x" for theirs in fourier)
        print(f"{'x'.join(map(str, shape)):34} {ours * 1e3:6.1f} {columns}  {difference:.1e}", flush=True)


PARTS: Mapping[str, Callable[[int], None]] = {
    "shrink": shrink,
    "attention": attention,
    "sd15": sd15,
    "memory": memory,
    "freeu": freeu,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev speed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, help="only this part; default: all")
    parser.add_argument(
        "--repeats", type=int, default=4, help="timings of each; half as many of the long ones (default 4)"
    )
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1")
    return options


def _warm_up() -> None:
    """The first evaluation of a process loads what the others find, and ldm prints what it lacks."""
    with contextlib.redirect_stdout(io.StringIO()):
        Evaluation(SD15_AT_02, 8)()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    _warm_up()
    with torch.inference_mode():
        usual = [part for part in PARTS if part not in ONLY_IF_ASKED]
        for number, part in enumerate([options.part] if options.part else usual):
            print("\n" * bool(number), end="")
            PARTS[part](options.repeats)


if __name__ == "__main__":
    main()
