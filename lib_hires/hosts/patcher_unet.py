"""Sites on a UNet patcher (Forge, reForge, Classic, Neo), served by block patches on a clone.

Only methods that all four share are used. The patches are closures over one cell that holds the walk of the current
call: a patcher's clone() deep-copies callable objects and bound methods, but not closures. Outside a call the cell is
empty and the patches return what they were given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lib_hires.feature_maps import FeatureMapWalk
from lib_hires.plan import Plan
from lib_hires.resize import BILINEAR, map_size, resize
from lib_hires.run import Call
from lib_hires.sites import FeatureMaps
from lib_hires.topology import INPUT, MIDDLE, OUTPUT

Control = dict[str, list[Any]]


@dataclass
class _Cell:
    """What the patches see: empty between calls."""

    walk: FeatureMapWalk | None = None
    control: Control = field(default_factory=dict)


class PatchedUnet:
    """A clone of the host's UNet patcher that serves a plan's sites while a call is open."""

    def __init__(self, unet: Any, plan: Plan) -> None:
        self.patcher = unet.clone()
        self._feature_patches = plan.at(FeatureMaps)
        self._cell = _Cell()
        if self._feature_patches:
            last_input = len(unet.model.diffusion_model.input_blocks) - 1
            _install_feature_maps(self.patcher, self._cell, last_input)

    def open(self, call: Call) -> None:
        self._cell.walk = FeatureMapWalk(self._feature_patches, call) if self._feature_patches else None

    def close(self) -> None:
        self._cell.walk = None
        self._cell.control = {}


def _install_feature_maps(patcher: Any, cell: _Cell, last_input: int) -> None:
    def input_block(h: Tensor, options: dict[str, Any]) -> Tensor:
        if cell.walk is None:
            return h
        h = _add_control(h, cell.control, INPUT)
        return cell.walk.leave_input(h, options["block"][1])

    def after_skip(h: Tensor, options: dict[str, Any]) -> Tensor:
        if cell.walk is None:
            return h
        index = options["block"][1]
        h = cell.walk.go_deeper(h, index)
        if index == last_input:
            cell.walk.enter(MIDDLE, 0, h)
        else:
            cell.walk.enter(INPUT, index + 1, h)
        return h

    def output_block(h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if cell.walk is None:
            return h, skip
        index = options["block"][1]
        if index == 0:  # no patch point follows the middle block: its residual is added where its map arrives
            h = _add_control(h, cell.control, MIDDLE)
        h = cell.walk.meet_skip(h, index)
        cell.walk.enter(OUTPUT, index, h)
        return h, _add_control(skip, cell.control, OUTPUT)

    patcher.set_model_input_block_patch(input_block)
    patcher.set_model_input_block_patch_after_skip(after_skip)
    patcher.set_model_output_block_patch(output_block)
    _wrap_function(patcher, cell)


def _wrap_function(patcher: Any, cell: _Cell) -> None:
    """Around every UNet evaluation: start the walk, and take ControlNet's residuals into our own hands.

    The host adds a residual only where its size fits the map and drops it with a printed warning otherwise; with
    shrunk maps that would lose the control. We add it at the same points, resized to the map.
    """
    inner: Callable[..., Any] | None = patcher.model_options.get("model_function_wrapper")

    def wrapper(apply_model: Callable[..., Any], args: dict[str, Any]) -> Any:
        if cell.walk is not None:
            conditions = dict(args["c"])
            control = conditions.pop("control", None)
            cell.control = {} if control is None else control
            cell.walk.enter(INPUT, 0, args["input"])
            args = {**args, "c": conditions}
        if inner is not None:
            return inner(apply_model, args)
        return apply_model(args["input"], args["timestep"], **args["c"])

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
