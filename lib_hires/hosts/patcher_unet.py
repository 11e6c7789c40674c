"""Sites on a UNet patcher (Forge, reForge, Classic, Neo), served by patches on a clone.

Only methods that all four share are used. The patches are closures over one cell that holds the current call: a
patcher's clone() deep-copies callable objects and bound methods, but not closures. Outside a call the cell is empty
and the patches return what they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lib_hires.attention import AttentionWalk
from lib_hires.attention import Rows as SomeRows
from lib_hires.feature_maps import FeatureMapWalk
from lib_hires.hosts.convolutions import ServedConvolutions
from lib_hires.hosts.patcher_rows import Fits, Rows
from lib_hires.plan import Plan
from lib_hires.resize import BILINEAR, map_size, resize
from lib_hires.run import Call
from lib_hires.sites import FeatureMaps, PerturbedAttention, Projections, RecordedAttention
from lib_hires.topology import INPUT, MIDDLE, OUTPUT, AttentionLayer, self_attention_modules

Control = dict[str, list[Any]]
HostAttention = Callable[..., Tensor]  # (q, k, v, heads)


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


class PatchedUnet:
    """A clone of the host's UNet patcher that serves a plan's UNet sites while a call is open."""

    def __init__(self, unet: Any, plan: Plan, host_attention: HostAttention, fits: Fits) -> None:
        self.patcher = unet.clone()
        self.cell = Cell()
        self._fits = fits
        self._feature_patches = plan.at(FeatureMaps)
        self._perturbing = plan.at(PerturbedAttention)
        self._recording = plan.at(RecordedAttention)
        self._convolutions = ServedConvolutions(unet.model.diffusion_model, plan)
        layers = self._layers(unet.model.diffusion_model)
        if self._feature_patches or layers:  # attention needs the true sizes that the walk notes
            last_input = len(unet.model.diffusion_model.input_blocks) - 1
            _install_feature_maps(self.patcher, self.cell, last_input)
        for layer in layers:
            _install_attention(self.patcher, self.cell, layer, host_attention)
        _wrap_function(self.patcher, self.cell, bool(self._feature_patches))

    def _layers(self, network: Any) -> list[AttentionLayer]:
        watching = [*self._perturbing, *self._recording]
        if not watching:
            return []
        in_layer = [patch.perturbs_in for patch in self._perturbing] + [patch.records_in for patch in self._recording]
        return [layer for layer in self_attention_modules(network) if any(serves(layer) for serves in in_layer)]

    @contextmanager
    def open(self, call: Call) -> Iterator[None]:
        self.cell.open = OpenCall(
            call,
            FeatureMapWalk(self._feature_patches, call),
            AttentionWalk(self._perturbing, self._recording, call),
            Rows(any(patch.perturbs(call) for patch in self._perturbing), self._fits),
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


def _install_attention(patcher: Any, cell: Cell, layer: AttentionLayer, host_attention: HostAttention) -> None:
    """Replace one self-attention. Where another extension replaced it already, its function serves the plain rows."""
    replaced = patcher.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
    other = replaced.get((layer.side, layer.block, layer.depth), replaced.get((layer.side, layer.block)))

    def attention(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        heads = extra["n_heads"]

        def plain(rows: SomeRows) -> Tensor:
            some = [t if len(rows) == len(t) else t[list(rows)] for t in (q, k, v)]
            if other is None:
                return host_attention(*some, heads)
            return other(*some, cell.open.rows.host_options(extra) if cell.open and len(rows) < len(q) else extra)

        def project(rows: SomeRows) -> Projections:
            return Projections(*(lambda t=t: t[list(rows)] for t in (q, k, v)))

        if cell.open is None or not cell.open.attention.serves(layer):
            return plain(range(len(q)))
        return cell.open.attention.attention(layer, heads, len(q), project, plain, lambda out: out)

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
        cell.open.call.rows = rows.kinds(extended)
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
