"""The panel under a real gradio: one component per field, in positional order, and handlers that answer anything."""

from html import escape
from types import SimpleNamespace

import gradio as gr
import pytest

from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.request import ENABLED, positional_fields, read_request
from lib_hires.settings import params_of
from lib_hires.webui import panel
from lib_hires.webui.preset_row import PresetRow
from lib_hires.webui.presets import PresetStore

DEEP_SHRINK = BY_NAME["deep_shrink"]
KIND = DEEP_SHRINK.settings
CLASSES = {
    **{"toggle": "Checkbox", "integer": "Slider", "number": "Slider"},
    **{"choice": "Dropdown", "text": "Textbox", "painting": "Textbox"},
}


@pytest.fixture
def store(tmp_path):
    return PresetStore(tmp_path / "presets.json")


@pytest.fixture
def built(store):
    with gr.Blocks():
        return panel.build(lambda item: f"id_{item}", store)


def fields():
    return [(technique, field) for technique in TECHNIQUES for field in positional_fields(technique)]


def test_components_are_in_positional_order(built):
    assert len(built.arguments) == len(fields())
    for component, (technique, field) in zip(built.arguments, fields(), strict=True):
        if field == ENABLED:
            assert component.value is False
            continue
        param = params_of(technique.settings)[field]
        assert type(component).__name__ == CLASSES[param.kind]
        assert (component.label, component.info) == (param.label, param.help)
        assert component.elem_id == f"id_{technique.name}_{field}"
        # hosts convert pasted values to the type of this one: a float's default must be a float
        assert component.value == param.default and type(component.value) is type(param.default)


def test_the_defaults_of_the_components_are_an_empty_request(built):
    generation = read_request([component.value for component in built.arguments])
    assert not generation.selection and not generation.notes


def test_nothing_is_saved_as_a_default_of_the_page(store):
    with gr.Blocks() as page:
        panel.build(lambda item: f"id_{item}", store)
    kinds = (gr.Accordion, gr.Slider, gr.Checkbox, gr.Dropdown, gr.Textbox, gr.Button)
    for component in page.blocks.values():
        assert not isinstance(component, kinds) or component.do_not_save_to_config


def test_it_can_be_built_again_and_again(store):
    with gr.Blocks():
        first, second = (panel.build(lambda item: f"id_{item}", store) for _ in range(2))
        steps = gr.Slider(1, 150, 20)
        first.follow(steps)
        second.follow()
    assert not set(map(id, first.arguments)) & set(map(id, second.arguments))


def test_a_host_may_bring_its_own_section(store):
    made = []

    def section(label, elem_id):
        switch = gr.Checkbox(False, elem_id=elem_id)
        made.append((label, switch))
        return switch, gr.Column()

    with gr.Blocks():
        built = panel.build(lambda item: item, store, section)
    switches = {id(switch) for _, switch in made}  # made family by family, listed in the registry's order
    assert len(made) == len(TECHNIQUES) and switches == {id(ui.arguments[0]) for ui in built.techniques}


@pytest.fixture
def followed(store):
    """A panel on a page with a step count."""
    with gr.Blocks() as page:
        built = panel.build(lambda item: f"id_{item}", store)
        steps = gr.Slider(1, 150, 20)
        built.follow(steps)
    return page, built, steps


def outputs_of_changes(page, component):
    """The outputs of each handler that a change of the component calls."""
    handlers = [d for d in page.dependencies if component._id in d["targets"] and d["trigger"] == "change"]
    return [[page.blocks[output] for output in handler["outputs"]] for handler in handlers]


def test_every_parameter_redraws_its_own_technique_once(followed):
    page, built, _ = followed
    for ui in built.techniques:
        for component in ui.values:
            assert outputs_of_changes(page, component) == [[ui.view, ui.presets.choice]]


def test_the_step_count_redraws_all_plots_in_one_request(followed):
    page, built, steps = followed
    plotted = [ui for ui in built.techniques if ui.technique.curve is not None]
    assert outputs_of_changes(page, steps) == [[ui.view for ui in plotted]]
    defaults = [component.value for ui in plotted for component in ui.values]
    assert built._redraw(8, *defaults) == [panel.view(ui.technique, ui.technique.settings(), [], 8) for ui in plotted]


def test_each_family_has_one_heading_and_each_technique_says_what_it_is_for_and_costs(followed):
    page, _, _ = followed
    shown = "".join(block.value for block in page.blocks.values() if isinstance(block, gr.HTML))
    labels = [block.label for block in page.blocks.values() if isinstance(block, gr.Accordion)]
    families = [technique.family for technique in TECHNIQUES]
    for family in families:
        assert shown.count(f'<div class="hires-plus-family">{family}</div>') == 1
    for technique in TECHNIQUES:
        assert technique.summary and escape(technique.summary) in shown
        assert labels.count(f"{technique.title} ({technique.cost})" if technique.cost else technique.title) == 1


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda technique: technique.name)
def test_a_view_is_a_plot_a_problem_or_nothing(technique):
    assert panel.view(technique, technique.settings(), []).startswith("<svg") is (technique.curve is not None)
    if technique.curve is None:
        assert panel.view(technique, technique.settings(), []) == ""
    told = panel.view(technique, None, ["what is <wrong>"])
    assert told == '<div class="hires-plus-problem">what is &lt;wrong&gt;</div>'


def refresh(built, preset=None, steps=20, known=tuple(DEEP_SHRINK.presets), **changes):
    values = [getattr(KIND(**changes) if _are_valid(changes) else KIND(), field) for field in params_of(KIND)]
    if not _are_valid(changes):
        values = [changes.get(field, value) for field, value in zip(params_of(KIND), values, strict=True)]
    shown, update = built.techniques[0]._refresh(preset, known, *values, steps)
    return shown, update["value"]


def _are_valid(changes):
    return all(params_of(KIND)[field].default.__class__ is type(value) for field, value in changes.items())


def test_the_view_follows_the_values(built):
    shown, name = refresh(built, factor=4.0, end=0.5, gradual=0.75)
    assert shown.startswith("<svg") and name == "4x"
    assert refresh(built, factor=4.1)[1] is None
    assert "problem" not in shown


def test_the_view_says_at_once_what_is_wrong(built):
    shown, _ = refresh(built, start=0.5, end=0.2, gradual=0.1)
    assert "raise End or Gradual" in shown
    shown, name = refresh(built, more_stages="nonsense")
    assert "More stages" in shown and "<svg" not in shown and name is None


@pytest.mark.parametrize("steps", [None, "", "many", float("nan"), 0, 10**9, [3]])
def test_no_step_count_raises(built, steps):
    assert "<svg" in refresh(built, steps=steps)[0]


@pytest.mark.parametrize("value", [None, "", "abc", float("nan"), [], {}])
def test_no_value_raises(built, value):
    for ui in built.techniques:
        ui._refresh(value, [], *[value] * len(params_of(ui.technique.settings)), value)


@pytest.fixture
def row(store):
    with gr.Blocks():
        row = PresetRow(DEEP_SHRINK, lambda item: item, store)
    return row


def values(settings):
    return [getattr(settings, field) for field in params_of(settings)]


def test_choosing_a_preset_sets_every_component(row):
    *updates, message = row._choose(SimpleNamespace(value="4x"))
    assert [update["value"] for update in updates] == values(DEEP_SHRINK.presets["4x"])
    assert message == ""
    *updates, message = row._choose(SimpleNamespace(value="gone"))
    assert all("value" not in update for update in updates) and "gone" in message


def test_the_list_knows_what_was_saved_elsewhere(row, store, built):
    store.save(DEEP_SHRINK, "elsewhere", KIND(factor=3.3))
    known = list(DEEP_SHRINK.presets)
    update, names = row._look_again(known)
    assert update["choices"] == names == [*known, "elsewhere"]
    assert "choices" not in row._look_again(names)[0]
    assert refresh(built, factor=3.3)[1] is None, "a name that the browser's list does not have yet"
    assert refresh(built, factor=3.3, known=names)[1] == "elsewhere"


def test_saving_and_deleting(row, store):
    mine = KIND(factor=3.3)
    chosen, _, name, message = row._keep(" mine ", *values(mine))
    assert chosen["value"] == "mine" and "mine" in chosen["choices"] and name == "" and "Saved" in message
    assert store.of_user(DEEP_SHRINK) == {"mine": mine}
    chosen, _, message = row._remove("mine", *values(mine))
    assert chosen["value"] is None and "mine" not in chosen["choices"] and "Deleted" in message


def test_a_saved_twin_of_a_built_in_preset_stays_chosen(row):
    chosen, *_ = row._keep("twin", *values(DEEP_SHRINK.presets["4x"]))
    assert chosen["value"] == "twin"


@pytest.mark.parametrize("name", ["", None, "4x"])
def test_a_refused_save_or_deletion_says_why(row, name):
    assert "Not saved" in row._keep(name, *values(KIND()))[-1]
    assert "Not deleted" in row._remove(name, *values(KIND()))[-1]


def test_unreadable_values_are_not_saved(row, store):
    bad = [*values(KIND())]
    bad[list(params_of(KIND)).index("more_stages")] = "nonsense"
    assert "More stages" in row._keep("mine", *bad)[-1]
    assert not store.of_user(DEEP_SHRINK)


def test_resetting(row):
    *updates, chosen, _, message = row._set_back()
    assert [update["value"] for update in updates] == values(KIND())
    assert chosen["value"] == "Default (2x, gradual)" and message == ""
