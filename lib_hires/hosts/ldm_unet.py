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

from lib_hires.attention import attend
from lib_hires.attention_walk import Acting, AttentionPatches, AttentionWalk, HostLayer, Rows, chained, changed_sources
from lib_hires.feature_maps import FeatureMapWalk
from lib_hires.hosts.convolutions import ServedConvolutions
from lib_hires.hosts.instance import instance_attribute
from lib_hires.plan import Plan
from lib_hires.run import Call
from lib_hires.sites import FeatureMaps, Place, Projections
from lib_hires.topology import INPUT, MIDDLE, OUTPUT, AttentionLayer, self_attention_modules

Adapt = Callable[[Tensor], tuple[Tensor, Tensor]]  # tokens -> what the host projects K from, and V


def unadapted(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens, tokens


class HookedUnet:
    """Serves a plan's UNet sites on `unet` while a call is open.

    `adapt` is what the host's own attention does to tokens before it projects keys and values (hypernetworks).
    """

    def __init__(self, unet: nn.Module, plan: Plan, adapt: Adapt = unadapted) -> None:
        self._unet = unet
        self._adapt = adapt
        self._feature_patches = plan.at(FeatureMaps)
        self._attention_patches = AttentionPatches.of(plan)
        self._attention = self_attention_modules(unet) if self._attention_patches else {}
        self._convolutions = ServedConvolutions(unet, plan)

    @contextmanager
    def open(self, call: Call) -> Iterator[None]:
        attention = AttentionWalk(self._attention_patches, call)
        served = {layer: module for layer, module in self._attention.items() if attention.serves(layer)}
        with ExitStack() as stack:
            stack.enter_context(self._convolutions.open(call))
            if self._feature_patches or served:  # attention needs the true sizes that the walk notes
                stack.enter_context(_walked(self._unet, FeatureMapWalk(self._feature_patches, call)))
            for layer, module in served.items():
                forward = _served_attention(attention, layer, module, self._adapt)
                stack.enter_context(instance_attribute(module, "forward", forward))
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
    return walk.join_concatenated(h, index)


def _served_attention(walk: AttentionWalk, layer: AttentionLayer, module: Any, adapt: Adapt) -> Callable[..., Tensor]:
    """A forward for one self-attention module. Rows that nobody changes go through the module's own forward, which
    may be the host's optimised one or another extension's."""
    original = module.forward

    def keys(source: Tensor) -> Tensor:
        return module.to_k(adapt(source)[0])

    def values(source: Tensor) -> Tensor:
        return module.to_v(adapt(source)[1])

    def forward(x: Tensor, context: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if context is not None and context is not x:
            return original(x, context, *args, **kwargs)

        def plain(rows: Rows) -> Tensor:
            return original(x if len(rows) == len(x) else x[list(rows)], None, *args, **kwargs)

        def project(rows: Rows) -> Projections:
            tokens = x[list(rows)]
            return Projections(lambda: module.to_q(tokens), lambda: keys(tokens), lambda: values(tokens))

        def changed(rows: Rows, place: Place, acting: Acting) -> Tensor:
            tokens = x if len(rows) == len(x) else x[list(rows)]
            key_source, value_source = changed_sources(acting, tokens, tokens, place)
            end = partial(attend, heads=module.heads)
            projected = module.to_q(tokens), keys(key_source), values(value_source)
            return module.to_out(chained(acting, place, end, end)(*projected))

        host = HostLayer(layer, module.heads, len(x), project, plain, changed, module.to_out)
        return walk.attention(host)

    return forward
