"""Self-attention, as every host serves it: which rows of a layer are perturbed or recorded, and a plain attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_hires.run import COND, PERTURBED, UNCOND, Call
from lib_hires.sites import PerturbedAttention, Place, Projections, RecordedAttention
from lib_hires.topology import AttentionLayer

Rows = Sequence[int]
ProjectRows = Callable[[Rows], Projections]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head; q [B, N, heads * d], k, v [B, M, heads * d] (Vaswani et al. 2017, eq. 1)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class AttentionWalk:
    """Serves the patches at perturbed and recorded attention during one denoiser call."""

    def __init__(
        self, perturbing: Sequence[PerturbedAttention], recording: Sequence[RecordedAttention], call: Call
    ) -> None:
        self._perturbing = [patch for patch in perturbing if patch.perturbs(call)]
        self._recording = [patch for patch in recording if patch.records(call)]
        self._call = call

    def serves(self, layer: AttentionLayer) -> bool:
        """Whether this layer needs a hook in this call."""
        return any(patch.perturbs_in(layer) for patch in self._perturbing) or any(
            patch.records_in(layer) for patch in self._recording
        )

    def attention(
        self,
        layer: AttentionLayer,
        heads: int,
        batch: int,
        project: ProjectRows,
        plain: Callable[[Rows], Tensor],
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The layer's output for all `batch` rows: plain attention, but perturbed where the call's rows say so.

        `project(rows)` gives a layer's projections of some rows, `plain(rows)` the host's own attention with them,
        and `finish` what the host does with the result of an attention (its output projection, or nothing).
        """
        for recorder in self._recording:
            if recorder.records_in(layer):
                self._record(recorder, layer, heads, project)
        for patch in self._perturbing:
            rows = self._call.rows_of(PERTURBED)
            if rows and patch.perturbs_in(layer):
                perturbed = finish(patch.perturb(project(rows), self._place(layer, heads, PERTURBED)))
                chosen = set(rows)
                others = [row for row in range(batch) if row not in chosen]
                return _joined(rows, perturbed, others, plain(others)) if others else perturbed
        return plain(range(batch))

    def _record(self, recorder: RecordedAttention, layer: AttentionLayer, heads: int, project: ProjectRows) -> None:
        for kind in (UNCOND, COND):
            rows = self._call.rows_of(kind)
            if rows:
                recorder.record(project(rows), self._place(layer, heads, kind))
                return

    def _place(self, layer: AttentionLayer, heads: int, predicts: str) -> Place:
        return Place(layer, self._call.sizes[layer.side, layer.block], heads, self._call, predicts)


def _joined(changed_rows: Rows, changed: Tensor, plain_rows: Rows, plain: Tensor) -> Tensor:
    """All rows in their order, in the dtype of the plain ones, which thus stay what they are.

    Stacked from views: a scatter by row numbers would copy an index to the device in every layer.
    """
    by_row = dict(zip(changed_rows, changed.to(plain.dtype), strict=True))
    by_row.update(zip(plain_rows, plain, strict=True))
    return torch.stack([by_row[row] for row in range(len(by_row))])
