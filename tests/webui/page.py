"""Driving the WebUI's page in Chromium, by the names that the panel gives its components."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

from .client import FORGE, Picture, WebUI

SCREENSHOTS = os.environ.get("HIRES_SCREENSHOTS", "")


class Page:
    """The WebUI in a browser, with what its console complained about."""

    def __init__(self, browser_page: Any, webui: WebUI) -> None:
        self.at = browser_page
        self.webui = webui
        self.complaints: list[str] = []
        browser_page.on("pageerror", lambda error: self.complaints.append(f"{error}\n{error.stack}"))
        browser_page.on("console", self._on_console)

    def _on_console(self, message: Any) -> None:
        source = message.location.get("url", "")
        # what a page on a machine without network cannot load is not an error of ours
        if message.type == "error" and source.startswith(self.webui.url):
            self.complaints.append(f"{message.text} ({source})")

    def open(self) -> None:
        self.at.goto(self.webui.url + "/?__theme=dark", wait_until="domcontentloaded")
        self.at.wait_for_selector("#txt2img_generate", state="visible", timeout=90_000)
        # the last thing that the host's own scripts put in
        self.at.wait_for_selector("#script_img2img_hires_plus_deep_shrink-visible-checkbox", state="attached")
        self.at.wait_for_timeout(300)

    def tab(self, name: str) -> Tab:
        index = {"txt2img": 0, "img2img": 1}[name]
        self.at.locator("#tabs > .tab-nav button, #tabs > .tab-wrapper button[role=tab]").nth(index).click()
        return Tab(self, name)

    def screenshot(self, name: str, element: Any = None) -> None:
        if SCREENSHOTS:
            file = Path(SCREENSHOTS) / self.webui.host / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            (element or self.at).screenshot(path=str(file))


class Tab:
    """One of the two tabs with our panel."""

    def __init__(self, page: Page, name: str) -> None:
        self.page = page
        self.at = page.at
        self.name = name

    def ours(self, item: str) -> Any:
        """A component of our panel, such as "panel" or "deep_shrink_factor"."""
        # the first: gradio 3 gives the id of an HTML block to its content as well
        return self.at.locator(f"#script_{self.name}_hires_plus_{item}").first

    @property
    def panel(self) -> Any:
        return self.ours("panel")

    @property
    def switch(self) -> Any:
        return self.ours("deep_shrink-visible-checkbox")

    def open_panel(self) -> None:
        if not self.ours("deep_shrink").is_visible():
            self.panel.locator(".label-wrap").first.click()
            self.ours("deep_shrink").wait_for(state="visible")

    def open_technique(self, technique: str = "deep_shrink", field: str = "factor") -> None:
        """Open a section, which switches its technique on; one of its fields says whether it is open."""
        self.open_panel()
        if not self.ours(f"{technique}_{field}").is_visible():
            self.ours(technique).locator(".label-wrap").first.click()
            self.ours(f"{technique}_{field}").wait_for(state="visible")

    def is_on(self, technique: str = "deep_shrink") -> bool:
        return bool(self.ours(f"{technique}-visible-checkbox").is_checked())

    # -- values

    def number(self, item: str) -> float:
        return float(self.ours(item).locator("input[type=number]").input_value())

    def set_number(self, item: str, value: float) -> None:
        self._type(self.ours(item).locator("input[type=number]"), value)

    def set_host_number(self, item: str, value: float) -> None:
        self._type(self.at.locator(f"#{self.name}_{item} input[type=number]"), value)

    def _type(self, box: Any, value: float) -> None:
        box.fill(str(value))
        box.press("Tab")
        self.at.wait_for_timeout(600)

    def toggle(self, item: str) -> Any:
        return self.ours(item).locator("input[type=checkbox]")

    def choice(self, item: str) -> str:
        return self.ours(item).locator("input").first.input_value()

    def choose(self, item: str, value: str) -> None:
        self.ours(item).locator("input").first.click()
        self.at.wait_for_timeout(400)  # presets are read anew when the list opens
        options = self.at.locator("ul.options li, ul[role=listbox] li")
        options.filter(has_text=re.compile(rf"^\W*{re.escape(value)}\s*$")).first.click()
        self.at.wait_for_timeout(700)

    def choices(self, item: str) -> list[str]:
        self.ours(item).locator("input").first.click()
        self.at.wait_for_timeout(400)
        texts = self.at.locator("ul.options li, ul[role=listbox] li").all_inner_texts()
        self.at.keyboard.press("Escape")
        self.ours(item).locator("input").first.blur()
        return [text.replace("✓", "").strip() for text in texts]

    def press(self, item: str) -> None:
        self.ours(item).click()
        self.at.wait_for_timeout(800)

    def plot(self) -> str:
        """What the plot says in words."""
        return self.ours("deep_shrink_view").locator("svg").get_attribute("aria-label")

    def problems(self) -> list[str]:
        return self.ours("deep_shrink_view").locator(".hires-plus-problem").all_inner_texts()

    def message(self) -> str:
        return self.ours("deep_shrink_preset_message").inner_text().strip()

    # -- the painted map

    @property
    def painting(self) -> Any:
        return self.ours("iterative_mixing_painting")

    def painted(self) -> str:
        """The map as text, which the canvas writes."""
        return self.painting.get_by_test_id("textbox").input_value()

    def stroke(self, *places: tuple[float, float]) -> None:
        """One stroke over the canvas; places are fractions of its sides."""
        self.drag(self.painting.locator("canvas"), *places)

    def drag(self, canvas: Any, *places: tuple[float, float]) -> None:
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        for index, (x, y) in enumerate(places):
            self.at.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
            if index == 0:
                self.at.mouse.down()
        self.at.mouse.up()
        self.at.wait_for_timeout(800)

    # -- the host's inpainting tabs, of which the img2img tab has several

    def inpainting(self, title: str) -> None:
        self.at.locator("#mode_img2img").get_by_text(title, exact=True).first.click()
        self.at.wait_for_timeout(500)

    def upload(self, item: str, file: Path) -> None:
        self.at.locator(f"#{item} input[type=file]").first.set_input_files(file)
        self.at.wait_for_timeout(1500)

    def sketch(self, opacity: float, *places: tuple[float, float]) -> None:
        """One stroke over the picture in Inpaint sketch; places are fractions of the picture's sides."""
        if self.page.webui.host == FORGE:
            canvas = self.at.locator("#inpaint_sketch .forge-image")
            self.at.locator("#inpaint_sketch .forge-range-row input").nth(1).evaluate(
                "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }", 100 * opacity
            )
        else:
            canvas = self.at.locator("#inpaint_sketch canvas[key=interface]")
            self.set_host_number("mask_alpha", 100 * (1 - opacity))
        self.drag(canvas, *places)

    # -- the host's own controls

    def paste(self, infotext: str) -> None:
        self.at.locator(f"#{self.name}_prompt textarea").fill(infotext)
        self.at.locator(f"#{self.name}_tools #paste").click()
        self.at.wait_for_timeout(2500)

    def generate(self) -> None:
        before = self.infotext()
        self.at.locator(f"#{self.name}_generate").click()
        self.at.wait_for_function(
            """([id, before]) => {
                const text = document.querySelector(id)?.innerText ?? "";
                return text.includes("Steps: ") && text !== before;
            }""",
            arg=[f"#html_info_{self.name}", before],
            timeout=90_000,
        )
        self.at.wait_for_timeout(1000)

    def infotext(self) -> str:
        return self.at.locator(f"#html_info_{self.name}").first.inner_text()

    def picture(self) -> Picture:
        """The generated picture as the server keeps it."""
        address = self.at.locator(f"#{self.name}_gallery img").first.get_attribute("src")
        data = self.at.request.get(unquote(address) if address.startswith("http") else self.page.webui.url + address)
        return np.asarray(Image.open(io.BytesIO(data.body())).convert("RGB"))
