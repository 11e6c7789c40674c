"""The shape of an LDM UNet, read from the module itself: no table of models to keep up to date."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

INPUT, MIDDLE, OUTPUT = "input", "middle", "output"


@dataclass(frozen=True)
class AttentionLayer:
    """The self-attention of one transformer block: LDM block number on its side, and depth inside the block."""

    side: str
    block: int
    depth: int


@dataclass(frozen=True)
class UNetTopology:
    """Blocks in LDM numbering: SD 1.x and 2.x have 12 input and 12 output blocks, SDXL has 9 and 9."""

    input_blocks: int
    output_blocks: int
    downsamplers: tuple[int, ...]  # input blocks that halve the map
    attention: tuple[AttentionLayer, ...] = ()  # in the order in which they run

    def halvings_after(self, input_block: int) -> int:
        """How often the map is still halved on the way from this input block to the deepest level."""
        return sum(index > input_block for index in self.downsamplers)

    def level(self, layer: AttentionLayer) -> int:
        """How often the map was halved where this layer sits; an output block works at the size of its skip."""
        inputs = self.input_blocks
        paired = {INPUT: layer.block, MIDDLE: inputs, OUTPUT: inputs - 1 - layer.block}[layer.side]
        return sum(index <= paired for index in self.downsamplers)


def unet_topology(unet: Any) -> UNetTopology | None:
    """Topology of a UNet with LDM's block lists, or None for anything else. Classes are told by name: each host has
    its own copy of them."""
    if not all(hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        return None
    return UNetTopology(
        input_blocks=len(unet.input_blocks),
        output_blocks=len(unet.output_blocks),
        downsamplers=tuple(i for i, block in enumerate(unet.input_blocks) if _halves(block)),
        attention=tuple(self_attention_modules(unet)),
    )


def self_attention_modules(unet: Any) -> dict[AttentionLayer, Any]:
    """Every self-attention module (`attn1` of a transformer block) of an LDM UNet, in running order."""
    return {
        AttentionLayer(side, block, depth): attention
        for side, block, module in _blocks(unet)
        for depth, attention in enumerate(m.attn1 for m in module.modules() if hasattr(m, "attn1"))
    }


def _blocks(unet: Any) -> Iterator[tuple[str, int, Any]]:
    yield from ((INPUT, index, block) for index, block in enumerate(unet.input_blocks))
    yield MIDDLE, 0, unet.middle_block
    yield from ((OUTPUT, index, block) for index, block in enumerate(unet.output_blocks))


def _halves(block: Any) -> bool:
    """True for a strided Downsample, and for a ResBlock that downsamples (resblock_updown)."""
    return any(type(layer).__name__ == "Downsample" or getattr(layer, "updown", False) for layer in block.modules())
