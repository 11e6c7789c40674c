"""Without HIRES_WEBUI_URL every test here is skipped. With it, no test may leave anything on the model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from .client import QUICK, TITLE, Answer, Picture, WebUI, same, shrink
from .page import Page

URL = os.environ.get("HIRES_WEBUI_URL", "")
LOG = os.environ.get("HIRES_WEBUI_LOG", "")  # optional: the file that the server's output goes to
OUR_TRACEBACK = re.compile(
    r"Error (?:running|calling|executing)[^\n]*hires[_-]plus|File \"[^\"\n]*lib_hires", re.IGNORECASE
)
CHROMIUM = os.environ.get("HIRES_CHROMIUM", "/usr/bin/chromium")
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if URL:
        return
    skip = pytest.mark.skip(reason="needs a running WebUI: set HIRES_WEBUI_URL (docs/testing.md)")
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def webui() -> Iterator[WebUI]:
    """The server under test, with a Stable Diffusion 1.5 checkpoint loaded."""
    server = WebUI(URL)
    assert server.has_script(TITLE), f"{URL} does not list {TITLE!r}: is the extension installed and free of errors?"
    title = server.checkpoint("sd1")
    if title is None:
        yield server
        return
    with server.using_checkpoint(title):
        yield server


@pytest.fixture
def server_log() -> Callable[[], str]:
    """What the server has printed since the test began; empty where HIRES_WEBUI_LOG does not say where it is."""
    start = Path(LOG).stat().st_size if LOG else 0

    def read() -> str:
        if not LOG:
            return ""
        with Path(LOG).open(errors="replace") as file:
            file.seek(start)
            return file.read()

    return read


@pytest.fixture(autouse=True)
def no_error_of_ours(server_log: Callable[[], str]) -> Iterator[None]:
    """No test may make the plugin print a traceback, except one that passes through it from a fault made elsewhere."""
    yield
    log = server_log()
    if "a fault made by the test extension" not in log:
        found = OUR_TRACEBACK.search(log)
        assert found is None, log[max(0, found.start() - 500) : found.end() + 2500]


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test the loaded model carries no hook, shadowed forward or patch of the plugin."""
    yield
    if URL and "webui" in request.fixturenames:
        left = request.getfixturevalue("webui").residue()
        assert left is None or not (left["hooks"] or left["shadowed_forwards"]), left


@pytest.fixture(scope="session")
def plain(webui: WebUI) -> Picture:
    """The ordinary picture that every later plain request must give again."""
    return webui.txt2img().picture


@pytest.fixture
def unharmed(webui: WebUI, plain: Picture) -> Callable[[], None]:
    """Call it to generate the plain picture again: same pixels, and none of our keys."""

    def check() -> None:
        again = webui.txt2img()
        assert same(again.picture, plain), "the next plain picture is damaged"
        assert not again.keys, again.keys

    return check


@pytest.fixture
def quick(webui: WebUI) -> Callable[..., Answer]:
    """Send a txt2img request that takes next to no time."""
    return partial(webui.txt2img, **QUICK)


@pytest.fixture(scope="session")
def quick_plain(webui: WebUI) -> Picture:
    return webui.txt2img(**QUICK).picture


@pytest.fixture
def quick_unharmed(quick: Callable[..., Answer], quick_plain: Picture) -> Callable[[], None]:
    """As `unharmed`, for quick requests."""

    def check() -> None:
        again = quick()
        assert same(again.picture, quick_plain), "the next plain picture is damaged"
        assert not again.keys, again.keys

    return check


@pytest.fixture
def faults(webui: WebUI) -> None:
    if webui.residue() is None:
        pytest.skip("needs the test extension tests/webui/fault_extension in the WebUI (docs/testing.md)")


@pytest.fixture
def on_family(webui: WebUI) -> Iterator[Callable[[str], WebUI]]:
    """Load a checkpoint of a family ("sdxl", "dit" ...) until the test ends; skips where none is installed."""
    with ExitStack() as stack:

        def switch(family: str) -> WebUI:
            title = webui.checkpoint(family)
            if title is None:
                pytest.skip(f"no {family} checkpoint is installed")
            stack.enter_context(webui.using_checkpoint(title))
            return webui

        yield switch


@pytest.fixture(scope="session")
def shrunk(webui: WebUI) -> Answer:
    """The ordinary picture with DeepShrink on."""
    return webui.txt2img(shrink())


@pytest.fixture(scope="session")
def browser_page(webui: WebUI) -> Iterator[Page]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no Chromium at {CHROMIUM}: set HIRES_CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1360, "height": 1500})
        context.route("**/*", lambda route: route.continue_() if webui.url in route.request.url else route.abort())
        context.set_default_timeout(15_000)
        yield Page(context.new_page(), webui)
        browser.close()


@pytest.fixture
def page(browser_page: Page) -> Iterator[Page]:
    """A newly loaded page for every test, and no complaint of ours in its console afterwards."""
    browser_page.complaints.clear()
    browser_page.open()
    yield browser_page
    ours = [text for text in browser_page.complaints if "hires" in text.lower()]
    assert not ours, ours
