"""The bench page in a real browser, on both generations of gradio that the hosts use."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import ConsoleMessage, Locator, Page, expect, sync_playwright

from lib_hires.registry import TECHNIQUES

ROOT = Path(__file__).parents[2]
PYTHONS = {"gradio 3.41.2": Path(sys.executable), "gradio 4.40.0": ROOT / ".venv-gradio4/bin/python"}
START_SECONDS = 120
SLOW = 60_000  # milliseconds: the machine may be busy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Opened:
    page: Page
    generation: str
    errors: list[str] = field(default_factory=list)

    def element(self, name: str) -> Locator:
        return self.page.locator(f"#{name}").first  # gradio gives an HTML block and its content the same id

    def number(self, name: str) -> Locator:
        return self.element(name).locator("input[type=number]").first

    def set_number(self, name: str, value: float) -> None:
        self.number(name).fill(str(value))
        self.number(name).press("Enter")
        self.number(name).blur()

    @property
    def plot(self) -> str:
        return self.element("bench_deep_shrink_view").inner_html()

    def screenshot(self, name: str) -> None:
        folder = os.environ.get("HIRES_SCREENSHOTS")
        if folder:
            file = Path(folder) / f"bench-{self.generation.replace(' ', '-')}-{name}.png"
            self.page.screenshot(path=file, full_page=True)


@pytest.fixture(scope="module", params=list(PYTHONS))
def server(request, tmp_path_factory) -> Iterator[tuple[str, str]]:
    python = PYTHONS[request.param]
    if not python.exists():
        pytest.skip(f"{python} is missing: ./dev test makes it")
    port, log = free_port(), tmp_path_factory.mktemp("page") / "server.log"
    presets = tmp_path_factory.mktemp("presets") / "presets.json"
    command = [str(python), "-m", "lib_hires.hosts.bench.page", "--port", str(port), "--presets", str(presets)]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(port, process, log)
        yield request.param, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    pytest.fail(f"the page did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture
def opened(server) -> Iterator[Opened]:
    generation, address = server
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "the browser tests need Chromium: apt install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        result = Opened(page, generation)
        page.route("**", lambda route: route.continue_() if address in route.request.url else route.abort())
        page.on("pageerror", lambda error: result.errors.append(str(error)))
        page.on("console", lambda message: note_error(message, address, result.errors))
        page.goto(address)
        page.wait_for_selector("#generate", timeout=SLOW)
        yield result
        browser.close()
    assert result.errors == []


def note_error(message: ConsoleMessage, address: str, errors: list[str]) -> None:
    """gradio's pages ask for web fonts and a script of a CDN; those are aborted above and are not ours."""
    if message.type == "error" and address in message.location.get("url", address):
        errors.append(message.text)


def toggle_sections(opened: Opened, *names: str) -> None:
    for name in names:
        opened.element(name).locator("button, .label-wrap").first.click()


def open_panel(opened: Opened) -> None:
    toggle_sections(opened, "bench_panel", "bench_deep_shrink")
    expect(opened.element("bench_deep_shrink_view").locator("svg")).to_be_visible(timeout=SLOW)


def switch_on(opened: Opened) -> None:
    opened.element("bench_deep_shrink_enabled").locator("input[type=checkbox]").check()


def wait_for_change(read, before: str) -> str:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if read() != before:
            return read()
        time.sleep(0.1)
    raise AssertionError("nothing changed")


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


def choose(opened: Opened, name: str) -> None:
    opened.element("bench_deep_shrink_preset").locator("input").first.click()
    options = opened.page.locator("ul.options li, ul[role=listbox] li")  # gradio 3 gives them no role of their own
    options.filter(has_text=re.compile(rf"^\W*{re.escape(name)}\W*$")).first.click()


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
