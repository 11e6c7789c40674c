"""Floating-point operations of a network while it draws: matrix products, convolutions, attention as two products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# torch's counter knows the attention kernels of GPUs only
_ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    operations: int = sdpa_flop_count(q, k, v)
    return operations


class Counted:
    """Calls the network, and counts its operations while `counting`. Counting costs a few milliseconds a call."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self._counting = False
        self.operations = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._counting:
            return self._network(*args, **kwargs)
        with FlopCounterMode(display=False, custom_mapping={_ATTENTION_ON_CPU: _attention}) as counter:
            out = self._network(*args, **kwargs)
        self.operations += counter.get_total_flops()
        return out

    @contextmanager
    def counting(self) -> Iterator[None]:
        """`operations` are those made while this is open."""
        self._counting, self.operations = True, 0
        try:
            yield
        finally:
            self._counting = False
