"""Sites on a UNet patcher (Forge, reForge, Classic, Neo), served by patches on a clone.

Only methods that all four share are used. The patches are closures over one cell that holds the current call: a
patcher's clone() deep-copies callable objects and bound methods, but not closures. Outside a call the cell is empty
and the patches return what they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from lib_hires.attention_walk import Acting, AttentionPatches, AttentionWalk, HostLayer, chained, changed_sources
from lib_hires.attention_walk import Rows as SomeRows
from lib_hires.feature_maps import FeatureMapWalk
from lib_hires.hosts.convolutions import ServedConvolutions
from lib_hires.hosts.patcher_rows import Fits, Rows
from lib_hires.plan import Plan
from lib_hires.resize import BILINEAR, map_size, resize
from lib_hires.run import Call
from lib_hires.sites import FeatureMaps, Place, Projections
from lib_hires.topology import INPUT, MIDDLE, OUTPUT, AttentionLayer, self_attention_modules

Control = dict[str, list[Any]]
HostAttention = Callable[..., Tensor]  # (q, k, v, heads)
Sources = tuple[Tensor, Tensor]  # tokens that K and V are projected from


@dataclass
class Cell:
    """What the patches see: empty between calls."""

    open: OpenCall | None = None


@dataclass
class OpenCall:
    """One denoiser call, as the patches see it."""

    call: Call
    walk: FeatureMapWalk
    attention: AttentionWalk
    rows: Rows
    control: Control = field(default_factory=dict)  # ControlNet's residuals that are still to be added
    whole: dict[AttentionLayer, Sources] = field(default_factory=dict)  # tokens of layers where sources differ by row


class PatchedUnet:
    """A clone of the host's UNet patcher that serves a plan's UNet sites while a call is open."""

    def __init__(self, unet: Any, plan: Plan, host_attention: HostAttention, fits: Fits) -> None:
        self.patcher = unet.clone()
        self.cell = Cell()
        self._fits = fits
        self._feature_patches = plan.at(FeatureMaps)
        self._attention = AttentionPatches.of(plan)
        self._convolutions = ServedConvolutions(unet.model.diffusion_model, plan)
        layers = self._layers(unet.model.diffusion_model)
        if self._feature_patches or layers:  # attention needs the true sizes that the walk notes
            last_input = len(unet.model.diffusion_model.input_blocks) - 1
            _install_feature_maps(self.patcher, self.cell, last_input)
        if self._attention.changing:
            _install_sources(self.patcher, self.cell)
        for layer, module in layers.items():
            _install_attention(self.patcher, self.cell, layer, module, host_attention)
        _wrap_function(self.patcher, self.cell, bool(self._feature_patches))

    def _layers(self, network: Any) -> dict[AttentionLayer, Any]:
        if not self._attention:
            return {}
        modules = self_attention_modules(network)
        return {layer: module for layer, module in modules.items() if self._attention.may_serve(layer)}

    @contextmanager
    def open(self, call: Call) -> Iterator[None]:
        self.cell.open = OpenCall(
            call,
            FeatureMapWalk(self._feature_patches, call),
            AttentionWalk(self._attention, call),
            Rows(any(patch.perturbs(call) for patch in self._attention.perturbing), self._fits),
        )
        try:
            with self._convolutions.open(call):
                yield
        finally:
            self.cell.open = None


def _install_feature_maps(patcher: Any, cell: Cell, last_input: int) -> None:
    def input_block(h: Tensor, options: dict[str, Any]) -> Tensor:
        if cell.open is None:
            return h
        h = _add_control(h, cell.open.control, INPUT)
        return cell.open.walk.leave_input(h, options["block"][1])

    def after_skip(h: Tensor, options: dict[str, Any]) -> Tensor:
        if cell.open is None:
            return h
        index = options["block"][1]
        h = cell.open.walk.go_deeper(h, index)
        if index == last_input:
            cell.open.walk.enter(MIDDLE, 0, h)
        else:
            cell.open.walk.enter(INPUT, index + 1, h)
        return h

    def output_block(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if cell.open is None:
            return h, skip
        index = options["block"][1]
        if index == 0:  # no patch point follows the middle block: its residual is added where its map arrives
            h = _add_control(h, cell.open.control, MIDDLE)
        h = cell.open.walk.meet_skip(h, index)
        cell.open.walk.enter(OUTPUT, index, h)
        return cell.open.walk.join(h, _add_control(skip, cell.open.control, OUTPUT), index)

    patcher.set_model_input_block_patch(input_block)
    patcher.set_model_input_block_patch_after_skip(after_skip)
    patcher.set_model_output_block_patch(output_block)


def _install_sources(patcher: Any, cell: Cell) -> None:
    def sources(n: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        layer = AttentionLayer(extra["block"][0], extra["block"][1], extra.get("block_index", 0))
        if cell.open is None or not cell.open.attention.serves(layer):
            return n, key, value
        heads = extra["n_heads"]
        if cell.open.attention.splits(layer, heads, len(key)):  # rows that change are projected when attention runs
            cell.open.whole[layer] = key, value
            return n, key, value
        return n, *cell.open.attention.sources(layer, heads, key, value)

    patcher.set_model_attn1_patch(sources)


def _install_attention(
    patcher: Any, cell: Cell, layer: AttentionLayer, module: Any, host_attention: HostAttention
) -> None:
    """Replace one self-attention. Where another extension replaced it already, its function serves the plain rows."""
    replaced = patcher.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
    other = replaced.get((layer.side, layer.block, layer.depth), replaced.get((layer.side, layer.block)))

    def attention(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        heads = extra["n_heads"]
        whole = cell.open.whole.pop(layer, None) if cell.open else None

        def plain(rows: SomeRows) -> Tensor:
            some = [t if len(rows) == len(t) else t[list(rows)] for t in (q, k, v)]
            if other is None:
                return host_attention(*some, heads)
            return other(*some, options(rows))

        def changed(rows: SomeRows, place: Place, acting: Acting) -> Tensor:
            some = [t if len(rows) == len(t) else t[list(rows)] for t in (q, k, v)]
            if whole is not None:
                key_source = whole[0][list(rows)]
                value_source = key_source if whole[1] is whole[0] else whole[1][list(rows)]  # one is reduced once
                key_source, value_source = changed_sources(acting, key_source, value_source, place)
                some[1:] = module.to_k(key_source), module.to_v(value_source)
            parts: Callable[..., Tensor] = partial(host_attention, heads=heads)
            whole_map = parts if other is None else lambda q, k, v: other(q, k, v, options(rows))
            return chained(acting, place, whole_map, parts)(*some)

        def options(rows: SomeRows) -> dict[str, Any]:
            return cell.open.rows.options_of(rows, extra) if cell.open and len(rows) < len(q) else extra

        def project(rows: SomeRows) -> Projections:
            return Projections(*(lambda t=t: t[list(rows)] for t in (q, k, v)))

        if cell.open is None or not cell.open.attention.serves(layer):
            return plain(range(len(q)))
        host = HostLayer(layer, heads, len(q), project, plain, changed, lambda out: out)
        return cell.open.attention.attention(host)

    patcher.set_model_attn1_replace(attention, layer.side, layer.block, layer.depth)


def _wrap_function(patcher: Any, cell: Cell, takes_control: bool) -> None:
    """Around every UNet evaluation: rows for the perturbed prediction, the walk's start, and ControlNet's residuals.

    The host adds a residual only where its size fits the map and drops it with a printed warning otherwise; with
    shrunk maps that would lose the control. We add it at the same points, resized to the map.
    """
    inner: Callable[..., Any] | None = patcher.model_options.get("model_function_wrapper")

    def evaluate(apply_model: Callable[..., Any], args: dict[str, Any]) -> Any:
        if inner is not None:
            return inner(apply_model, args)
        return apply_model(args["input"], args["timestep"], **args["c"])

    def wrapper(apply_model: Callable[..., Any], args: dict[str, Any]) -> Any:
        if cell.open is None:
            return evaluate(apply_model, args)
        rows = cell.open.rows
        extended = rows.extended(apply_model, args)
        cell.open.call.rows = rows.told(extended)
        cell.open.walk.enter(INPUT, 0, extended["input"])
        if takes_control:
            conditions = dict(extended["c"])
            control = conditions.pop("control", None)
            cell.open.control = {} if control is None else control
            extended = {**extended, "c": conditions}
        return rows.host_rows(evaluate(apply_model, extended), len(args["input"]))

    patcher.set_model_unet_function_wrapper(wrapper)


def _add_control(h: Tensor, control: Control, side: str) -> Tensor:
    """Add the residual that is next in line for this side, resized to the map where sizes differ."""
    residuals = control.get(side)
    residual = residuals.pop() if residuals else None
    if residual is None:
        return h
    if map_size(residual) != map_size(h):
        residual = resize(residual, map_size(h), BILINEAR, antialias=True)
    return h + residual
