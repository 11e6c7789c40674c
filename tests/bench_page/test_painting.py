"""The canvas of a painted map: what is painted is what the request says, and what the request says is shown."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, expect

from lib_hires.painted_map import WHITE, decode, encode

from .opened import SLOW, Opened, choose, toggle_sections

SECTION = "bench_iterative_mixing"
MAP_KEY = re.compile(r"Iterative mixing Painted map: ([^,]+)")


class Easel:
    """The canvas with its tools, driven as by hand. Places are fractions of its sides."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.block = opened.element(f"{SECTION}_painting")
        self.canvas = self.block.locator("canvas")

    @property
    def text(self) -> Locator:
        return self.block.get_by_test_id("textbox")

    @property
    def levels(self) -> np.ndarray:
        return decode(self.text.input_value())

    def tool(self, name: str) -> Locator:
        return self.block.get_by_role("button", name=name)

    def settled(self, text: str | re.Pattern) -> None:
        """Wait until the canvas has written this text, or shows it."""
        expect(self.text).to_have_value(text, timeout=SLOW)
        self.opened.page.wait_for_timeout(500)

    def stroke(self, *places: tuple[float, float]) -> None:
        before = self.text.input_value()
        self.canvas.scroll_into_view_if_needed()
        box = self.canvas.bounding_box()
        mouse = self.opened.page.mouse
        for index, (x, y) in enumerate(places):
            mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
            if index == 0:
                mouse.down()
        mouse.up()
        expect(self.text).not_to_have_value(before, timeout=SLOW)
        mouse.move(1, 1)  # off the canvas, so that no ring of the brush is drawn on it
        is_off = "canvas => !canvas.matches(':hover')"
        self.opened.page.wait_for_function(is_off, arg=self.canvas.element_handle(), timeout=SLOW)
        self.opened.page.wait_for_timeout(300)

    def use(self, name: str) -> None:
        before = self.text.input_value()
        self.tool(name).click()
        expect(self.text).not_to_have_value(before, timeout=SLOW)

    def shown(self) -> np.ndarray:
        """Grey and opacity of the middle of every 64th part of the canvas, 0 to 255: [h, w, 2]."""
        read = """canvas => {
            const {width, height} = canvas;
            const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
            return [width, height, Array.from(data)];
        }"""
        width, height, data = self.canvas.evaluate(read)
        picture = np.array(data, np.uint8).reshape(height, width, 4)
        return picture[2::5, 2::5, [0, 3]]


@pytest.fixture
def easel(opened: Opened) -> Iterator[Easel]:
    toggle_sections(opened, "bench_panel", SECTION)
    expect(opened.element(f"{SECTION}_detail")).to_be_visible(timeout=SLOW)
    expect(opened.element(f"{SECTION}_painting")).to_be_hidden(timeout=SLOW)
    choose(opened, "Painted", f"{SECTION}_detail")
    easel = Easel(opened)
    expect(easel.canvas).to_be_visible(timeout=SLOW)
    return easel


def distance_to_line(shape, start, end):
    """From the middle of every cell to a line between fractions of the sides, in cells."""
    height, width = shape
    cells = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    a, b = np.array(start) * (width, height), np.array(end) * (width, height)
    along = np.clip(((cells - a) @ (b - a)) / ((b - a) @ (b - a)), 0, 1)
    return np.linalg.norm(cells - (a + along[..., None] * (b - a)), axis=-1)


def test_only_a_painted_map_has_a_canvas_and_an_empty_one_is_told(easel):
    expect(easel.opened.element(f"{SECTION}_view")).to_contain_text("the painted map is empty", timeout=SLOW)
    easel.opened.screenshot("painting-empty")
    choose(easel.opened, "Automatic", f"{SECTION}_detail")
    expect(easel.block).to_be_hidden(timeout=SLOW)


def test_a_stroke_is_white_where_it_went_and_black_elsewhere(easel):
    easel.stroke((0.2, 0.25), (0.75, 0.6))
    levels = easel.levels
    assert levels.shape == (64, 64)
    distance = distance_to_line(levels.shape, (0.2, 0.25), (0.75, 0.6))
    assert (levels[distance < 3.5] == WHITE).all() and (levels[distance > 4.5] == 0).all()  # the brush is 8 cells wide
    assert np.array_equal(easel.shown()[..., 0], levels * 17)
    easel.opened.screenshot("painting")


def test_shades_and_brush(easel):
    easel.tool("Paint mid grey").click()
    expect(easel.tool("Paint mid grey")).to_have_attribute("aria-pressed", "true")
    easel.block.get_by_label("Brush").fill("20")
    easel.stroke((0.5, 0.5), (0.51, 0.5))
    levels = easel.levels
    assert set(np.unique(levels)) == {0, 8} and levels[32, 23] == 8 and levels[32, 20] == 0
    easel.block.get_by_label("Brush").fill("1")
    easel.tool("Paint white").click()
    easel.stroke((0.1, 0.1), (0.1, 0.102))
    assert (easel.levels == WHITE).sum() == 1 and easel.levels[6, 6] == WHITE


def test_fill_invert_clear_and_undo(easel):
    easel.tool("Paint dark grey").click()
    easel.use("Fill")
    assert (easel.levels == 4).all()
    easel.use("Invert")
    assert (easel.levels == WHITE - 4).all()
    easel.use("Remove the map")
    assert easel.text.input_value() == ""
    easel.tool("Remove the map").click()  # nothing left to remove, and nothing more to undo
    for level in (WHITE - 4, 4):
        easel.use("Undo")
        assert (easel.levels == level).all()
    easel.use("Undo")
    assert easel.text.input_value() == ""
    expect(easel.tool("Undo")).to_be_disabled()


def test_the_map_makes_the_picture_and_comes_back_from_its_infotext(easel):
    opened = easel.opened
    easel.stroke((0.3, 0.3), (0.6, 0.3))
    painted, shown = easel.text.input_value(), easel.shown()
    opened.element(f"{SECTION}_enabled").locator("input[type=checkbox]").check()
    for name, value in {"width": 128, "height": 128, "steps": 4, "count": 1, "hires_scale": 1.5}.items():
        opened.set_number(name, value)
    opened.element("generate").click()
    infotext = opened.element("infotext").locator("textarea").first
    expect(infotext).to_have_value(MAP_KEY, timeout=2 * SLOW)
    expect(opened.element("report")).to_contain_text("alpha 0.5 to 2")
    first = infotext.input_value()
    assert MAP_KEY.search(first).group(1) == painted

    opened.element(f"{SECTION}_preset_reset").click()
    easel.settled("")
    infotext.fill(first)
    opened.element("read_infotext").click()
    easel.settled(painted)
    assert np.array_equal(easel.shown(), shown)
    expect(easel.canvas).to_have_attribute("aria-label", re.compile("64 x 64 cells"))


def test_reset_clears_the_canvas_and_undo_brings_the_map_back(easel):
    easel.stroke((0.3, 0.3), (0.6, 0.3))
    painted = easel.text.input_value()
    assert easel.shown()[..., 1].min() == 255
    easel.opened.element(f"{SECTION}_preset_reset").click()
    easel.settled("")
    expect(easel.block).to_be_hidden(timeout=SLOW)
    choose(easel.opened, "Painted", f"{SECTION}_detail")
    expect(easel.canvas).to_be_visible(timeout=SLOW)
    assert easel.shown()[..., 1].max() == 0, "nothing is drawn"
    easel.use("Undo")
    assert easel.text.input_value() == painted


def test_a_picture_file_becomes_the_map(easel, tmp_path):
    picture = Image.new("RGB", (300, 200))
    picture.paste((255, 255, 255), (0, 0, 150, 200))
    picture.save(tmp_path / "half.png")
    easel.block.locator("input[type=file]").set_input_files(tmp_path / "half.png")
    easel.settled(re.compile(r"64x43\."))
    levels = easel.levels
    assert (levels[:, :31] == WHITE).all() and (levels[:, 33:] == 0).all()

    (tmp_path / "words.png").write_text("no picture")
    easel.block.locator("input[type=file]").set_input_files(tmp_path / "words.png")
    expect(easel.block).to_contain_text("words.png is not a picture", timeout=SLOW)
    assert np.array_equal(easel.levels, levels)


def test_a_text_that_is_no_map_is_told_and_can_be_painted_over(easel):
    easel.text.fill("nonsense")
    easel.text.blur()
    expect(easel.block).to_contain_text("not a painted map", timeout=SLOW)
    expect(easel.opened.element(f"{SECTION}_view")).to_contain_text("at most 64x64 cells", timeout=SLOW)
    easel.stroke((0.3, 0.3), (0.6, 0.3))
    assert easel.levels.max() == WHITE


def test_the_canvas_has_the_shape_of_the_picture(easel):
    easel.opened.set_number("height", 128)
    easel.opened.page.wait_for_timeout(600)
    easel.stroke((0.5, 0.2), (0.5, 0.8))
    assert easel.levels.shape == (32, 64)
    easel.opened.set_number("height", 256)  # the map is stretched, and a brush stays round for the eye
    easel.opened.page.wait_for_timeout(600)
    box = easel.canvas.bounding_box()
    assert box["width"] == pytest.approx(box["height"], abs=2)
    before = easel.levels
    easel.block.get_by_label("Brush").fill("16")
    easel.stroke((0.2, 0.5), (0.2, 0.505))
    rows, columns = np.nonzero(easel.levels != before)
    assert np.ptp(columns) + 1 == pytest.approx(16, abs=1) and np.ptp(rows) + 1 == pytest.approx(8, abs=1)


def test_the_last_picture_lies_under_the_map(easel):
    opened = easel.opened
    last = easel.tool("Paint over the picture")
    last.click()
    expect(easel.block).to_contain_text("no picture in the gallery", timeout=SLOW)
    expect(last).to_have_attribute("aria-pressed", "false")
    for name, value in {"width": 192, "height": 96, "steps": 2, "count": 1}.items():
        opened.set_number(name, value)
    opened.element("generate").click()
    expect(opened.element("gallery").locator("img").first).to_be_visible(timeout=2 * SLOW)
    opened.set_number("height", 192)
    last.click()
    expect(last).to_have_attribute("aria-pressed", "true", timeout=SLOW)
    picture = easel.shown()
    assert picture.shape[:2] == (32, 64), "the shape is the picture's and no longer that of the next one"
    assert picture[..., 1].min() == 255 and easel.text.input_value() == ""
    easel.stroke((0.5, 0.5), (0.7, 0.5))
    assert easel.levels.shape == (32, 64)
    painted = easel.shown()[..., 0].astype(int)
    dimmed, lit = easel.levels == 0, easel.levels == WHITE
    np.testing.assert_allclose(painted[dimmed], 0.4 * picture[..., 0][dimmed], atol=2)
    np.testing.assert_allclose(painted[lit], 0.4 * picture[..., 0][lit] + 0.6 * 255, atol=2)
    opened.screenshot("painting-over-a-picture")
    last.click()
    expect(last).to_have_attribute("aria-pressed", "false")


def test_a_finger_paints_and_does_not_scroll(easel):
    page = easel.opened.page
    easel.canvas.scroll_into_view_if_needed()
    box, scrolled = easel.canvas.bounding_box(), page.evaluate("scrollY")
    session = page.context.new_cdp_session(page)
    touch = lambda kind, *points: session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})
    at = lambda x, y: {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
    touch("touchStart", at(0.5, 0.2))
    for part in range(1, 9):
        touch("touchMove", at(0.5, 0.2 + part * 0.075))
    touch("touchEnd")
    easel.settled(re.compile("^64x64"))
    distance = distance_to_line((64, 64), (0.5, 0.2), (0.5, 0.8))
    assert (easel.levels[distance < 3] == WHITE).all() and (easel.levels[distance > 5] == 0).all()
    assert page.evaluate("scrollY") == scrolled


def test_it_fits_a_narrow_screen(easel):
    easel.opened.page.set_viewport_size({"width": 340, "height": 700})
    easel.opened.page.wait_for_timeout(600)
    canvas, block = easel.canvas.bounding_box(), easel.block.bounding_box()
    assert canvas["x"] + canvas["width"] <= block["x"] + block["width"] <= 340
    assert canvas["width"] == pytest.approx(canvas["height"], abs=2)
    easel.stroke((0.2, 0.25), (0.75, 0.6))
    distance = distance_to_line((64, 64), (0.2, 0.25), (0.75, 0.6))
    assert (easel.levels[distance < 3] == WHITE).all() and (easel.levels[distance > 5] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 5), (64, 64)], ids=str)
def test_browser_and_python_read_each_other(opened, shape):
    levels = np.random.default_rng(sum(shape)).integers(0, WHITE + 1, shape)
    opened.page.wait_for_function("window.hiresPlusMap")
    as_map = {"width": shape[1], "height": shape[0], "levels": levels.ravel().tolist()}
    written = opened.page.evaluate("map => hiresPlusMap.encode({...map, levels: Uint8Array.from(map.levels)})", as_map)
    assert np.array_equal(decode(written), levels)
    read = "text => hiresPlusMap.decode(text).then(map => ({...map, levels: Array.from(map.levels)}))"
    assert opened.page.evaluate(read, encode(levels)) == as_map


@pytest.mark.parametrize("text", ["", "x", "2x2.", "65x1.eJwDAAAAAAE", "4x4.eJxjYGAAAAAEAAE", "4x4.AAAA"])
def test_the_browser_refuses_what_python_refuses(opened, text):
    opened.page.wait_for_function("window.hiresPlusMap")
    with pytest.raises(ValueError):
        decode(text)
    assert opened.page.evaluate("text => hiresPlusMap.decode(text).then(() => false, () => true)", text)
