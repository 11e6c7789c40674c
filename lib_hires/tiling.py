"""Windows of a token map: which tokens ask, which they ask, and how their answers become a map again.

Windows lie inside the map at any size; nothing is padded, so no empty token ever takes part in a softmax. A map is
[B, h*w, C], row major; windows are lists of token numbers, made on the CPU so that no device is waited for, gathered
from projected tokens and folded into the batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lib_hires.run import Run, Size
from lib_hires.sites import Attend, Place

T = TypeVar("T")
Corners = Sequence[Size]  # (row, column) of the first token of each window

# Elements of one gathered tensor: 128 MiB in half precision. The attention itself is bounded by the map's own.
MOST_ELEMENTS = 2**26


def even_tiles(length: int, most: int) -> tuple[int, int]:
    """The fewest tiles of at most `most` that cover `length`, as (count, side), sides as equal as they can be."""
    count = -(-length // most)
    return count, -(-length // count)


def tile_starts(length: int, count: int, side: int, offset: int = 0) -> list[int]:
    """Starts of `count` tiles that cover `length`, moved back by offset <= count * side - length; border tiles stay
    inside, so that they overlap their neighbours where the length is not divisible."""
    return [min(max(number * side - offset, 0), length - side) for number in range(count)]


def window_starts(length: int, side: int) -> list[int]:
    """Starts of half overlapping windows; the last one is flush with the border."""
    return [*range(0, length - side, max(side // 2, 1)), length - side]


def corners(rows: Sequence[int], columns: Sequence[int]) -> list[Size]:
    """The windows of two axes, row by row."""
    return [(row, column) for row in rows for column in columns]


def shifted(windows: Corners, most: int, side: Size, size: Size, rng: random.Random) -> list[Size]:
    """Each window moved by up to `most` tokens along both axes, and never out of the map. Windows at a border keep to
    it; with `most` up to an eighth of the side, half overlapping windows then still cover the map."""
    last = size[0] - side[0], size[1] - side[1]
    return [
        (_moved(row, rng.randint(-most, most), last[0]), _moved(column, rng.randint(-most, most), last[1]))
        for row, column in windows
    ]


def _moved(start: int, by: int, last: int) -> int:
    return min(max(start + by, 0), last) if 0 < start < last else start


def seeded(place: Place) -> random.Random:
    """Random numbers of one picture, noise level and map size: the same on every device and in every layer."""
    return random.Random(f"{place.seed} {place.call.sigma:.4g} {place.size}")


def tokens_in(windows: Corners, side: Size, size: Size) -> Tensor:
    """Token numbers [W, side] of windows in a map."""
    first = torch.tensor([row * size[1] + column for row, column in windows])
    rows, columns = (torch.arange(n) for n in side)
    return first[:, None] + (rows[:, None] * size[1] + columns).flatten()


def subgrids(size: Size, stride: Size) -> Tensor:
    """Token numbers [W, n] of the strided grids of a map, one for each offset.

    Where the size is not divisible, grids that would reach over the border take the last row or column instead, which
    belongs to another grid: all have the same size, and no token stands twice in one.
    """
    rows, columns = (
        (torch.arange(step)[:, None] + torch.arange(0, n, step)).clamp(max=n - 1)
        for n, step in zip(size, stride, strict=True)
    )
    grids = rows[:, None, :, None] * size[1] + columns[None, :, None, :]
    return grids.flatten(2).flatten(0, 1)


def strided_grids(size: Size, stride: Size) -> Windows:
    """Every strided grid of a map asks itself; a token is answered by the grid of its own offset."""
    tokens = subgrids(size, stride)
    (grid_row, row), (grid_column, column) = (
        (torch.arange(length) % step, torch.arange(length) // step) for length, step in zip(size, stride, strict=True)
    )
    grid = grid_row[:, None] * stride[1] + grid_column
    position = grid * tokens.shape[1] + row[:, None] * -(-size[1] // stride[1]) + column
    return Windows(tokens, tokens, ((torch.arange(size[0] * size[1]), position.flatten()),))


@dataclass(frozen=True)
class Windows:
    """Attention in windows: `queries` [W, T] ask `keys` [W, M], both as token numbers.

    `answers` says where a token's answers lie among the W * T. The first entry holds all tokens; further ones, if any,
    hold those that another window answered too.
    """

    queries: Tensor
    keys: Tensor
    answers: tuple[tuple[Tensor, Tensor], ...]  # (tokens, positions)

    def to(self, device: torch.device) -> Windows:
        answers = tuple((tokens.to(device), positions.to(device)) for tokens, positions in self.answers)
        return Windows(self.queries.to(device), self.keys.to(device), answers)


def averaged(queries: Tensor, keys: Tensor) -> Windows:
    """Windows whose answers are averaged where they overlap."""
    flat = queries.flatten()
    order = torch.argsort(flat, stable=True)
    tokens = flat[order]
    rank = torch.arange(len(flat)) - torch.searchsorted(
        tokens, tokens
    )  # how many answers of the same token come before
    layers = [rank == number for number in range(int(rank.max()) + 1)]
    return Windows(queries, keys, tuple((tokens[layer], order[layer]) for layer in layers))


def owned(
    queries: Tensor, keys: Tensor, rows: Sequence[int], columns: Sequence[int], side: Size, size: Size
) -> Windows:
    """A grid of tiles that answer every token once: the tile whose middle is nearest does."""
    (tile_row, row), (tile_column, column) = (
        _owners(starts, tile, length) for starts, tile, length in zip((rows, columns), side, size, strict=True)
    )
    tile = tile_row[:, None] * len(columns) + tile_column
    position = (tile * side[0] + row[:, None]) * side[1] + column
    return Windows(queries, keys, ((torch.arange(size[0] * size[1]), position.flatten()),))


def _owners(starts: Sequence[int], side: int, length: int) -> tuple[Tensor, Tensor]:
    """For every coordinate of an axis the tile that answers it, and the place inside that tile."""
    first, coordinate = torch.tensor(starts), torch.arange(length)
    owner = (coordinate[:, None] - (first + (side - 1) / 2)).abs().argmin(1)
    return owner, coordinate - first[owner]


def attend_in(windows: Windows, q: Tensor, k: Tensor, v: Tensor, inner: Attend, most: int = MOST_ELEMENTS) -> Tensor:
    """Attention [B, N, C] of a map inside windows: as few calls of `inner` as memory allows, all windows as rows."""
    at_once = _windows_at_once(windows, q, most)
    parts = [
        _gathered_attention(queries, keys, q, k, v, inner)
        for queries, keys in zip(windows.queries.split(at_once), windows.keys.split(at_once), strict=True)
    ]
    return _merged(windows, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))


def _windows_at_once(windows: Windows, q: Tensor, most: int) -> int:
    batch, tokens, channels = q.shape
    asking, asked = windows.queries.shape[1], windows.keys.shape[1]
    by_copies = most // (batch * max(asking, asked) * channels)
    by_scores = tokens * tokens // (asking * asked)  # hosts may form them all: no more than for the whole map
    return max(1, min(by_copies, by_scores))


def _gathered_attention(queries: Tensor, keys: Tensor, q: Tensor, k: Tensor, v: Tensor, inner: Attend) -> Tensor:
    out = inner(rows_of(q, queries), rows_of(k, keys), rows_of(v, keys))
    return out.reshape(len(q), queries.numel(), out.shape[-1])


def rows_of(tokens: Tensor, index: Tensor) -> Tensor:
    """[B, N, C] and token numbers [W, T] -> [B * W, T, C]."""
    return tokens.index_select(1, index.flatten()).reshape(len(tokens) * len(index), index.shape[1], tokens.shape[-1])


def _merged(windows: Windows, out: Tensor) -> Tensor:
    """The map of all answers. A running mean: equal answers give exactly themselves, and no order is left to chance."""
    (_, positions), *further = windows.answers
    mean = out.index_select(1, positions)
    if not further:
        return mean
    mean = mean.float()
    for number, (tokens, positions) in enumerate(further, start=2):
        so_far = mean.index_select(1, tokens)
        mean.index_copy_(1, tokens, so_far + (out.index_select(1, positions).float() - so_far) / number)
    return mean.to(out.dtype)


class Remembered:
    """The last few things that were made for a run, by key: layers of one size share their windows, and every picture
    may have its own. Dies with its patch."""

    def __init__(self, run: Run, most_per_picture: int = 16) -> None:
        self._made: dict[Hashable, object] = {}
        self._most = most_per_picture * len(run.seeds)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._made:
            if len(self._made) >= self._most:
                self._made.clear()
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]
