"""Near-equal tiles of a map, as Near-sighted Tile and Near-sighted Attention use them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from torch import Tensor

from lib_hires.run import Size
from lib_hires.settings import number, toggle
from lib_hires.tiling import Windows, corners, even_tiles, owned, tile_starts, tokens_in


@dataclass(frozen=True)
class Tiles:
    """Tiles of equal size inside a map; where it is not divisible, neighbours overlap."""

    size: Size
    side: Size
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, size: Size, most: int, rng: random.Random | None) -> Tiles:
        """The fewest tiles of at most `most` x `most` tokens; with `rng` their overlaps lie elsewhere each time."""
        axes = []
        for length in size:
            count, side = even_tiles(length, most)
            spare = count * side - length
            axes.append((side, tuple(tile_starts(length, count, side, rng.randint(0, spare) if rng else 0))))
        (height, rows), (width, columns) = axes
        return cls(size, (height, width), rows, columns)

    @property
    def count(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def have_room(self) -> bool:
        """Whether they overlap, so that they could lie elsewhere."""
        return (len(self.rows) * self.side[0], len(self.columns) * self.side[1]) != self.size

    @property
    def area(self) -> int:
        return self.side[0] * self.side[1]

    def tokens(self) -> Tensor:
        """Token numbers [count, area]."""
        return tokens_in(corners(self.rows, self.columns), self.side, self.size)

    def asking(self, keys: Tensor) -> Windows:
        """Windows in which the tiles' tokens ask `keys` [count, M]; every token is answered once."""
        return owned(self.tokens(), keys, self.rows, self.columns, self.side, self.size)


def global_ratio(default: float, label: str, help: str) -> float:
    ratio: float = number(default, 0.0, 2.0, 0.05, label=label, help=help)
    return ratio


def shift_tiles() -> bool:
    switch: bool = toggle(
        True,
        label="Shift tiles",
        help="Moves tile borders from step to step where the size leaves room, so that no seam stays in one place.",
    )
    return switch


def only_where_faster() -> bool:
    switch: bool = toggle(
        True,
        label="Only where faster",
        help="Leaves maps alone that are not larger than those the model was trained for, or whose tiles would see as "
        "much as the whole map. Off: acts there too, which can be slower.",
    )
    return switch
