"""The guidance site on a UNet patcher (Forge, reForge, Classic, Neo).

A conditioning modifier learns the CFG scale and the weights of the prompts at every call, and switches uncond off where
nobody needs it. A post-CFG function, put before those of other extensions, then makes the denoised result. The
single CFG function slot stays free: if another extension holds it, its function mixes what our techniques hand it, and
they go on with what it returns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lib_hires.guidance import GuidancePipeline
from lib_hires.hosts.patcher_unet import Cell
from lib_hires.run import PERTURBED, UNCOND
from lib_hires.sites import Predictions

log = logging.getLogger("hires_plus")

Evaluate = Callable[..., tuple[Tensor, Tensor]]
"""The host's (model, cond, uncond, x, sigma, model_options) -> (x0 of cond, x0 of uncond)"""


@dataclass
class _Conditions:
    """What a call was given."""

    scale: float = 1.0
    strength: float = 1.0  # sum of the weights of prompts joined by AND


def install_guidance(patcher: Any, cell: Cell, pipeline: GuidancePipeline, evaluate: Evaluate) -> None:
    """Serve the guidance site on a patcher that is ours (a clone), while its cell holds a call."""
    given = _Conditions()

    def modify_conditions(
        model: Any, x: Tensor, timestep: Tensor, uncond: Any, cond: Any, scale: float, options: Any, seed: Any
    ) -> tuple[Any, ...]:
        if cell.open is not None:
            if pipeline.skips_uncond(cell.open.call):
                scale = 1.0  # the host then leaves uncond out
            given.scale = scale
            given.strength = sum(entry.get("strength", 1.0) for entry in cond)
            cell.open.rows.single_cond = len(cond) == 1 and not {"area", "mask"} & set(cond[0])
        return model, x, timestep, uncond, cond, scale, options, seed

    def post_cfg(args: dict[str, Any]) -> Tensor:
        if cell.open is None:
            return args["denoised"]
        evaluated = cell.open.rows.evaluated
        raw = _predictions(args, cell, given, pipeline, evaluate, UNCOND in evaluated)

        def mix(cond: Tensor, uncond: Tensor) -> Tensor:
            return _mixed(args, cond, uncond, given)

        return pipeline.guide(raw, args["denoised"], mix)

    patcher.add_conditioning_modifier(modify_conditions)
    patcher.set_model_sampler_post_cfg_function(post_cfg)
    functions = patcher.model_options["sampler_post_cfg_function"]
    patcher.model_options["sampler_post_cfg_function"] = [post_cfg, *(f for f in functions if f is not post_cfg)]
    if "sampler_cfg_function" in patcher.model_options:
        log.info("another extension's CFG function mixes cond and uncond; guidance techniques act before and after it")


def _predictions(
    args: dict[str, Any], cell: Cell, given: _Conditions, pipeline: GuidancePipeline, evaluate: Evaluate, guided: bool
) -> Predictions:
    assert cell.open is not None
    call, rows = cell.open.call, cell.open.rows
    x = args["input"]

    def predict(noisy: Tensor, kind: str) -> Tensor:
        """One more evaluation by the host, with all that other extensions put into it."""
        conditions = ([], args["uncond"]) if kind == UNCOND else (args["cond"], None)
        with rows.own(kind):
            both = evaluate(args["model"], *conditions, noisy.to(x.dtype), args["sigma"], args["model_options"])
        return both[1 if kind == UNCOND else 0].float()

    perturbed = None
    if pipeline.wants_perturbed(call):
        perturbed = rows.perturbed.float() if rows.perturbed is not None else predict(x, PERTURBED)
    return Predictions(
        x=x.float(),
        cond=args["cond_denoised"].float(),
        uncond=args["uncond_denoised"].float() if guided else None,
        scale=given.scale * given.strength,
        call=call,
        perturbed=perturbed,
        predict=predict,
    )


def _mixed(args: dict[str, Any], cond: Tensor, uncond: Tensor, given: _Conditions) -> Tensor:
    """The host's combination of changed predictions: another extension's CFG function, or the usual one."""
    others = args["model_options"].get("sampler_cfg_function")
    if others is None:
        return uncond + (cond - uncond) * (given.scale * given.strength)
    x, sigma = args["input"], args["sigma"]
    noise = {"cond": x - cond, "uncond": x - uncond, "cond_denoised": cond, "uncond_denoised": uncond}
    shared = {"cond_scale": given.scale, "timestep": sigma, "sigma": sigma, "input": x, "model": args["model"]}
    return x - others({**noise, **shared, "model_options": args["model_options"]})
