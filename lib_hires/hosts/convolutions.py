"""The convolution site, as every host serves it: the host's own modules, with wider taps while they run.

A module's `dilation` and `padding` are changed on the instance for the length of its own forward, and put back in
`finally`. So the weights go through whatever the host does with them (casts, quantised storage, LoRA, streams), which
ends in torch's `_conv_forward` and reads the two attributes there. Around that, a fractional factor f is a dilation of
ceil(f) on a map that is enlarged by ceil(f) / f (He et al. 2023, ScaleCrafter, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from lib_hires.hosts.instance import instance_attribute
from lib_hires.plan import Plan
from lib_hires.resize import BILINEAR, map_size, resize
from lib_hires.run import Call, Size
from lib_hires.sites import Convolutions
from lib_hires.topology import ConvLayer, convolution_modules


class ServedConvolutions:
    """Serves a plan's convolution patches on the modules of `unet` while a call is open."""

    def __init__(self, unet: Any, plan: Plan) -> None:
        self._patches = plan.at(Convolutions)
        modules = convolution_modules(unet) if self._patches else {}
        self._served = {
            layer: module
            for layer, module in modules.items()
            if any(patch.dilates_in(layer) for patch in self._patches)
        }

    @contextmanager
    def open(self, call: Call) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, module in self._served.items():
                stack.enter_context(instance_attribute(module, "forward", self._forward(layer, module, call)))
            yield

    def _forward(self, layer: ConvLayer, module: Any, call: Call) -> Callable[[Tensor], Tensor]:
        original = module.forward

        def forward(x: Tensor) -> Tensor:
            size = map_size(x)
            factor = math.prod(patch.dilation(layer, size, call) for patch in self._patches if patch.dilates_in(layer))
            return original(x) if factor == 1 else dilated(module, original, x, factor)

        return forward


def dilated(module: Any, original: Callable[[Tensor], Tensor], x: Tensor, factor: float) -> Tensor:
    """What `original`, the forward of convolution `module`, returns with its taps `factor` > 1 apart.

    x [B, C, h, w]; the result has the size that the plain convolution would give it, also where that is odd.
    """
    whole = math.ceil(factor)
    height, width = map_size(x)
    enlarged = round(height * whole / factor), round(width * whole / factor)
    with _taps_apart(module, whole):
        out = original(resize(x, enlarged, BILINEAR))
    return resize(out, _plain_size(module, (height, width)), BILINEAR)


@contextmanager
def _taps_apart(module: Any, factor: int) -> Iterator[None]:
    """The outer taps reach `factor` times as far from the centre of the kernel, and the padding goes with them."""
    reach = (dilation * (kernel - 1) // 2 for dilation, kernel in zip(module.dilation, module.kernel_size, strict=True))
    padding = tuple(pad + (factor - 1) * cells for pad, cells in zip(module.padding, reach, strict=True))
    attributes = {
        "dilation": tuple(factor * dilation for dilation in module.dilation),
        "padding": padding,
        # what torch pads by in other modes than zeros: hosts make pictures tileable with "circular"
        "_reversed_padding_repeated_twice": [cells for cells in reversed(padding) for _ in range(2)],
    }
    with ExitStack() as stack:
        for name, value in attributes.items():
            stack.enter_context(instance_attribute(module, name, value))
        yield


def _plain_size(module: Any, size: Size) -> Size:
    """Size of the plain convolution's result."""
    height, width = (
        (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for n, padding, dilation, kernel, stride in zip(
            size, module.padding, module.dilation, module.kernel_size, module.stride, strict=True
        )
    )
    return height, width
