"""The hooks as a WebUI calls them, with stand-ins for its modules: what lands on p and in the infotext."""

import importlib
import json
import sys
from copy import copy
from types import ModuleType, SimpleNamespace

import gradio as gr
import pytest

from lib_hires.registry import BY_NAME
from lib_hires.webui import axes, infotext
from lib_hires.webui.echo import make_repeatable
from lib_hires.webui.presets import PresetStore

KIND = BY_NAME["deep_shrink"].settings
ON = {"deep_shrink": {"factor": 2.5}}


class P:
    """What the hooks touch of the WebUI's processing object."""

    def __init__(self):
        self.extra_generation_params = {"Hires upscale": 2}
        self.comments = {}

    def comment(self, text):
        self.comments[text] = 1


@pytest.fixture
def callbacks():
    return {}


@pytest.fixture
def extension(monkeypatch, tmp_path, callbacks):
    def keep(name):
        return lambda function: callbacks.setdefault(name, []).append(function)

    names = ("on_before_ui", "on_ui_settings", "on_cfg_denoiser")
    host = ModuleType("modules")
    host.script_callbacks = SimpleNamespace(**{name: keep(name) for name in names})
    host.shared = SimpleNamespace(opts=SimpleNamespace(data={}))
    host.scripts = SimpleNamespace(Script=object, AlwaysVisible="always", scripts_data=[])
    monkeypatch.setitem(sys.modules, "modules", host)
    monkeypatch.delitem(sys.modules, "lib_hires.webui.extension", raising=False)
    module = importlib.import_module("lib_hires.webui.extension")
    monkeypatch.setattr(module, "STORE", PresetStore(tmp_path / "presets.json"))
    yield module
    sys.modules.pop("lib_hires.webui.extension", None)


def ours(p):
    return {k: v for k, v in p.extra_generation_params.items() if k in infotext.all_keys()}


def test_a_generation_from_begin_to_end(extension):
    p = P()
    extension.begin(p, (ON,))
    assert p.hires_plus.selection == {"deep_shrink": KIND(factor=2.5)}
    expected = {"DeepShrink": "on", "DeepShrink Downscale factor": "2.5"}
    assert ours(p) == expected
    extension.announce(p)
    p.hires_plus.acted.add("deep_shrink")
    extension.settle(p)
    assert ours(p) == expected and not p.comments
    assert p.extra_generation_params["Hires upscale"] == 2


def test_an_infotext_never_claims_what_did_not_act(extension):
    p = P()
    extension.begin(p, (ON,))
    p.hires_plus.refused["DeepShrink"] = "not a UNet"
    extension.settle(p)
    assert ours(p) == {infotext.NOTE: "DeepShrink was refused: not a UNet"}
    assert list(p.comments) == ["Hires Plus: DeepShrink was refused: not a UNet"]
    extension.announce(p)
    assert ours(p)["DeepShrink"] == "on", "the next batch begins anew"


def test_repairs_are_told_in_log_comment_and_infotext(extension, caplog):
    p = P()
    extension.begin(p, ({"deep_shrink": {"factor": 99}},))
    note = "DeepShrink: Downscale factor = 99 is outside 0.5 to 9; the nearest bound 9 is used"
    assert ours(p)[infotext.NOTE] == note
    assert list(p.comments) == [f"Hires Plus: {note}"]
    assert caplog.messages == [note]


def test_off_leaves_nothing_behind(extension):
    p = P()
    before = dict(p.extra_generation_params)
    for args in ((), (False,), (ON, 1), (False, 3)):
        extension.begin(p, args)
    extension.announce(p)
    extension.settle(p)
    assert p.extra_generation_params == before and not p.hires_plus.selection


def test_hooks_without_a_beginning_do_nothing(extension, monkeypatch):
    attached = []
    monkeypatch.setattr(extension.host, "attach", lambda p, generation, *_: attached.append(generation.selection))
    p = P()
    extension.announce(p)
    extension.attach(p)
    extension.settle(p)
    assert not ours(p) and attached == [{}]


def test_an_inner_pass_of_another_extension_stays_plain(extension, monkeypatch):
    outer = P()
    extension.begin(outer, (ON,))
    inner = copy(outer)
    inner._ad_inner = True
    attached = []
    monkeypatch.setattr(extension.host, "attach", lambda p, generation, *_: attached.append(generation.selection))
    inner.extra_generation_params = {}
    extension.begin(inner, (ON,))
    extension.announce(inner)
    extension.attach(inner)
    extension.settle(inner)
    assert inner.extra_generation_params == {} and attached == [{}]


def test_an_inner_pass_gets_the_schedule_and_nothing_else(extension, monkeypatch):
    inner, attached = P(), []
    inner._ad_inner = True
    monkeypatch.setattr(extension.host, "attach", lambda p, generation, *_: attached.append(set(generation.selection)))
    extension.begin(inner, ({**ON, "model_sampling": {"prediction": "v"}},))
    extension.announce(inner)
    extension.attach(inner)
    extension.settle(inner)
    assert attached == [{"model_sampling"}] and not ours(inner)


def test_cells_of_a_grid_do_not_share_what_was_asked(extension):
    p = P()
    cells = []
    for value in (1.5, None, 3.0):
        cell = copy(p)  # shallow, as the host's script copies: all share one dict of infotext parameters
        if value is not None:
            setattr(cell, axes.ATTRIBUTE, {("deep_shrink", "factor"): value})
        extension.begin(cell, (False,))
        cell.hires_plus.acted.update(cell.hires_plus.selection)
        extension.settle(cell)
        cells.append(ours(cell))
    assert cells[0]["DeepShrink Downscale factor"] == "1.5"
    assert cells[1] == {}
    assert cells[2]["DeepShrink Downscale factor"] == "3"


def test_the_tab_follows_the_steps_whichever_is_made_first(extension):
    for steps_first in (True, False):
        tab, script = extension.Tab(), SimpleNamespace(elem_id=lambda item: item)
        with gr.Blocks() as page:
            steps = gr.Slider(1, 150, 20)
            if steps_first:
                tab.offer_steps(steps)
            arguments = tab.build(script)
            if not steps_first:
                tab.offer_steps(steps)
        events = len(page.dependencies)
        with gr.Blocks() as for_defaults:
            again = tab.build(script)
            tab.offer_steps(gr.Slider(1, 150, 20))
        assert len(for_defaults.dependencies) < events, "a host that only asks for defaults gets no live plot"
        assert [component.value for component in again] == [component.value for component in arguments]


def test_paste_fields_name_each_component(extension):
    script = SimpleNamespace(elem_id=lambda item: item)
    with gr.Blocks():
        arguments = extension.Tab().build(script)
    assert [component for component, _ in script.infotext_fields] == arguments
    assert script.paste_field_names == [key for key in infotext.all_keys() if key != infotext.NOTE]


def test_registering(extension, callbacks):
    extension.register()
    assert {name: len(functions) for name, functions in callbacks.items()} == {
        "on_before_ui": 1,
        "on_ui_settings": 1,
        "on_cfg_denoiser": 1,
    }
    handlers = list(extension.log.handlers)
    extension.register()
    assert extension.log.handlers == handlers, "one line once"
    for handler in handlers:
        extension.log.removeHandler(handler)
    extension.log.propagate = True


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**30, 10**6000], ids=["nan", "inf", "wide", "endless"])
def test_a_request_can_be_repeated_in_the_answer(extension, value):
    request = {"deep_shrink": {"factor": value, "list": [[value], {"x": value}], "fine": [1, 2.5, True, None, "a"]}}
    extension.begin(P(), (request,))
    text = json.dumps(request, allow_nan=False)
    assert len(text) < 500
    assert json.loads(text)["deep_shrink"]["fine"] == [1, 2.5, True, None, "a"]
    make_repeatable(value)


@pytest.mark.parametrize("asked", [{"differential_diffusion": {}}, {"deep_shrink": {}}], ids=["reads grey", "does not"])
def test_masks_are_kept_grey_only_while_they_are_made_and_only_where_grey_is_read(extension, asked):
    reads_grey = "differential_diffusion" in asked
    p = P()
    p.mask_round, p.image_mask = True, None
    extension.begin(p, (asked,))
    cell = copy(p)  # a grid's cell, before its host made the masks
    for one in (p, cell):
        assert one.mask_round is not reads_grey
        extension.announce(one)
        assert one.mask_round is True
    extension.begin(p, (False,))
    assert p.mask_round is True


def test_the_last_blend_and_the_overlay_are_those_of_the_batch_just_sampled(extension, monkeypatch):
    seen = []
    monkeypatch.setattr(extension.masks, "blend_at_end", lambda patches, arguments: seen.append(list(patches)))
    monkeypatch.setattr(extension.masks, "show_result", lambda patches, p, arguments: seen.append(list(patches)))
    p = P()
    extension.begin(p, ({"differential_diffusion": {}},))
    extension.announce(p)
    p.hires_plus.blends = ["a patch"]
    extension.blend(p, SimpleNamespace(is_final_blend=False))
    assert not seen, "inside a run the host blends by itself"
    extension.blend(p, SimpleNamespace(is_final_blend=True))
    extension.overlay(p, None)
    extension.announce(p)
    extension.overlay(p, None)
    assert seen == [["a patch"], ["a patch"], []]
