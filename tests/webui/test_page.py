"""The page, in Chromium: what a person sees and does."""

from __future__ import annotations

import base64

import pytest

from lib_hires.painted_map import WHITE, decode

from .client import BASE, TITLE, distance, same, scene, shrink

PRESET = "a preset of the tests"


def test_the_console_is_silent(page, webui):
    for name in ("txt2img", "img2img"):
        page.tab(name).open_technique()
    assert not page.complaints, page.complaints


@pytest.mark.parametrize("name", ["txt2img", "img2img"])
def test_the_panel_is_there_and_off(page, name):
    tab = page.tab(name)
    assert tab.panel.count() == 1
    assert not tab.ours("deep_shrink").is_visible()  # closed
    tab.open_panel()
    assert not tab.is_on()
    page.screenshot(f"{name} panel", tab.panel)
    tab.open_technique()
    assert tab.is_on()
    page.screenshot(f"{name} open", tab.panel)


def test_every_control_has_its_help(page):
    tab = page.tab("txt2img")
    tab.open_technique()
    text = tab.panel.inner_text()
    for words in ("one subject", "How many times smaller", "Fraction of the pass", "Low-pass", "native"):
        assert words in text, words


def test_the_switch(page):
    tab = page.tab("txt2img")
    tab.open_panel()
    tab.switch.check()
    page.at.wait_for_timeout(500)
    assert tab.is_on()
    assert "DeepShrink" in tab.panel.locator(".label-wrap").first.inner_text()  # the closed panel tells what is on
    tab.switch.uncheck()
    page.at.wait_for_timeout(500)
    assert not tab.is_on()


def test_the_plot_follows_the_controls_and_the_steps(page):
    tab = page.tab("txt2img")
    tab.open_technique()
    first = tab.plot()
    assert "full shrink" in first
    tab.set_number("deep_shrink_end", 0.6)
    later = tab.plot()
    assert later != first
    tab.set_number("deep_shrink_gradual", 0.9)
    assert tab.plot() != later
    before = tab.plot()
    tab.set_host_number("steps", 40)
    after = tab.plot()
    assert after != before
    assert "-40" in after  # the last step
    page.screenshot("plot of 40 steps", tab.panel)


def test_a_useless_window_is_told(page):
    tab = page.tab("txt2img")
    tab.open_technique()
    tab.set_number("deep_shrink_gradual", 0)
    tab.set_number("deep_shrink_end", 0)
    assert any("End" in problem for problem in tab.problems()), tab.problems()
    page.screenshot("useless window", tab.panel)


def test_wrong_stages_are_told(page):
    tab = page.tab("txt2img")
    tab.open_technique()
    box = tab.ours("deep_shrink_more_stages").locator("textarea, input").first
    box.fill("6:2")
    box.press("Tab")
    page.at.wait_for_timeout(800)
    assert any("More stages" in problem for problem in tab.problems()), tab.problems()


def save_preset(tab):
    tab.ours("deep_shrink_preset_name").locator("textarea, input").first.fill(PRESET)
    tab.press("deep_shrink_preset_save")
    assert PRESET in tab.message()


def test_presets(page):
    tab = page.tab("txt2img")
    tab.open_technique()
    tab.choose("deep_shrink_preset", "4x")
    assert tab.number("deep_shrink_factor") == 4
    assert tab.number("deep_shrink_end") == 0.5
    tab.set_number("deep_shrink_factor", 3.5)
    assert tab.choice("deep_shrink_preset") != "4x"  # the values are no longer that preset's

    save_preset(tab)
    page.screenshot("preset saved", tab.panel)
    assert tab.choice("deep_shrink_preset") == PRESET
    try:
        tab.press("deep_shrink_preset_reset")
        assert tab.number("deep_shrink_factor") == 2
        assert tab.number("deep_shrink_end") == 0.35
        tab.choose("deep_shrink_preset", PRESET)
        assert tab.number("deep_shrink_factor") == 3.5
    finally:
        tab.press("deep_shrink_preset_delete")
    assert "Deleted" in tab.message()
    assert PRESET not in tab.choices("deep_shrink_preset")


def test_a_preset_is_there_in_the_other_tab_and_after_a_reload(page):
    tab = page.tab("txt2img")
    tab.open_technique()
    tab.set_number("deep_shrink_factor", 2.75)
    save_preset(tab)
    try:
        for reload in (False, True):
            if reload:
                page.open()
            other = page.tab("img2img")
            other.open_technique()
            other.choose("deep_shrink_preset", PRESET)
            assert other.number("deep_shrink_factor") == 2.75
    finally:
        tab = page.tab("txt2img")
        tab.open_technique()
        save_preset(tab)  # so that it is the chosen one
        tab.press("deep_shrink_preset_delete")
        assert "Deleted" in tab.message()


def test_a_preset_without_a_name_is_refused(page):
    tab = page.tab("txt2img")
    tab.open_technique()
    tab.press("deep_shrink_preset_save")
    assert "name" in tab.message()
    tab.ours("deep_shrink_preset_name").locator("textarea, input").first.fill("4x")
    tab.press("deep_shrink_preset_save")
    assert "built-in" in tab.message()


def test_reset(page):
    tab = page.tab("txt2img")
    tab.open_technique()
    tab.set_number("deep_shrink_block", 5)
    tab.toggle("deep_shrink_after_skip").uncheck()
    tab.choose("deep_shrink_downscale_method", "bislerp")
    tab.press("deep_shrink_preset_reset")
    assert tab.number("deep_shrink_block") == 3
    assert tab.toggle("deep_shrink_after_skip").is_checked()
    assert tab.choice("deep_shrink_downscale_method") == "bicubic"
    assert tab.is_on()  # resetting values is not switching off


def test_paste_sets_the_components_and_generates_the_picture(page, webui, unharmed):
    values = {"factor": 3.0, "block": 1, "after_skip": False, "upscale_method": "bilinear"}
    wanted = webui.txt2img(shrink(**values))
    tab = page.tab("txt2img")
    tab.paste(wanted.infotext)
    assert tab.is_on()
    tab.open_technique()
    assert tab.number("deep_shrink_factor") == 3
    assert tab.number("deep_shrink_block") == 1
    assert not tab.toggle("deep_shrink_after_skip").is_checked()
    assert not tab.toggle("deep_shrink_only_above_native").is_checked()
    assert tab.choice("deep_shrink_upscale_method") == "bilinear"
    tab.generate()
    page.screenshot("generated")
    assert "DeepShrink: on" in tab.infotext()
    assert same(tab.picture(), wanted.picture)
    unharmed()


def test_pasting_a_plain_infotext_switches_off(page, webui, plain):
    tab = page.tab("txt2img")
    tab.paste(webui.txt2img(shrink(factor=3.0)).infotext)
    assert tab.is_on()
    tab.paste(webui.txt2img().infotext)
    assert not tab.is_on()
    tab.generate()
    assert "DeepShrink" not in tab.infotext()
    assert same(tab.picture(), plain)


def test_pasting_nonsense_does_no_harm(page, webui):
    tab = page.tab("txt2img")
    infotext = webui.txt2img(shrink()).infotext
    tab.paste(infotext.replace("DeepShrink: on", "DeepShrink: on, DeepShrink Downscale factor: 1e9"))
    assert tab.is_on()
    tab.open_technique()
    assert tab.number("deep_shrink_factor") == 9
    tab.paste(infotext.replace("DeepShrink: on", "DeepShrink: on, DeepShrink Downscale factor: much"))
    assert not tab.is_on()


def test_generate_by_hand(page, webui, shrunk):
    """As a newcomer would: tick the box, press Generate. The rest of the request comes from a plain infotext."""
    tab = page.tab("txt2img")
    tab.paste(webui.txt2img().infotext)
    tab.open_panel()
    tab.switch.check()
    tab.open_technique()
    tab.toggle("deep_shrink_only_above_native").uncheck()
    page.at.wait_for_timeout(500)
    tab.generate()
    assert same(tab.picture(), shrunk.picture)


def test_a_picture_that_is_not_above_native_is_told(page, webui, plain):
    tab = page.tab("txt2img")
    tab.paste(webui.txt2img().infotext)
    tab.open_panel()
    tab.switch.check()
    tab.generate()
    page.screenshot("at native size")
    assert same(tab.picture(), plain)
    assert "not above the native" in tab.at.locator("#txt2img_results").inner_text()


def test_send_to_img2img_takes_the_settings_along(page, webui):
    tab = page.tab("txt2img")
    tab.paste(webui.txt2img(shrink(factor=2.6)).infotext)
    tab.generate()
    page.at.locator("#txt2img_send_to_img2img").click()
    page.at.wait_for_timeout(2500)
    other = page.tab("img2img")
    assert other.is_on()
    other.open_technique()
    assert other.number("deep_shrink_factor") == 2.6


def test_png_info_sends_the_settings(page, webui, tmp_path):
    request = {**BASE, "alwayson_scripts": {TITLE: {"args": [shrink(factor=2.4)]}}}
    encoded = webui.post("/sdapi/v1/txt2img", request).json()["images"][0]
    (tmp_path / "picture.png").write_bytes(base64.b64decode(encoded))
    page.at.get_by_role("tab", name="PNG Info").or_(page.at.get_by_role("button", name="PNG Info")).first.click()
    page.at.locator("#pnginfo_image input[type=file]").first.set_input_files(tmp_path / "picture.png")
    page.at.get_by_text("DeepShrink Downscale factor: 2.4").first.wait_for(timeout=15_000)
    page.at.locator("#tab_pnginfo").get_by_role("button", name="Send to txt2img").or_(
        page.at.locator("#txt2img_tab")
    ).first.click()
    page.at.wait_for_timeout(2500)
    tab = page.tab("txt2img")
    assert tab.is_on()
    tab.open_technique()
    assert tab.number("deep_shrink_factor") == 2.4


def test_img2img_on_the_page(page, webui, tmp_path):
    scene().save(tmp_path / "scene.png")
    wanted = webui.img2img(shrink())
    tab = page.tab("img2img")
    tab.paste(wanted.infotext)
    page.at.locator("#img2img_image input[type=file]").first.set_input_files(tmp_path / "scene.png")
    page.at.wait_for_timeout(1500)
    assert tab.is_on()
    tab.generate()
    assert "DeepShrink: on" in tab.infotext()
    assert distance(tab.picture(), wanted.picture) < 1


def open_painting(tab):
    tab.open_technique("iterative_mixing", "detail")
    assert not tab.painting.is_visible()
    tab.choose("iterative_mixing_detail", "Painted")
    assert tab.painting.locator("canvas").is_visible()


@pytest.mark.parametrize("name", ["txt2img", "img2img"])
def test_a_map_is_painted(page, name):
    tab = page.tab(name)
    open_painting(tab)
    page.screenshot(f"{name} nothing painted", tab.ours("iterative_mixing"))
    tab.stroke((0.2, 0.5), (0.8, 0.5))
    levels = decode(tab.painted())
    height, width = levels.shape
    assert (levels[height // 2, width // 4 : width * 3 // 4] == WHITE).all()
    assert not levels[: height // 3].any() and not levels[height * 2 // 3 :].any()
    page.screenshot(f"{name} painted", tab.ours("iterative_mixing"))
    tab.press("iterative_mixing_preset_reset")
    assert tab.painted() == ""
    assert not tab.painting.is_visible()


def test_a_painted_map_makes_the_picture_and_is_pasted_back(page, webui, unharmed):
    tab = page.tab("txt2img")
    tab.paste(webui.hires(width=64, height=64, hr_scale=2).infotext)
    open_painting(tab)
    tab.stroke((0.2, 0.5), (0.8, 0.5))
    painted = tab.painted()
    tab.generate()
    infotext = tab.infotext()
    assert f"Iterative mixing Painted map: {painted}" in infotext
    tab.painting.get_by_role("button", name="Paint over the picture").click()
    page.at.wait_for_timeout(800)
    page.screenshot("painted over the last picture", tab.ours("iterative_mixing"))
    same_by_api = {"iterative_mixing": {"detail": "Painted", "painting": painted}}
    assert same(tab.picture(), webui.hires(same_by_api, width=64, height=64, hr_scale=2).picture)

    tab.press("iterative_mixing_preset_reset")
    assert tab.painted() == ""
    tab.paste(infotext)
    assert tab.painted() == painted and tab.painting.is_visible()
    assert "white" in tab.painting.locator("canvas").get_attribute("aria-label")
    unharmed()


def test_a_recipe_sets_several_sections(page, webui):
    tab = page.tab("txt2img")
    tab.open_panel()
    tab.choose("recipe", "4x cascade")
    page.screenshot("a recipe", tab.panel)
    assert tab.is_on("cascade") and tab.is_on("low_band_lock") and not tab.is_on("relay")
    tab.choose("recipe", "Fast 2x (relay)")
    assert tab.is_on("relay") and tab.is_on("low_band_lock") and not tab.is_on("cascade")
