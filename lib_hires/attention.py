"""Self-attention, as every host serves it: who changes, perturbs or records a layer, and a plain attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_hires.run import COND, PERTURBED, UNCOND, Call
from lib_hires.sites import Attend, PerturbedAttention, Place, Projections, RecordedAttention, SelfAttention
from lib_hires.topology import AttentionLayer

Rows = Sequence[int]
ProjectRows = Callable[[Rows], Projections]
Acting = Sequence[SelfAttention]
ChangedRows = Callable[[Rows, Place, Acting], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head; q [B, N, heads * d], k, v [B, M, heads * d] (Vaswani et al. 2017, eq. 1)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def changed_sources(acting: Acting, key_source: Tensor, value_source: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """What all patches that act here make of the sources of K and V, in order."""
    for patch in acting:
        key_source, value_source = patch.sources(key_source, value_source, place)
    return key_source, value_source


def chained(acting: Acting, place: Place, whole: Attend, parts: Attend) -> Attend:
    """The attention of all patches that act here, the first outermost.

    It ends in `whole` for all the place's tokens and in `parts` for some of them: what one patch makes of the map (a
    window, a tile) is no map any more, and passes the other patches by.
    """
    height, width = place.size

    def link(patch: SelfAttention, inner: Attend) -> Attend:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return patch.attend(q, k, v, place, inner) if q.shape[1] == height * width else parts(q, k, v)

        return attention

    def end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (whole if q.shape[1] == height * width else parts)(q, k, v)

    chain: Attend = end
    for patch in reversed(acting):
        chain = link(patch, chain)
    return chain


class AttentionWalk:
    """Serves the patches at changed, perturbed and recorded attention during one denoiser call."""

    def __init__(
        self,
        perturbing: Sequence[PerturbedAttention],
        recording: Sequence[RecordedAttention],
        changing: Sequence[SelfAttention],
        call: Call,
    ) -> None:
        self._perturbing = [patch for patch in perturbing if patch.perturbs(call)]
        self._recording = [patch for patch in recording if patch.records(call)]
        self._changing = changing
        self._call = call

    def serves(self, layer: AttentionLayer) -> bool:
        """Whether this layer needs a hook in this call."""
        return (
            any(patch.perturbs_in(layer) for patch in self._perturbing)
            or any(patch.records_in(layer) for patch in self._recording)
            or any(patch.may_act(layer, self._call) for patch in self._changing)
        )

    def splits(self, layer: AttentionLayer) -> bool:
        """Whether perturbed rows, which need whole maps, stand beside others here: sources then differ by row."""
        return bool(self._perturbed_rows(layer))

    def sources(self, layer: AttentionLayer, heads: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The sources of K and V for all rows, for hosts that ask before they project."""
        place = self._place(layer, heads)
        return changed_sources(self._acting(place), key, value, place)

    def attention(
        self,
        layer: AttentionLayer,
        heads: int,
        batch: int,
        project: ProjectRows,
        plain: Callable[[Rows], Tensor],
        changed: ChangedRows,
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The layer's output for all `batch` rows: perturbed where the call's rows say so, else as the patches that
        act here change it, else the host's own.

        `project(rows)` gives a layer's projections of some rows, `plain(rows)` the host's own attention with them,
        `changed(rows, place, acting)` the attention that some patches change, and `finish` what the host does with
        the result of an attention (its output projection, or nothing).
        """
        place = self._place(layer, heads)
        acting = self._acting(place)
        for recorder in self._recording:
            if recorder.records_in(layer):
                self._record(recorder, project, place)
        attention = (lambda rows: changed(rows, place, acting)) if acting else plain
        rows = self._perturbed_rows(layer)
        if not rows:
            return attention(range(batch))
        patch = next(patch for patch in self._perturbing if patch.perturbs_in(layer))
        others = [row for row in range(batch) if row not in rows]
        perturbed = finish(patch.perturb(project(rows), place))
        return perturbed if not others else _joined(rows, perturbed, others, attention(others))

    def _place(self, layer: AttentionLayer, heads: int) -> Place:
        return Place(layer, self._call.sizes[layer.side, layer.block], heads, self._call)

    def _acting(self, place: Place) -> Acting:
        if any(patch.records_in(place.layer) for patch in self._recording):
            return []
        changing = (patch for patch in self._changing if patch.may_act(place.layer, place.call))
        return [patch for patch in changing if patch.acts_at(place)]

    def _perturbed_rows(self, layer: AttentionLayer) -> Rows:
        perturbed = any(patch.perturbs_in(layer) for patch in self._perturbing)
        return self._call.rows_of(PERTURBED) if perturbed else []

    def _record(self, recorder: RecordedAttention, project: ProjectRows, place: Place) -> None:
        rows = self._call.rows_of(UNCOND) or self._call.rows_of(COND)
        if rows:
            recorder.record(project(rows), place)


def _joined(rows: Rows, one: Tensor, others: Rows, two: Tensor) -> Tensor:
    out = torch.empty(len(rows) + len(others), *one.shape[1:], dtype=one.dtype, device=one.device)
    out[list(rows)] = one
    out[list(others)] = two.to(one.dtype)
    return out
