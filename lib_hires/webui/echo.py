"""Values of an API request that the host could not repeat in its answer.

Hosts put the request into the response. NaN, infinity and integers beyond 64 bits can be read from JSON but not all be
written to it: the generation would succeed and the answer fail, as an HTTP 500.
"""

from __future__ import annotations

import math
from typing import Any

_LARGEST = 2**63 - 1
_DEEPEST = 50  # far from the recursion limit


def make_repeatable(value: Any, depth: int = 0) -> None:
    """Replace such numbers inside a dict or list by their text, in place: the host holds the same object."""
    if depth > _DEEPEST or not isinstance(value, (dict, list)):
        return
    for place, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if not _is_repeatable(item):
            value[place] = _text(item)
        else:
            make_repeatable(item, depth + 1)


def _is_repeatable(item: Any) -> bool:
    if isinstance(item, float):
        return math.isfinite(item)
    return not isinstance(item, int) or abs(item) <= _LARGEST


def _text(item: Any) -> str:
    try:
        return str(item)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a very large integer"
