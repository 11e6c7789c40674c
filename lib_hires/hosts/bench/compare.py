"""The bench's main job: the same prompts at native size, naively larger, and larger with techniques; counted and shown.

./dev bench                                  12 pictures a row, about two minutes
./dev bench --rows sizes --pictures 100      the published table of sizes
./dev bench --rows guidance --pictures 40    every guidance technique at low, normal and burning CFG
./dev bench --rows unet --pictures 40        every technique that acts in the UNet, above native size
./dev bench --rows hires --pictures 100      a second pass at twice the size: what it keeps, draws and adds
./dev bench --rows hires-4x --pictures 20    four times the size, at once and in stages
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib_hires.generation import Generation
from lib_hires.hosts.bench.contact_sheet import contact_sheet
from lib_hires.hosts.bench.counter import count_objects, wilson_interval
from lib_hires.hosts.bench.hires_metrics import (
    cross_scale_psnr,
    high_band_ratio,
    radial_spectrum,
    shown_attributes,
    spectrum_distance,
    true_spectrum,
)
from lib_hires.hosts.bench.model import NATIVE_SIZE, load_models
from lib_hires.hosts.bench.pipeline import Bench, Request
from lib_hires.hosts.bench.scenes import CAPTIONS
from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.settings import HIRES, params_of

BATCH = 4


@dataclass(frozen=True)
class Row:
    """One line of the table: a size, and the presets of the techniques that are on, with what differs from them."""

    title: str
    width: int
    height: int
    presets: tuple[tuple[str, str], ...] = ()  # (technique, preset)
    cfg_scale: float | None = None  # None: that of the command line
    changes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # by technique
    hires_scale: float = 1.0  # above 1: a first pass at the size divided by it, then a hires pass at the size
    hires_denoise: float = 1.0

    def generation(self) -> Generation:
        presets = {name: BY_NAME[name].presets[preset] for name, preset in self.presets}
        return Generation({name: replace(preset, **self.changes.get(name, {})) for name, preset in presets.items()})


_N = NATIVE_SIZE
_HARD_CUT = (("deep_shrink", "2x, hard cut"),)
_GRADUAL = (("deep_shrink", "Default (2x, gradual)"),)
_FIRST = (("deep_shrink", "2x, composition first"),)

SIZE_ROWS: dict[str, Row] = {
    "native": Row("native", _N, _N),
    "naive": Row("naive 2x", 2 * _N, 2 * _N),
    "hard-cut": Row("DeepShrink 2x, hard cut", 2 * _N, 2 * _N, _HARD_CUT),
    "deep-shrink": Row("DeepShrink 2x, gradual", 2 * _N, 2 * _N, _GRADUAL),
    "composition": Row("DeepShrink 2x, composition first", 2 * _N, 2 * _N, _FIRST),
    "naive-wide": Row("naive 1x2", 2 * _N, _N),
    "deep-shrink-wide": Row("DeepShrink 1x2, composition first", 2 * _N, _N, _FIRST),
}
_DILATION = ("dilation", "Automatic (FreeScale)")
_FUSION = ("scale_fusion", "Default")
_SLOTHFUL = ("slothful", "Default")
_NEIGHBOURHOOD = ("scale_fusion", "Neighbourhood (faster than off)")
# Tiles of the bench's native size that see nothing else: each draws its own object, as it should without help.
_TILES = ("near_sighted_tile", "Native tiles, fast")
_ALONE = {"base_tile_size": 16, "peak_tile_size": 16, "base_global_ratio": 0.0, "peak_global_ratio": 0.0}

UNET_ROWS: dict[str, Row] = {
    "dilation": Row("dilation 2x", 2 * _N, 2 * _N, (_DILATION,)),
    # at 4x a picture would take three times as long as at 3x
    "naive-3x": Row("naive 3x", 3 * _N, 3 * _N),
    "dilation-3x": Row("dilation 3x", 3 * _N, 3 * _N, (_DILATION,)),
    "tiles-alone": Row("Near-sighted tiles alone 2x", 2 * _N, 2 * _N, (_TILES,), changes={_TILES[0]: _ALONE}),
    "slothful": Row("Slothful 2x", 2 * _N, 2 * _N, (_SLOTHFUL,)),
    "scale-fusion": Row("scale fusion 2x", 2 * _N, 2 * _N, (_FUSION,)),
    "neighbourhood": Row("neighbourhood 2x", 2 * _N, 2 * _N, (_NEIGHBOURHOOD,)),
    "freeu-v1": Row("FreeU V1, native", _N, _N, (("freeu", "FreeScale (SDXL)"),)),
    "freeu-v2": Row("FreeU V2, native", _N, _N, (("freeu", "SD 1.5"),)),
    "together": Row("DeepShrink + dilation + fusion 2x", 2 * _N, 2 * _N, (*_FIRST, _DILATION, _FUSION)),
}
# beside what they are to be better than
UNET_GROUP = ("native", "naive", "composition", *UNET_ROWS)


def _hires(
    title: str, denoise: float, *presets: tuple[str, str], scale: int = 2, **changes: Mapping[str, object]
) -> Row:
    """Techniques that have a pass choice act in the hires pass only."""
    only_there = {
        name: ({"passes": HIRES} if "passes" in params_of(BY_NAME[name].settings) else {}) | dict(changes.get(name, {}))
        for name, _ in presets
    }
    return Row(title, scale * _N, scale * _N, presets, changes=only_there, hires_scale=scale, hires_denoise=denoise)


_MIXING = ("iterative_mixing", "FreeScale")
_LOCK = ("low_band_lock", "Default")
_RELAY = ("relay", "Fast 2x")
_CASCADE = ("cascade", "2x at most per stage")
HIRES_ROWS: dict[str, Row] = {
    "hires-fix": _hires("hires fix, denoise 0.7", 0.7),
    "mixing-0.5": _hires("iterative mixing, alpha 0.5", 1.0, _MIXING, iterative_mixing={"alpha": 0.5}),
    "mixing-1": _hires("iterative mixing, alpha 1", 1.0, _MIXING, iterative_mixing={"alpha": 1.0}),
    "mixing-3": _hires("iterative mixing, alpha 3", 1.0, _MIXING, iterative_mixing={"alpha": 3.0}),
    "lock": _hires("low-band lock, denoise 0.7", 0.7, _LOCK),
    "freescale": _hires("FreeScale, denoise 0.7", 0.7, _MIXING, _DILATION, _FUSION),
    "relay": _hires("relay", 1.0, _RELAY),
    "relay-lock": _hires("relay, low-band lock", 1.0, _RELAY, _LOCK),
}
HIRES_4X_ROWS: dict[str, Row] = {
    "hires-fix-4x": _hires("hires fix 4x at once", 0.7, scale=4),
    "cascade-4x": _hires("cascade 2x, 2x", 0.7, _CASCADE, scale=4),
    "cascade-lock-4x": _hires("cascade 2x, 2x, low-band lock", 0.7, _CASCADE, _LOCK, scale=4),
}
# the first is where every hires pass begins, the second what sampling at the size costs
HIRES_GROUP = ("native", "naive", *HIRES_ROWS)
HIRES_4X_GROUP = ("native", "naive", *HIRES_4X_ROWS)
GUIDANCE = tuple(technique for technique in TECHNIQUES if technique.family == "Guidance")
CFG_SCALES = (4.0, 7.5, 15.0)  # low, normal, burning


def _guidance_rows(cfg_scale: float) -> Iterator[tuple[str, Row]]:
    yield f"cfg-{cfg_scale:g}", Row(f"CFG {cfg_scale:g}", _N, _N, (), cfg_scale)
    for technique in GUIDANCE:
        preset = next(iter(technique.presets))
        title = f"CFG {cfg_scale:g}, {technique.title}"
        yield f"{technique.name}-{cfg_scale:g}", Row(title, _N, _N, ((technique.name, preset),), cfg_scale)


GUIDANCE_ROWS = {name: row for cfg_scale in CFG_SCALES for name, row in _guidance_rows(cfg_scale)}
ROWS = SIZE_ROWS | UNET_ROWS | HIRES_ROWS | HIRES_4X_ROWS | GUIDANCE_ROWS
GUIDANCE_ROWS_HELP = "a guidance technique and a CFG scale (pag-7.5, cfg-15)"
GROUPS = {
    "sizes": tuple(SIZE_ROWS),
    "unet": UNET_GROUP,
    "hires": HIRES_GROUP,
    "hires-4x": HIRES_4X_GROUP,
    "guidance": tuple(GUIDANCE_ROWS),
}
DEFAULT_ROWS = ("native", "naive", "hard-cut", "composition")


@dataclass
class Outcome:
    """What a row gave: pictures in prompt order, objects counted in each, and what it cost."""

    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    unet_calls: int = 0
    unet_cells: int = 0

    @property
    def errors(self) -> int:
        return sum(count != 1 for count in self.counts.values())

    @property
    def saturation(self) -> float:
        """Mean of (max - min) / max over the colours of all pixels, as in HSV; black counts as 0."""
        return float(np.mean([_saturation(picture) for picture in self.pictures.values()]))

    @property
    def clipped(self) -> float:
        """Share of pixels with a channel at the end of its range: burnt highlights and drowned shadows."""
        return float(np.mean([((p == 0) | (p == 255)).any(-1).mean() for p in self.pictures.values()]))


def _saturation(picture: np.ndarray) -> float:
    high, low = picture.max(-1).astype(np.float64), picture.min(-1)
    return float(np.divide(high - low, high, out=np.zeros_like(high), where=high > 0).mean())


@dataclass(frozen=True)
class Task:
    row: str
    indices: tuple[int, ...]
    steps: int
    cfg_scale: float
    sampler: str


def prompt(index: int) -> str:
    """Balanced over all captions; the seed of picture `index` is `index` in every row, so rows are paired."""
    return CAPTIONS[(index * 7) % len(CAPTIONS)]


_bench: Bench | None = None


def _load(weights: str) -> None:
    global _bench  # noqa: PLW0603 - one model per worker process
    torch.set_num_threads(1)
    _bench = Bench(load_models(weights))


def _draw(task: Task) -> tuple[Task, np.ndarray, float, int, int]:
    assert _bench is not None
    row, cells_before = ROWS[task.row], _bench.unet_cells
    request = Request(
        prompts=tuple(prompt(index) for index in task.indices),
        seeds=task.indices,
        width=round(row.width / row.hires_scale),
        height=round(row.height / row.hires_scale),
        steps=task.steps,
        cfg_scale=task.cfg_scale if row.cfg_scale is None else row.cfg_scale,
        sampler=task.sampler,
        hires_scale=row.hires_scale,
        hires_denoise=row.hires_denoise,
    )
    result = _bench.generate(request, row.generation())
    return task, result.pictures, result.seconds, result.unet_calls, _bench.unet_cells - cells_before


def draw_rows(rows: Sequence[str], options: argparse.Namespace) -> dict[str, Outcome]:
    """Draw all pictures in worker processes, one per core, with a progress bar."""
    outcomes = {row: Outcome() for row in rows}
    tasks = list(_tasks(rows, options))
    workers = min(options.workers, len(tasks))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_load, initargs=(str(options.weights),))
    total = len(rows) * options.pictures
    with pool, tqdm(total=total, unit="picture", smoothing=0) as bar:
        for done in as_completed([pool.submit(_draw, task) for task in tasks]):
            task, pictures, seconds, calls, cells = done.result()
            outcome = outcomes[task.row]
            outcome.seconds += seconds
            outcome.unet_calls += calls * len(task.indices)
            outcome.unet_cells += cells
            for index, picture in zip(task.indices, pictures, strict=True):
                outcome.pictures[index] = picture
                outcome.counts[index] = count_objects(picture, _colour(index)).count
            bar.set_description(ROWS[task.row].title)
            bar.update(len(task.indices))
    return outcomes


def _attributes(index: int) -> tuple[str, str]:
    """(shape, colour) of the captioned object."""
    colour, shape = prompt(index).split()[-2:]
    return shape, colour


def _colour(index: int) -> str:
    return _attributes(index)[1]


def _tasks(rows: Sequence[str], options: argparse.Namespace) -> Iterator[Task]:
    # the large pictures first: the small ones then fill the gaps at the end
    for row in sorted(rows, key=lambda name: -ROWS[name].width * ROWS[name].height):
        for start in range(0, options.pictures, BATCH):
            indices = tuple(range(start, min(start + BATCH, options.pictures)))
            yield Task(row, indices, options.steps, options.cfg_scale, options.sampler)


def table(outcomes: dict[str, Outcome]) -> str:
    """The result as text: errors with Wilson 95 % intervals, objects, seconds and UNet calls per picture."""
    head = f"{'':34} {'size':>9} {'wrong':>9} {'rate':>6}  {'95 % interval':14} {'objects':>7} "
    head += f"{'satur.':>6} {'clipped':>7} {'s/picture':>9} {'UNet calls':>10}"
    lines = [head]
    for name, outcome in outcomes.items():
        row, n = ROWS[name], len(outcome.counts)
        low, high = wilson_interval(outcome.errors, n)
        interval = f"{low:.1%} - {high:.1%}"
        mean = sum(outcome.counts.values()) / n
        lines.append(
            f"{row.title:34} {f'{row.width}x{row.height}':>9} {f'{outcome.errors}/{n}':>9} {outcome.errors / n:6.1%}  "
            f"{interval:14} {mean:7.2f} {outcome.saturation:6.3f} {outcome.clipped:7.1%} "
            f"{outcome.seconds / n:9.2f} {outcome.unet_calls / n:10.1f}"
        )
    return "\n".join(lines)


def against_small(outcome: Outcome, row: Row, small: Outcome, direct: Outcome | None) -> dict[str, float]:
    """What a large row shows beside the `small` pictures of the same prompts and seeds, and true renders of its size.

    Work is in cells that the UNet saw, against sampling directly at the size; attention makes large maps dearer still.
    """
    pictures, n = outcome.pictures, len(outcome.pictures)
    right = [index for index in pictures if small.counts[index] == 1]
    true = true_spectrum(tuple(_attributes(index) for index in sorted(pictures)), row.height, row.width)
    spectrum = radial_spectrum(pictures.values())
    return {
        "errors_from_right": sum(outcome.counts[index] != 1 for index in right),
        "right_before": len(right),
        "attributes": sum(shown_attributes(p) == _attributes(index) for index, p in pictures.items()) / n,
        "psnr": float(np.median([cross_scale_psnr(p, small.pictures[index]) for index, p in pictures.items()])),
        "spectrum": spectrum_distance(spectrum, true),
        "high_band": high_band_ratio(spectrum, true),
        "work": outcome.unet_cells / direct.unet_cells if direct else float("nan"),
    }


def hires_numbers(outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
    """`against_small` of every larger row, by name; none where the native pictures were not drawn."""
    small, direct = outcomes.get("native"), outcomes.get("naive")
    if small is None or not any(ROWS[name].hires_scale > 1 for name in outcomes):
        return {}
    large = {name: outcome for name, outcome in outcomes.items() if ROWS[name].width * ROWS[name].height > _N * _N}
    return {name: against_small(outcome, ROWS[name], small, direct) for name, outcome in large.items()}


def hires_table(outcomes: dict[str, Outcome]) -> str:
    """`hires_numbers` as text: errors where the small picture was right with Wilson 95 % intervals, and the rest."""
    head = f"{'':34} {'wrong, right before':>19}  {'95 % interval':14} {'shape+colour':>12} {'PSNR to small':>13} "
    lines = [head + f"{'spectrum':>8} {'high band':>9} {'work':>5}"]
    for name, n in hires_numbers(outcomes).items():
        errors, right = int(n["errors_from_right"]), int(n["right_before"])
        low, high = wilson_interval(errors, right)
        lines.append(
            f"{ROWS[name].title:34} {f'{errors}/{right}':>19}  {f'{low:.1%} - {high:.1%}':14} {n['attributes']:12.1%} "
            f"{n['psnr']:10.1f} dB {n['spectrum']:5.1f} dB {n['high_band']:9.2f} {n['work']:5.2f}"
        )
    return "\n".join(lines)


def as_json(outcomes: dict[str, Outcome], options: argparse.Namespace) -> str:
    hires = hires_numbers(outcomes)
    rows = {
        name: {
            "title": ROWS[name].title,
            "size": [ROWS[name].width, ROWS[name].height],
            "presets": dict(ROWS[name].presets),
            "changes": ROWS[name].changes,
            "errors": outcome.errors,
            "pictures": len(outcome.counts),
            "interval": wilson_interval(outcome.errors, len(outcome.counts)),
            "cfg_scale": ROWS[name].cfg_scale,
            "saturation": outcome.saturation,
            "clipped": outcome.clipped,
            "counts": [outcome.counts[index] for index in sorted(outcome.counts)],
            "seconds_per_picture": outcome.seconds / len(outcome.counts),
            "unet_calls_per_picture": outcome.unet_calls / len(outcome.counts),
            "hires_scale": ROWS[name].hires_scale,
            "hires_denoise": ROWS[name].hires_denoise,
            "hires": hires.get(name),
        }
        for name, outcome in outcomes.items()
    }
    settings = {"steps": options.steps, "cfg_scale": options.cfg_scale, "sampler": options.sampler}
    return json.dumps({"settings": settings, "rows": rows}, indent=1)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=12, help="pictures per row (default 12)")
    rows = ", ".join(SIZE_ROWS | UNET_ROWS | HIRES_ROWS | HIRES_4X_ROWS)
    known = f"{rows}, {GUIDANCE_ROWS_HELP}, or a group: {', '.join(GROUPS)}"
    parser.add_argument("--rows", default=",".join(DEFAULT_ROWS), help=f"of {known}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg-scale", type=float, default=3.0)
    parser.add_argument("--sampler", default="Euler")
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="folder for the contact sheet and the numbers"
    )
    options = parser.parse_args(arguments)
    options.rows = [row for name in options.rows.split(",") for row in GROUPS.get(name, (name,))]
    unknown = [row for row in options.rows if row not in ROWS]
    if unknown:
        parser.error(f"unknown rows {', '.join(unknown)}: choose from {known}")
    if options.pictures < 1 or options.steps < 1:
        parser.error(f"--pictures {options.pictures} and --steps {options.steps} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    outcomes = draw_rows(options.rows, options)
    print(table(outcomes))
    if hires_numbers(outcomes):
        print("\n" + hires_table(outcomes))
    options.out.mkdir(parents=True, exist_ok=True)
    sheet = options.out / "contact_sheet.png"
    shown = range(min(8, options.pictures))
    contact_sheet(
        [(ROWS[name].title, [outcome.pictures[i] for i in shown]) for name, outcome in outcomes.items()],
        [prompt(index) for index in shown],
    ).save(sheet)
    (options.out / "numbers.json").write_text(as_json(outcomes, options))
    print(f"\nContact sheet: {sheet.resolve()}\nNumbers: {(options.out / 'numbers.json').resolve()}")


if __name__ == "__main__":
    main()
