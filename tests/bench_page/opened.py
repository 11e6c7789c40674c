"""The bench page as a person meets it: what the tests of its parts share."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Locator, Page

SLOW = 60_000  # milliseconds: the machine may be busy


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


def toggle_sections(opened: Opened, *names: str) -> None:
    for name in names:
        opened.element(name).locator("button, .label-wrap").first.click()


def choose(opened: Opened, name: str, list_: str = "bench_deep_shrink_preset") -> None:
    opened.element(list_).locator("input").first.click()
    options = opened.page.locator("ul.options li, ul[role=listbox] li")  # gradio 3 gives them no role of their own
    options.filter(has_text=re.compile(rf"^\W*{re.escape(name)}\W*$")).first.click()


def wait_for_change(read, before: str) -> str:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if read() != before:
            return read()
        time.sleep(0.1)
    raise AssertionError("nothing changed")
