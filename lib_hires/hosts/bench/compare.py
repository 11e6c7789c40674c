"""The bench's main job: the same prompts at native size, naively larger, and larger with techniques; counted and shown.

./dev bench                                  12 pictures a row, about two minutes
./dev bench --rows sizes --pictures 100      the published table of sizes
./dev bench --rows guidance --pictures 40    every guidance technique at low, normal and burning CFG
./dev bench --rows unet --pictures 60        every technique that acts in the UNet, above native size
./dev bench --rows hires --pictures 100      a second pass at twice the size: what it keeps, draws and adds
./dev bench --rows hires-4x --pictures 100 --steps 6 --sampler "DPM++ 2M"
                                             four times the size, at once and in stages; more than an hour
./dev bench --rows unet-4x --pictures 60 --steps 6 --sampler "DPM++ 2M"

Long jobs can be broken off and continued with --resume.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from lib_hires.hosts.bench.compare_rows import DEFAULT_ROWS, GROUPS, KNOWN_ROWS, ROWS
from lib_hires.hosts.bench.contact_sheet import contact_sheet
from lib_hires.hosts.bench.drawn import Drawn
from lib_hires.hosts.bench.model import load_models
from lib_hires.hosts.bench.outcome import Batch, Outcome, prompt
from lib_hires.hosts.bench.pipeline import Bench, Request
from lib_hires.hosts.bench.report import as_json, enlarged, hires_table, paired_numbers, paired_table, table

BATCH = 4


@dataclass(frozen=True)
class Task:
    row: str
    indices: tuple[int, ...]
    steps: int
    cfg_scale: float
    sampler: str

    @property
    def counts_operations(self) -> bool:
        """Once in a row: all its pictures take as many."""
        return self.indices[0] == 0


_bench: Bench | None = None


def _load(weights: str) -> None:
    global _bench  # noqa: PLW0603 - one model per worker process
    torch.set_num_threads(1)
    _bench = Bench(load_models(weights))


def _draw(task: Task) -> tuple[Task, Batch]:
    assert _bench is not None
    row = ROWS[task.row]
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
    started = time.process_time()
    with _bench.unet.counting() if task.counts_operations else nullcontext():
        result = _bench.generate(request, row.generation())
    seconds = time.process_time() - started
    operations = _bench.unet.operations if task.counts_operations else 0
    return task, Batch(task.indices, result.pictures, seconds, result.unet_calls, operations)


def draw_rows(rows: Sequence[str], options: argparse.Namespace) -> dict[str, Outcome]:
    """Draw all pictures in worker processes, one per core, with a progress bar."""
    outcomes = {row: Outcome() for row in rows}
    drawn = Drawn(options.out / "drawn", options.resume)
    with tqdm(total=len(rows) * options.pictures, unit="picture", smoothing=0) as bar:

        def take(task: Task, batch: Batch) -> None:
            outcomes[task.row].add(batch)
            bar.set_description(ROWS[task.row].title)
            bar.update(len(task.indices))

        missing = []
        for task in _tasks(rows, options):
            batch = drawn.find(task)
            if batch is None:
                missing.append(task)
            else:
                take(task, batch)
        for task, batch in _drawn_now(missing, options):
            drawn.keep(task, batch)
            take(task, batch)
    return outcomes


def _drawn_now(tasks: Sequence[Task], options: argparse.Namespace) -> Iterator[tuple[Task, Batch]]:
    if not tasks:
        return
    workers = min(options.workers, len(tasks))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_load, initargs=(str(options.weights),))
    with pool:
        for done in as_completed([pool.submit(_draw, task) for task in tasks]):
            yield done.result()


def _tasks(rows: Sequence[str], options: argparse.Namespace) -> Iterator[Task]:
    # the large pictures first: the small ones then fill the gaps at the end
    large_first = sorted(rows, key=lambda name: -ROWS[name].width * ROWS[name].height)
    for start in range(0, options.pictures, BATCH):
        indices = tuple(range(start, min(start + BATCH, options.pictures)))
        for row in large_first:
            yield Task(row, indices, options.steps, options.cfg_scale, options.sampler)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=12, help="pictures per row (default 12)")
    parser.add_argument("--rows", default=",".join(DEFAULT_ROWS), help=f"of {KNOWN_ROWS}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg-scale", type=float, default=3.0)
    parser.add_argument("--sampler", default="Euler")
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="folder for the contact sheet and the numbers"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep pictures in the folder, and draw only what is not there yet"
    )
    options = parser.parse_args(arguments)
    options.rows = list(dict.fromkeys(row for name in options.rows.split(",") for row in GROUPS.get(name, (name,))))
    unknown = [row for row in options.rows if row not in ROWS]
    if unknown:
        parser.error(f"unknown rows {', '.join(unknown)}: choose from {KNOWN_ROWS}")
    if options.pictures < 1 or options.steps < 1:
        parser.error(f"--pictures {options.pictures} and --steps {options.steps} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = draw_rows(options.rows, options)
    print(table(outcomes))
    if enlarged(outcomes):
        print("\n" + hires_table(outcomes))
    paired = paired_numbers(outcomes)
    if paired:
        print("\n" + paired_table(paired))
    sheet = options.out / "contact_sheet.png"
    shown = range(min(8, options.pictures))
    contact_sheet(
        [(ROWS[name].title, [outcome.pictures[i] for i in shown]) for name, outcome in outcomes.items()],
        [prompt(index) for index in shown],
    ).save(sheet)
    settings = {"steps": options.steps, "cfg_scale": options.cfg_scale, "sampler": options.sampler}
    (options.out / "numbers.json").write_text(as_json(outcomes, settings, paired))
    print(f"\nContact sheet: {sheet.resolve()}\nNumbers: {(options.out / 'numbers.json').resolve()}")


if __name__ == "__main__":
    main()
