"""The shape of an LDM UNet, read from the module itself: no table of models to keep up to date."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UNetTopology:
    """Blocks in LDM numbering: SD 1.x and 2.x have 12 input and 12 output blocks, SDXL has 9 and 9."""

    input_blocks: int
    output_blocks: int
    downsamplers: tuple[int, ...]  # input blocks that halve the map

    def halvings_after(self, input_block: int) -> int:
        """How often the map is still halved on the way from this input block to the deepest level."""
        return sum(index > input_block for index in self.downsamplers)


def unet_topology(unet: Any) -> UNetTopology | None:
    """Topology of a UNet with LDM's block lists, or None for anything else. Classes are told by name: each host has
    its own copy of them."""
    if not all(hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        return None
    return UNetTopology(
        input_blocks=len(unet.input_blocks),
        output_blocks=len(unet.output_blocks),
        downsamplers=tuple(i for i, block in enumerate(unet.input_blocks) if _halves(block)),
    )


def _halves(block: Any) -> bool:
    """True for a strided Downsample, and for a ResBlock that downsamples (resblock_updown)."""
    return any(type(layer).__name__ == "Downsample" or getattr(layer, "updown", False) for layer in block.modules())
