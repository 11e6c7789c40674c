"""Names for self-attention layers that people know from other guidance nodes: "m0", "u0.4", "d2.2-9".

A letter for the side (d down, m middle, u up), the number of the block, and after a dot a depth or a range of depths in
the block's transformer. Only blocks that have self-attention are counted, so m0 is the middle of every model, SD 1.x
has d0 to d5, m0 and u0 to u8, and SDXL d0 to d3, m0 and u0 to u5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lib_hires.topology import INPUT, MIDDLE, OUTPUT, AttentionLayer, UNetTopology

FORM = "d, m or u and a block number, then a dot and a depth or a range of depths where wanted: m0, u0.4, d2.2-9"

_SIDES = {"d": INPUT, "m": MIDDLE, "u": OUTPUT}
_PART = re.compile(r"([dmu])([0-9]{1,4})(?:\.([0-9]{1,4})(?:-([0-9]{1,4}))?)?", re.IGNORECASE)


@dataclass(frozen=True)
class BlockChoice:
    """One part of the list. `last` is the last depth, included; both depths None: all of the block."""

    side: str
    number: int
    first: int | None = None
    last: int | None = None

    @property
    def block_name(self) -> str:
        return f"{_letter(self.side)}{self.number}"

    def __str__(self) -> str:
        if self.first is None:
            return self.block_name
        return f"{self.block_name}.{self.first}" + ("" if self.last == self.first else f"-{self.last}")


def parse_blocks(grammar: str) -> tuple[BlockChoice, ...]:
    """Read a comma list such as "m0, d2.2-9". Raises ValueError with the form."""
    parts = [part.strip() for part in grammar.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"name at least one block: {FORM}")
    return tuple(_parse_part(part) for part in parts)


def _parse_part(part: str) -> BlockChoice:
    match = _PART.fullmatch(part)
    if match is None:
        raise ValueError(f"{part!r} is not of the form {FORM}")
    letter, number, first, last = match.groups()
    if first is None:
        return BlockChoice(_SIDES[letter.lower()], int(number))
    choice = BlockChoice(_SIDES[letter.lower()], int(number), int(first), int(first if last is None else last))
    if int(first) > int(last or first):
        raise ValueError(f"the depths in {part!r} run backwards: write {choice.block_name}.{last}-{first}")
    return choice


def resolve_blocks(choices: tuple[BlockChoice, ...], unet: UNetTopology) -> tuple[AttentionLayer, ...]:
    """The layers that are meant, in running order, each once. Raises LookupError that says what exists."""
    blocks = _blocks_with_attention(unet)
    chosen: set[AttentionLayer] = set()
    for choice in choices:
        chosen.update(_layers(choice, blocks))
    return tuple(layer for layer in unet.attention if layer in chosen)


def layer_names(layers: tuple[AttentionLayer, ...], unet: UNetTopology) -> str:
    """The layers in the grammar above, as short as it goes: "m0, d2.2-9"."""
    names = []
    for block, members in _blocks_with_attention(unet).items():
        depths = [layer.depth for layer in layers if layer in members]
        if len(depths) == len(members):
            names.append(block)
        else:
            names += [str(BlockChoice(_SIDES[block[0]], int(block[1:]), *run)) for run in _runs(depths)]
    return ", ".join(names)


def _blocks_with_attention(unet: UNetTopology) -> dict[str, list[AttentionLayer]]:
    """Block name -> its layers by depth, in running order."""
    blocks: dict[str, list[AttentionLayer]] = {}
    for side in (INPUT, MIDDLE, OUTPUT):
        numbers = sorted({layer.block for layer in unet.attention if layer.side == side})
        for index, number in enumerate(numbers):
            layers = [layer for layer in unet.attention if (layer.side, layer.block) == (side, number)]
            blocks[f"{_letter(side)}{index}"] = sorted(layers, key=lambda layer: layer.depth)
    return blocks


def _layers(choice: BlockChoice, blocks: dict[str, list[AttentionLayer]]) -> list[AttentionLayer]:
    layers = blocks.get(choice.block_name)
    if layers is None:
        raise LookupError(f"{choice} does not exist; blocks with attention are {_existing(blocks)}")
    if choice.first is None or choice.last is None:
        return layers
    if choice.last >= len(layers):
        raise LookupError(f"{choice} does not exist; {choice.block_name} has {_span('depth', 0, len(layers) - 1)}")
    return layers[choice.first : choice.last + 1]


def _existing(blocks: dict[str, list[AttentionLayer]]) -> str:
    spans = []
    for letter in _SIDES:
        count = sum(block.startswith(letter) for block in blocks)
        if count:
            spans.append(f"{letter}0" if count == 1 else f"{letter}0 to {letter}{count - 1}")
    return ", ".join(spans) or "none"


def _span(noun: str, first: int, last: int) -> str:
    return f"only {noun} {first}" if first == last else f"{noun}s {first} to {last}"


def _runs(depths: list[int]) -> list[tuple[int, int]]:
    """Consecutive depths as (first, last)."""
    starts = [depth for depth in depths if depth - 1 not in depths]
    ends = [depth for depth in depths if depth + 1 not in depths]
    return list(zip(starts, ends, strict=True))


def _letter(side: str) -> str:
    return next(letter for letter, meant in _SIDES.items() if meant == side)
