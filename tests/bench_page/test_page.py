"""The panel on the bench page: plots, presets, problems, a picture and its infotext."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from lib_hires.registry import TECHNIQUES

from .opened import SLOW, Opened, choose, toggle_sections, wait_for_change


def open_panel(opened: Opened) -> None:
    toggle_sections(opened, "bench_panel", "bench_deep_shrink")
    expect(opened.element("bench_deep_shrink_view").locator("svg")).to_be_visible(timeout=SLOW)


def switch_on(opened: Opened) -> None:
    opened.element("bench_deep_shrink_enabled").locator("input[type=checkbox]").check()


def test_the_plot_follows_the_controls_and_the_step_count(opened):
    open_panel(opened)
    opened.screenshot("panel")
    before = opened.plot
    opened.set_number("bench_deep_shrink_factor", 3)
    wider = wait_for_change(lambda: opened.plot, before)
    opened.set_number("steps", 8)
    assert wait_for_change(lambda: opened.plot, wider) != before
    for phase in ("full shrink", "growing", "original"):
        assert phase in opened.plot


def test_a_closed_section_shows_that_its_technique_is_on(opened):
    open_panel(opened)
    switch_on(opened)
    toggle_sections(opened, "bench_deep_shrink")
    expect(opened.element("bench_deep_shrink_enabled")).to_be_hidden(timeout=SLOW)
    marked = [technique.name for technique in TECHNIQUES if mark_of(opened, technique.name) == '"on"']
    assert marked == ["deep_shrink"]
    opened.screenshot("closed")


def mark_of(opened: Opened, name: str) -> str:
    label = opened.element(f"bench_{name}").locator(".label-wrap > span").first
    return label.evaluate("span => getComputedStyle(span, '::after').content")


def test_without_a_curve_there_is_a_box_only_for_problems(opened):
    name = next(technique.name for technique in TECHNIQUES if technique.curve is None)
    toggle_sections(opened, "bench_panel", f"bench_{name}")
    expect(opened.element(f"bench_{name}_end")).to_be_visible(timeout=SLOW)
    expect(opened.element(f"bench_{name}_view")).to_be_hidden()
    expect(opened.element(f"bench_{name}_preset_message")).to_be_hidden()
    opened.set_number(f"bench_{name}_end", 0)
    expect(opened.element(f"bench_{name}_view")).to_contain_text("will not act", timeout=SLOW)
    expect(opened.element(f"bench_{name}_view")).to_be_visible()


def test_values_that_never_act_are_told_at_once(opened):
    open_panel(opened)
    opened.set_number("bench_deep_shrink_start", 0.8)
    expect(opened.element("bench_deep_shrink_view")).to_contain_text("raise End or Gradual", timeout=SLOW)


def test_presets_are_chosen_saved_deleted_and_reset(opened):
    open_panel(opened)
    factor = opened.number("bench_deep_shrink_factor")
    opened.set_number("bench_deep_shrink_factor", 3.25)
    opened.element("bench_deep_shrink_preset_name").locator("input, textarea").first.fill("mine")
    opened.element("bench_deep_shrink_preset_save").click()
    expect(opened.element("bench_deep_shrink_preset_message")).to_contain_text("Saved as 'mine'", timeout=SLOW)
    opened.element("bench_deep_shrink_preset_reset").click()
    expect(factor).to_have_value("2", timeout=SLOW)
    choose(opened, "mine")
    expect(factor).to_have_value("3.25", timeout=SLOW)
    opened.element("bench_deep_shrink_preset_delete").click()
    expect(opened.element("bench_deep_shrink_preset_message")).to_contain_text("Deleted 'mine'", timeout=SLOW)
    choose(opened, "4x")
    expect(factor).to_have_value("4", timeout=SLOW)


def test_a_picture_and_its_infotext_round_trip(opened):
    open_panel(opened)
    switch_on(opened)
    opened.set_number("steps", 6)
    opened.set_number("count", 1)
    opened.set_number("bench_deep_shrink_factor", 2.5)
    opened.element("generate").click()
    infotext = opened.element("infotext").locator("textarea").first
    expect(infotext).to_have_value(re.compile("DeepShrink: on, DeepShrink Downscale factor: 2.5"), timeout=2 * SLOW)
    expect(opened.element("gallery").locator("img").first).to_be_visible(timeout=SLOW)
    expect(opened.element("report")).to_contain_text("block 3 shrunk by 2.5")
    opened.screenshot("picture")
    first = infotext.input_value()
    opened.element("bench_deep_shrink_preset_reset").click()
    expect(opened.number("bench_deep_shrink_factor")).to_have_value("2", timeout=SLOW)
    infotext.fill(first)
    opened.element("read_infotext").click()
    expect(opened.number("bench_deep_shrink_factor")).to_have_value("2.5", timeout=SLOW)
    infotext.fill(re.sub(r", DeepShrink.*", "", first))
    opened.element("read_infotext").click()
    expect(opened.element("bench_deep_shrink_enabled").locator("input[type=checkbox]")).not_to_be_checked(timeout=SLOW)
