"""The feature-map site, as every host serves it: one walk through one UNet evaluation.

A host tells the walk when a map enters or leaves a block; the walk asks the patches, in order, and notes the true size
of every level in `call.sizes`. What differs between hosts is only how they notice these moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib_hires.resize import map_size
from lib_hires.run import Call, Size
from lib_hires.sites import FeatureMaps
from lib_hires.topology import INPUT


class FeatureMapWalk:
    """Follows the maps of one denoiser call; a call may evaluate the UNet several times, each from input block 0 on."""

    def __init__(self, patches: Sequence[FeatureMaps], call: Call) -> None:
        self._patches = patches
        self._call = call
        self._joining = [patch for patch in patches if type(patch).join is not FeatureMaps.join]
        self._skips: list[Size] = []
        self._backbone_channels = 0  # of the map that last arrived at a skip

    def enter(self, side: str, index: int, h: Tensor) -> None:
        """A map is about to enter a block."""
        if side == INPUT and index == 0:
            self._skips.clear()
        self._call.sizes[side, index] = map_size(h)

    def leave_input(self, h: Tensor, index: int) -> Tensor:
        """A map left an input block and is about to be stored as a skip."""
        for patch in self._patches:
            h = patch.input_block(h, index, self._call)
        self._skips.append(map_size(h))
        return h

    def go_deeper(self, h: Tensor, index: int) -> Tensor:
        """The skip of input block `index` is stored; the map goes on to the next block."""
        for patch in self._patches:
            h = patch.after_skip(h, index, self._call)
        return h

    def meet_skip(self, h: Tensor, index: int) -> Tensor:
        """A map is about to be joined with the skip of output block `index`. A mismatch that no patch claims is left
        to the host."""
        self._backbone_channels = h.shape[1]
        size = self._skips[-1 - index]
        if map_size(h) == size:
            return h
        for patch in self._patches:
            grown = patch.grow(h, size, index, self._call)
            if grown is not None:
                return grown
        return h

    def join(self, h: Tensor, skip: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The map and its skip are about to be joined in output block `index`."""
        for patch in self._joining:
            h, skip = patch.join(h, skip, index, self._call)
        return h, skip

    def join_concatenated(self, both: Tensor, index: int) -> Tensor:
        """The same for a host that shows the two only as one tensor, the map's channels first."""
        if not self._joining:
            return both
        parts = both[:, : self._backbone_channels], both[:, self._backbone_channels :]
        h, skip = self.join(*parts, index)
        if h is parts[0] and skip is parts[1]:
            return both
        return torch.cat([h, skip], dim=1)
