"""Sites on an LDM UNet (A1111's ldm and sgm, and the bench), served by module hooks.

Hooks are registered for one denoiser call and removed in `finally`: between calls, and after an exception at any depth,
the modules are untouched. Registering costs microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lib_hires.feature_maps import FeatureMapWalk
from lib_hires.plan import Plan
from lib_hires.run import Call
from lib_hires.sites import FeatureMaps
from lib_hires.topology import INPUT, MIDDLE, OUTPUT


@contextmanager
def patched_unet(unet: nn.Module, plan: Plan, call: Call) -> Iterator[None]:
    """Serve the plan's UNet sites on `unet` for the duration of one denoiser call."""
    with ExitStack() as stack:
        feature_patches = plan.at(FeatureMaps)
        if feature_patches:
            stack.enter_context(_walked(unet, FeatureMapWalk(feature_patches, call)))
        yield


@contextmanager
def _walked(unet: Any, walk: FeatureMapWalk) -> Iterator[None]:
    inputs: Sequence[nn.Module] = unet.input_blocks
    outputs: Sequence[nn.Module] = unet.output_blocks
    with ExitStack() as stack:

        def before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
            handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
            stack.callback(handle.remove)

        def after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
            handle = module.register_forward_hook(lambda _, __, out: change(out))
            stack.callback(handle.remove)

        for index, block in enumerate(inputs):
            before(block, partial(_enter_input, walk, INPUT, index))
            after(block, partial(walk.leave_input, index=index))
        before(unet.middle_block, partial(_enter_input, walk, MIDDLE, len(inputs)))
        after(unet.middle_block, partial(walk.meet_skip, index=0))
        for index, block in enumerate(outputs):
            before(block, partial(_enter_output, walk, index))
            if index + 1 < len(outputs):
                after(block, partial(walk.meet_skip, index=index + 1))
        yield


def _enter_input(walk: FeatureMapWalk, side: str, index: int, h: Tensor) -> Tensor:
    """LDM stores what a block returned as the skip, so "after the skip" is the moment before the next block."""
    if index > 0:
        h = walk.go_deeper(h, index - 1)
    walk.enter(side, 0 if side == MIDDLE else index, h)
    return h


def _enter_output(walk: FeatureMapWalk, index: int, h: Tensor) -> Tensor:
    walk.enter(OUTPUT, index, h)
    return h
