"""The bench page in a real browser, on both generations of gradio that the hosts use."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import ConsoleMessage, sync_playwright

from .opened import SLOW, Opened

ROOT = Path(__file__).parents[2]
PYTHONS = {"gradio 3.41.2": Path(sys.executable), "gradio 4.40.0": ROOT / ".venv-gradio4/bin/python"}
START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session", params=list(PYTHONS))
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
