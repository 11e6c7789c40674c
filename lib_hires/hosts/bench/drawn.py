"""Pictures of a long job on disk, so that it can be broken off and continued."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from lib_hires.hosts.bench.compare_rows import ROWS
from lib_hires.hosts.bench.outcome import Batch


class Drawn:
    """A folder with a file for every batch. Off: finds nothing and keeps nothing.

    A file is found again by what was asked for: the row with all its settings, steps, CFG scale, sampler and seeds.
    Whether formulas have changed since, it cannot know.
    """

    def __init__(self, folder: Path, on: bool) -> None:
        self._folder = folder
        self._on = on

    def find(self, task: Any) -> Batch | None:
        if not self._on or not self._file(task).exists():
            return None
        with np.load(self._file(task)) as saved:
            return Batch(
                task.indices,
                saved["pictures"],
                float(saved["seconds"]),
                int(saved["unet_calls"]),
                int(saved["operations"]),
            )

    def keep(self, task: Any, batch: Batch) -> None:
        if not self._on:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._folder / "unfinished.npz"
        np.savez_compressed(
            unfinished,
            pictures=batch.pictures,
            seconds=batch.seconds,
            unet_calls=batch.unet_calls,
            operations=batch.operations,
        )
        unfinished.rename(self._file(task))

    def _file(self, task: Any) -> Path:
        asked = f"{task} {ROWS[task.row]} {ROWS[task.row].selection()}"
        return self._folder / f"{task.row}-{task.indices[0]}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.npz"
