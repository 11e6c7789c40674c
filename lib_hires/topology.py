"""The shape of an LDM UNet, read from the module itself: no table of models to keep up to date."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

INPUT, MIDDLE, OUTPUT = "input", "middle", "output"
DOWN, UP, FIRST_CONV, SECOND_CONV = "down", "up", "in", "out"  # LDM: op, conv, in_layers, out_layers


@dataclass(frozen=True)
class AttentionLayer:
    """The self-attention of one transformer block: LDM block number on its side, and depth inside the block."""

    side: str
    block: int
    depth: int


@dataclass(frozen=True)
class ConvLayer:
    """One convolution with more than one tap: LDM block number on its side, and module path inside the block."""

    side: str
    block: int
    path: str
    level: int  # how often the map that it meets was halved

    @property
    def part(self) -> str:
        """Which convolution of the block it is: DOWN, UP, FIRST_CONV or SECOND_CONV of a ResBlock; empty: another."""
        names = {"op": DOWN, "conv": UP, "in_layers": FIRST_CONV, "out_layers": SECOND_CONV}
        return next((part for name, part in names.items() if name in self.path.split(".")), "")


@dataclass(frozen=True)
class UNetTopology:
    """Blocks in LDM numbering: SD 1.x and 2.x have 12 input and 12 output blocks, SDXL has 9 and 9."""

    input_blocks: int
    output_blocks: int
    downsamplers: tuple[int, ...]  # input blocks that halve the map
    attention: tuple[AttentionLayer, ...] = ()  # in the order in which they run
    convolutions: tuple[ConvLayer, ...] = ()
    model_channels: int = 0  # channels of the first level; 0: unknown
    backbone_channels: tuple[int, ...] = ()  # of the map that meets the skip of each output block; 0: unknown

    def halvings_after(self, input_block: int) -> int:
        """How often the map is still halved on the way from this input block to the deepest level."""
        return sum(index > input_block for index in self.downsamplers)

    def halvings_at(self, side: str, block: int) -> int:
        """How often the maps of a block were halved; an output block works at the size of its skip."""
        inputs = self.input_blocks
        paired = {INPUT: block, MIDDLE: inputs, OUTPUT: inputs - 1 - block}[side]
        return sum(index <= paired for index in self.downsamplers)


def unet_topology(unet: Any) -> UNetTopology | None:
    """Topology of a UNet with LDM's block lists, or None for anything else. Classes are told by name: each host has
    its own copy of them."""
    if not all(hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        return None
    return UNetTopology(
        input_blocks=len(unet.input_blocks),
        output_blocks=len(unet.output_blocks),
        downsamplers=_downsamplers(unet),
        attention=tuple(self_attention_modules(unet)),
        convolutions=tuple(convolution_modules(unet)),
        model_channels=_channels_out(unet.input_blocks[0]),
        backbone_channels=tuple(_channels_out(block) for block in [unet.middle_block, *unet.output_blocks][:-1]),
    )


def self_attention_modules(unet: Any) -> dict[AttentionLayer, Any]:
    """Every self-attention module (`attn1` of a transformer block) of an LDM UNet, in running order."""
    return {
        AttentionLayer(side, block, depth): attention
        for side, block, module in _blocks(unet)
        for depth, attention in enumerate(m.attn1 for m in module.modules() if hasattr(m, "attn1"))
    }


def convolution_modules(unet: Any) -> dict[ConvLayer, Any]:
    """Every convolution of the blocks whose kernel is larger than 1x1, in running order."""
    inputs, downsamplers = len(unet.input_blocks), _downsamplers(unet)
    return {
        ConvLayer(side, index, path, _level(side, index, path, inputs, downsamplers)): module
        for side, index, block in _blocks(unet)
        for path, module in block.named_modules()
        if _is_convolution(module) and max(module.kernel_size) > 1
    }


def _level(side: str, index: int, path: str, inputs: int, downsamplers: tuple[int, ...]) -> int:
    if side == MIDDLE:
        return len(downsamplers)
    if side == OUTPUT:  # an Upsample doubles before its convolution
        return sum(down < inputs - index for down in downsamplers) - path.endswith("conv")
    inside = index in downsamplers and not path.endswith("op")  # a ResBlock halves before its first convolution
    return sum(down < index for down in downsamplers) + inside


def _is_convolution(module: Any) -> bool:
    return hasattr(module, "_conv_forward") and hasattr(module, "dilation")


def _channels_out(block: Any) -> int:
    """Channels of the map that a block returns: its last convolution has them. 0: it has no convolution."""
    return next((module.out_channels for module in reversed(list(block.modules())) if _is_convolution(module)), 0)


def _downsamplers(unet: Any) -> tuple[int, ...]:
    return tuple(i for i, block in enumerate(unet.input_blocks) if _halves(block))


def _blocks(unet: Any) -> Iterator[tuple[str, int, Any]]:
    yield from ((INPUT, index, block) for index, block in enumerate(unet.input_blocks))
    yield MIDDLE, 0, unet.middle_block
    yield from ((OUTPUT, index, block) for index, block in enumerate(unet.output_blocks))


def _halves(block: Any) -> bool:
    """True for a strided Downsample, and for a ResBlock that downsamples (resblock_updown)."""
    return any(type(layer).__name__ == "Downsample" or getattr(layer, "updown", False) for layer in block.modules())
