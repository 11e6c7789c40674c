"""X/Y/Z plots: cells that differ as they should, and that tell of their own values only."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from .client import NOTE, Answer, distance, ours, same, shrink

SWITCH = "[Hires Plus] DeepShrink"
FACTOR = "[Hires Plus] DeepShrink Downscale factor"
METHOD = "[Hires Plus] DeepShrink Upscale method"


class Plot:
    """The cells of an X/Y/Z plot, without its grid."""

    def __init__(self, answer: Answer) -> None:
        assert answer.status == 200, answer.body
        self.pictures = answer.pictures[1:]
        self.keys = [ours(text) for text in answer.infotexts[1:]]


@pytest.fixture
def plot(webui, quick):
    def draw(*axes: tuple[str, str | Sequence[str]], plugin=None, tab="txt2img", **overrides) -> Plot:
        arguments = []
        for label, values in axes:
            is_text = isinstance(values, str)
            arguments += [webui.axis(label, tab), values if is_text else "", [] if is_text else list(values)]
        arguments += [0, "", []] * (3 - len(axes))
        # legend, lone images, sub grids, seeds kept, vary seeds in x, y, z, margin, csv mode
        arguments += [False, True, False, False, False, False, False, 0, False]
        send = webui.img2img if tab == "img2img" else quick
        return Plot(send(plugin, script_name="x/y/z plot", script_args=arguments, **overrides))

    return draw


def test_the_axes_are_there_once(webui):
    for tab in ("txt2img", "img2img"):
        labels = [label for label in webui.axes(tab) if label.startswith("[Hires Plus]")]
        assert len(labels) == len(set(labels)) >= 14
        assert {SWITCH, FACTOR, METHOD} <= set(labels)


def test_over_a_number(quick, plot, quick_unharmed):
    cells = plot((FACTOR, "1.5, 2, 3"), plugin=shrink(block=1))
    assert len(cells.pictures) == 3
    for picture, factor in zip(cells.pictures, (1.5, 2, 3), strict=True):
        assert same(picture, quick(shrink(block=1, factor=factor)).picture), factor
    assert [keys.get("DeepShrink Downscale factor") for keys in cells.keys] == ["1.5", None, "3"]
    assert all(keys["DeepShrink"] == "on" and keys["DeepShrink Block number"] == "1" for keys in cells.keys)
    quick_unharmed()


def test_on_and_off(quick, plot, quick_plain, quick_unharmed):
    cells = plot((SWITCH, ["on", "off", "on"]), plugin=shrink(enabled=False))
    assert same(cells.pictures[0], quick(shrink()).picture)
    assert same(cells.pictures[1], quick_plain)
    assert same(cells.pictures[2], quick(shrink()).picture)
    assert cells.keys[0] == cells.keys[2] == {"DeepShrink": "on", "DeepShrink Only above native size": "off"}
    assert cells.keys[1] == {}
    quick_unharmed()


def test_over_a_choice(quick, plot, quick_unharmed):
    cells = plot((METHOD, ["bicubic", "nearest-exact"]), plugin=shrink())
    for picture, method in zip(cells.pictures, ("bicubic", "nearest-exact"), strict=True):
        assert same(picture, quick(shrink(upscale_method=method)).picture), method
    assert not same(*cells.pictures)
    assert [keys.get("DeepShrink Upscale method") for keys in cells.keys] == [None, "nearest-exact"]
    quick_unharmed()


def test_two_axes(quick, plot, quick_plain, quick_unharmed):
    cells = plot((FACTOR, "1.5, 2"), (SWITCH, ["off", "on"]), plugin=shrink())
    assert len(cells.pictures) == 4
    for index, picture in enumerate(cells.pictures):
        row, column = divmod(index, 2)
        factor = (1.5, 2)[column]
        wanted = quick(shrink(factor=factor)).picture if row else quick_plain
        assert same(picture, wanted), index
        assert cells.keys[index].get("DeepShrink Downscale factor") == ("1.5" if row and factor == 1.5 else None)
        assert ("DeepShrink" in cells.keys[index]) == bool(row)
    quick_unharmed()


def test_a_parameter_axis_switches_on(quick, plot):
    """Whoever plots a parameter wants to see it act, without having to tick the box as well."""
    cells = plot(("[Hires Plus] DeepShrink Only above native size", ["off", "on"]))
    assert same(cells.pictures[0], quick(shrink()).picture)
    assert cells.keys[0]["DeepShrink"] == "on"
    assert "DeepShrink" not in cells.keys[1]


def test_over_presets(quick, plot):
    cells = plot(("[Hires Plus] DeepShrink preset", ["2x, hard cut", "1.5x"]), plugin=shrink())
    assert len(cells.pictures) == 2
    assert all(NOTE in keys or "DeepShrink" in keys for keys in cells.keys)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("much", ("Downscale factor", "much", "0.5 to 9")),
        ("1e9", ("Downscale factor", "0.5 to 9")),
        ("nan", ("Downscale factor", "nan", "0.5 to 9")),
        ("-3", ("Downscale factor", "-3", "0.5 to 9")),
        ("inf", ("Downscale factor", "inf", "0.5 to 9")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_on_an_axis(quick, plot, quick_unharmed, values, words):
    cells = plot((FACTOR, f"2, {values}"), plugin=shrink())
    assert len(cells.pictures) == 2
    assert same(cells.pictures[0], quick(shrink()).picture)
    assert NOTE not in cells.keys[0]
    assert all(word in cells.keys[1][NOTE] for word in words), cells.keys[1]
    quick_unharmed()


def test_nonsense_ranges_do_no_harm(plot, quick_unharmed):
    for values in ("1-2 (+0)", "5-1", ",,2,", "2-", "1-3 [2]"):
        assert plot((FACTOR, values), plugin=shrink()).pictures, values
    quick_unharmed()


def test_in_img2img(webui, plot):
    cells = plot((SWITCH, ["off", "on"]), plugin=shrink(), tab="img2img")
    # not the same bits: A1111 encodes the picture of each cell with another random state
    off, on = webui.img2img().picture, webui.img2img(shrink()).picture
    for cell, own, other in zip(cells.pictures, (off, on), (on, off), strict=True):
        assert distance(cell, own) < 0.5 < distance(cell, other)


def test_beside_an_axis_of_the_host(quick, plot, quick_unharmed):
    cells = plot(("Steps", "1, 2"), (SWITCH, ["off", "on"]), plugin=shrink())
    assert same(cells.pictures[2], quick(shrink(), steps=1).picture)
    assert same(cells.pictures[3], quick(shrink(), steps=2).picture)
    assert [("DeepShrink" in keys) for keys in cells.keys] == [False, False, True, True]
    quick_unharmed()
