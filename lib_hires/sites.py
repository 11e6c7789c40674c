"""Sites: the places in a host where a technique may act. A closed list; a new site is a change to every host.

A technique's patch derives from the sites that it uses and overrides the methods it needs. Hosts ask a plan who is
`at` a site, and never who the technique is. docs/architecture.md lists the sites that are still to come.
"""

from __future__ import annotations

from torch import Tensor

from lib_hires.run import Call, Size


class FeatureMaps:
    """Feature maps [B, C, h, w] entering or leaving a UNet block, and the skip that an output block meets."""

    def input_block(self, h: Tensor, index: int, call: Call) -> Tensor:
        """The map that leaves input block `index`, before it is stored as a skip: changes the skip too."""
        return h

    def after_skip(self, h: Tensor, index: int, call: Call) -> Tensor:
        """The same map after the skip was stored: changes only what goes deeper."""
        return h

    def grow(self, h: Tensor, size: Size, index: int, call: Call) -> Tensor | None:
        """Bring `h` to the size of the skip that output block `index` joins it with. None: not mine."""
        return None
