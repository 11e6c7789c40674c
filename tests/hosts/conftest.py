"""What tests of lifetimes need."""

import gc

import pytest


@pytest.fixture
def without_collector():
    """Objects that only the garbage collector would free stay."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
