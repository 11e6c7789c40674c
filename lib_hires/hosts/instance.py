"""Temporary attributes on one object, put back in `finally`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


@contextmanager
def instance_attribute(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set `target.name` to `value`; afterwards the object has exactly the instance attributes that it had before."""
    before = vars(target).get(name, _MISSING)
    setattr(target, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(target, name)
        else:
            setattr(target, name, before)


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute that is the object's own, also a module's buffer or submodule. Afterwards the old value is
    back, unless somebody else has set another one meanwhile."""
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        if getattr(target, name, None) is value:
            setattr(target, name, before)
