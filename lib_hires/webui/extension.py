"""Where the WebUI's hooks meet the plugin.

The WebUI keeps one script object per tab for all requests, so what belongs to a generation is kept on its `p`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from modules import script_callbacks, shared

from lib_hires import TITLE
from lib_hires.generation import Generation
from lib_hires.hosts import masks
from lib_hires.hosts import webui as host
from lib_hires.hosts.hires_stages import attach_stages
from lib_hires.registry import BY_NAME
from lib_hires.request import read_request
from lib_hires.webui import axes, infotext, panel
from lib_hires.webui.echo import make_repeatable
from lib_hires.webui.presets import PresetStore

log = logging.getLogger("hires_plus")

STORE = PresetStore()

_GENERATION = "hires_plus"  # the attribute of p
_NOTHING = Generation()


def register() -> None:
    """Called each time the WebUI loads its scripts; it forgets all callbacks before."""
    _set_up_log()
    script_callbacks.on_before_ui(partial(axes.register, STORE))
    script_callbacks.on_ui_settings(_add_settings)
    script_callbacks.on_cfg_denoiser(host.on_cfg_denoiser)


class Tab:
    """One tab's panel and the host's steps slider, whichever of them the host makes first."""

    def __init__(self) -> None:
        self._steps: Any = None
        self._panel: panel.Panel | None = None
        self._following = False

    def build(self, script: Any) -> list[Any]:
        """The script's ui(): also called later, by the API, only to read the components' defaults."""
        built = panel.build(script.elem_id, STORE, section=_section)
        targets = [target for ui in built.techniques for target in infotext.paste_targets(ui.technique)]
        script.infotext_fields = list(zip(built.arguments, targets, strict=True))
        script.paste_field_names = [str(target) for target in targets]
        self._panel = built
        self._follow()
        return built.arguments

    def offer_steps(self, component: Any) -> None:
        if self._steps is None:
            self._steps = component
            self._follow()

    def _follow(self) -> None:
        if self._panel is not None and self._steps is not None and not self._following:
            self._following = True
            self._panel.follow(self._steps)


def begin(p: Any, args: Sequence[Any]) -> None:
    """process: read the request and put it into the infotext."""
    if _is_inner(p):
        p.hires_plus = _for_inner_pass(args)
        return
    p.hires_plus = _NOTHING  # the same p can be sampled again with other values
    if args:
        make_repeatable(args[0])
    generation = p.hires_plus = read_request(args, getattr(p, axes.ATTRIBUTE, None), STORE.all)
    attach_stages(p, generation)
    if any(BY_NAME[name].grey_mask for name in generation.selection):
        masks.keep_grey(p)
    infotext.write(p.extra_generation_params, generation)
    _tell(p, generation.notes)
    if generation.notes:
        log.warning("; ".join(generation.notes))


def announce(p: Any) -> None:
    """Before each batch: the previous batch's outcome is not this one's."""
    masks.restore_rounding(p)  # the masks are made by now
    generation = _generation(p)
    generation.blends = []
    if generation.selection and not _is_inner(p):
        infotext.write(p.extra_generation_params, generation)


def attach(p: Any, x: Any = None, noise: Any = None) -> None:
    """Before every sampling run."""
    host.attach(p, _generation(p), x, noise)


def blend(p: Any, arguments: Any) -> None:
    """After every blend of latents by mask. Inside a run the masks in force stand in the denoiser already."""
    if arguments.is_final_blend:
        masks.blend_at_end(_generation(p).blends, arguments)


def overlay(p: Any, arguments: Any) -> None:
    """Before the original pixels are laid over a finished picture."""
    masks.show_result(_generation(p).blends, p, arguments)


def settle(p: Any) -> None:
    """After the sampling of a batch, before its infotext is made."""
    generation = _generation(p)
    if generation.selection and not _is_inner(p):
        _tell(p, infotext.settle(p.extra_generation_params, generation))


def _generation(p: Any) -> Generation:
    return getattr(p, _GENERATION, _NOTHING)


def _for_inner_pass(args: Sequence[Any]) -> Generation:
    """A refinement pass inside a generation needs the same schedule, and none of the other techniques: they were set
    for the picture and not for a face."""
    selection = read_request(args, None, STORE.all).selection
    return Generation({name: settings for name, settings in selection.items() if BY_NAME[name].schedules})


def _is_inner(p: Any) -> bool:
    """Whether this is a refinement pass that another extension (ADetailer) runs inside a generation."""
    return bool(getattr(p, "_ad_inner", False))


def _tell(p: Any, notes: Sequence[str]) -> None:
    if hasattr(p, "comment"):
        for note in notes:
            p.comment(f"{TITLE}: {note}")


def _section(label: str, elem_id: str) -> tuple[Any, Any]:
    try:
        from modules.ui_components import InputAccordion
    except ImportError:
        return panel.plain_section(label, elem_id)
    switch = InputAccordion(False, label=label, elem_id=elem_id)
    switch.accordion.do_not_save_to_config = True
    return switch, switch


def _add_settings() -> None:
    import gradio as gr

    shared.opts.add_option(
        "hires_plus_native_size",
        shared.OptionInfo(
            0,
            "Native size of the model in pixels (0: what its family was trained at)",
            gr.Slider,
            {"minimum": 0, "maximum": 4096, "step": 64},
            section=("hires_plus", TITLE),
        ),
    )


def _set_up_log() -> None:
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"[{TITLE}] %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
