"""Bad values: never an error of the server, never a damaged later request, always a message that helps.

A value that can be repaired is repaired (its nearest bound, its default), one that cannot be read switches the
technique off; the note in the answer names the field, the value and what would be accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from .client import NOTE, Answer, same, shrink


@dataclass(frozen=True)
class Case:
    """A request's block for DeepShrink, the words of the note, and the good block with the same effect (None: off)."""

    name: str
    values: dict[str, Any]
    words: tuple[str, ...]
    means: dict[str, Any] | None = None


FACTOR = ("Downscale factor", "0.5 to 9")
CASES = [
    Case("word for a number", {"factor": "much"}, (*FACTOR, "much")),
    Case("empty text for a number", {"factor": ""}, FACTOR),
    Case("far above", {"factor": 1e9}, (*FACTOR, "1000000000"), {"factor": 9}),
    Case("below", {"factor": -4}, (*FACTOR, "-4"), {"factor": 0.5}),
    Case("text out of range", {"factor": "1e9"}, (*FACTOR, "1e9"), {"factor": 9}),
    Case("text that is not a number", {"factor": "NaN"}, (*FACTOR, "NaN")),
    Case("text infinity", {"factor": "inf"}, (*FACTOR, "inf"), {"factor": 9}),
    Case("a very large integer", {"factor": 10**18}, FACTOR, {"factor": 9}),
    Case("null", {"factor": None}, ("Downscale factor", "default 2"), {"factor": 2}),
    Case("list for a number", {"factor": [2]}, FACTOR),
    Case("dict for a number", {"factor": {"value": 2}}, FACTOR),
    Case("true for a number", {"factor": True}, FACTOR),
    Case("fraction for a whole number", {"block": 2.6}, ("Block number", "2.6", "1 to 32"), {"block": 3}),
    Case("word for a whole number", {"block": "three"}, ("Block number", "three", "1 to 32")),
    Case("far above for a whole number", {"block": 1e9}, ("Block number", "1 to 32")),
    Case("fraction above 1", {"end": 7, "gradual": 0}, ("End", "7", "0 to 1"), {"end": 1, "gradual": 0}),
    Case("empty window", {"start": 0.5, "end": 0.2, "gradual": 0.1}, ("DeepShrink", "raise End or Gradual")),
    Case("word for a switch", {"after_skip": "maybe"}, ("Shrink after skip", "maybe", "on")),
    Case("list for a switch", {"after_skip": []}, ("Shrink after skip",)),
    Case("unknown choice", {"downscale_method": "lanczos"}, ("Downscale method", "lanczos", "bislerp")),
    Case("number for a choice", {"downscale_method": 3}, ("Downscale method", "3", "bislerp")),
    Case("nonsense for stages", {"more_stages": "nonsense"}, ("More stages", "nonsense", "block:factor")),
    Case("number for stages", {"more_stages": 5}, ("More stages", "5")),
    Case("stage out of range", {"more_stages": "6:99:0-1"}, ("More stages", "99", "0.5 to 9")),
    Case("unknown passes", {"passes": "sometimes"}, ("Passes", "sometimes", "Hires pass")),
    Case("unknown setting", {"faktor": 3}, ("faktor", "factor"), {}),
    Case("unknown preset", {"preset": "enormous"}, ("Preset", "enormous", "4x")),
    Case("number for a preset", {"preset": 4}, ("Preset", "4")),
    Case("unclear switch", {"enabled": "perhaps"}, ("Enabled", "perhaps")),
    Case("a block the model lacks", {"block": 20}, ("DeepShrink", "block 20", "1 to 11")),
]
FINE = [
    Case("number as text", {"factor": "2.5"}, (), {"factor": 2.5}),
    Case("whole number as text", {"block": " 3 "}, (), {"block": 3}),
    Case("number for a switch", {"after_skip": 0}, (), {"after_skip": False}),
    Case("word for a switch", {"after_skip": "off"}, (), {"after_skip": False}),
    Case("choice in other case", {"downscale_method": "BILINEAR"}, (), {"downscale_method": "bilinear"}),
]


def assert_note(answer: Answer, words: tuple[str, ...]) -> None:
    assert answer.status == 200, answer.body
    missing = [word for word in words if word not in answer.note]
    assert not missing, f"{missing} not in the note {answer.note!r}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_over_the_api(quick, quick_plain, quick_unharmed, case):
    answer = quick(shrink(**case.values))
    assert_note(answer, case.words)
    if case.means is None:
        assert not answer.is_on
        assert same(answer.picture, quick_plain)
    else:
        assert answer.is_on
        assert same(answer.picture, quick(shrink(**case.means)).picture)
    quick_unharmed()


@pytest.mark.parametrize("case", FINE, ids=lambda case: case.name)
def test_readable_values_need_no_note(quick, case):
    answer = quick(shrink(**case.values))
    good = quick(shrink(**case.means))
    assert NOTE not in answer.keys
    assert answer.keys == good.keys
    assert same(answer.picture, good.picture)


def test_several_mistakes_are_all_told(quick):
    answer = quick(shrink(factor=77, end=-3, faktor=1))
    assert_note(answer, ("Downscale factor", "77", "End", "-3", "faktor"))


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        ({"deep_shrimp": {"factor": 2}}, ("deep_shrimp", "deep_shrink")),
        ({"deep_shrink": 3}, ("DeepShrink", "3")),
        ({"deep_shrink": "on"}, ("DeepShrink",)),
        ({"deep_shrink": [True, 3]}, ("DeepShrink",)),
        ({"": None}, ("unknown technique",)),
    ],
    ids=["unknown technique", "number for settings", "text for settings", "list for settings", "empty name"],
)
def test_a_dict_of_the_wrong_shape(quick, quick_plain, quick_unharmed, plugin, words):
    answer = quick(plugin)
    assert_note(answer, words)
    assert same(answer.picture, quick_plain)
    quick_unharmed()


@pytest.mark.parametrize(
    "args",
    [[None], [None] * 13, [[True, 3, 2.0]], [{}, 1, 2, 3], [0], ["off"]],
    ids=["null", "nulls", "nested list", "dict and more", "zero", "off"],
)
def test_positional_lists_that_mean_off(quick, quick_plain, args):
    answer = quick(args)
    assert answer.status == 200, answer.body
    assert not answer.is_on
    assert same(answer.picture, quick_plain)


def test_too_many_positional_values(quick, quick_unharmed):
    full = [True, 3, 2.0, 0.0, 0.35, 0.6, True, "bicubic", "bicubic", False, "", False, "Both"]
    answer = quick([*full, 1, "more", None, {}])
    assert answer.status == 200, answer.body
    assert same(answer.picture, quick(shrink()).picture)
    quick_unharmed()


def test_bad_positional_values(quick, quick_plain, quick_unharmed):
    answer = quick([True, "three", {}, [], None])
    assert_note(answer, ("Block number", "three", "1 to 32"))
    assert same(answer.picture, quick_plain)
    quick_unharmed()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400], ids=["NaN", "Infinity", "huge integer"])
def test_values_that_the_host_cannot_echo(quick, quick_unharmed, value):
    """The host reads these and may fail when its answer repeats the request. The next request must be whole."""
    quick(shrink(factor=value))
    quick_unharmed()


@pytest.mark.parametrize(
    ("text", "words", "means"),
    [
        ("DeepShrink Downscale factor: 1e9", (*FACTOR, "1e9"), {"factor": 9}),
        ("DeepShrink Downscale factor: much", (*FACTOR, "much"), None),
        ("DeepShrink Downscale factor: NaN", FACTOR, None),
        ("DeepShrink Block number: 2.6", ("Block number", "2.6"), {"block": 3}),
        ("DeepShrink Shrink after skip: maybe", ("Shrink after skip", "maybe"), None),
        ("DeepShrink Downscale method: lanczos", ("Downscale method", "lanczos"), None),
        ("DeepShrink More stages: nonsense", ("More stages", "nonsense"), None),
        ("DeepShrink Passes: sometimes", ("Passes", "sometimes"), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_over_the_infotext_field(quick, quick_plain, quick_unharmed, text, words, means):
    infotext = f"a lighthouse\nSteps: 1, DeepShrink: on, DeepShrink Only above native size: off, {text}"
    answer = quick(infotext=infotext)
    assert_note(answer, words)
    wanted = quick_plain if means is None else quick(shrink(**means)).picture
    assert same(answer.picture, wanted)
    quick_unharmed()


def test_in_img2img(webui):
    off = webui.img2img()
    answer = webui.img2img(shrink(factor="much"))
    assert_note(answer, FACTOR)
    assert same(answer.picture, off.picture)
    assert same(webui.img2img().picture, off.picture)
