"""Self-attention, as every host serves it: who changes, perturbs or records a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib_hires.plan import Plan
from lib_hires.run import COND, PERTURBED, UNCOND, Call
from lib_hires.sites import Attend, PerturbedAttention, Place, Projections, RecordedAttention, SelfAttention
from lib_hires.topology import AttentionLayer

Rows = Sequence[int]
ProjectRows = Callable[[Rows], Projections]
Acting = Sequence[SelfAttention]
ChangedRows = Callable[[Rows, Place, Acting], Tensor]


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


@dataclass(frozen=True)
class AttentionPatches:
    """The patches of a plan at the three sites of self-attention, and the seeds of the pictures that they act on."""

    perturbing: Sequence[PerturbedAttention] = ()
    recording: Sequence[RecordedAttention] = ()
    changing: Acting = ()
    seeds: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, plan: Plan) -> AttentionPatches:
        sites = plan.at(PerturbedAttention), plan.at(RecordedAttention), plan.at(SelfAttention)
        return cls(*sites, seeds=plan.run.seeds)

    def __bool__(self) -> bool:
        return bool(self.perturbing or self.recording or self.changing)

    def may_serve(self, layer: AttentionLayer) -> bool:
        """Whether this layer may need a hook in some call; where changing patches act is known call by call."""
        perturbed = any(patch.perturbs_in(layer) for patch in self.perturbing)
        return bool(self.changing) or perturbed or any(patch.records_in(layer) for patch in self.recording)


@dataclass(frozen=True)
class HostLayer:
    """How a host runs one self-attention for `batch` rows.

    `project(rows)` gives the layer's projections of some rows, `plain(rows)` the host's own attention with them,
    `changed(rows, place, acting)` the attention that some patches change, and `finish` is what the host does with the
    result of an attention (its output projection, or nothing).
    """

    layer: AttentionLayer
    heads: int
    batch: int
    project: ProjectRows
    plain: Callable[[Rows], Tensor]
    changed: ChangedRows
    finish: Callable[[Tensor], Tensor]


class AttentionWalk:
    """Serves the patches at changed, perturbed and recorded attention during one denoiser call."""

    def __init__(self, patches: AttentionPatches, call: Call) -> None:
        self._perturbing = [patch for patch in patches.perturbing if patch.perturbs(call)]
        self._recording = [patch for patch in patches.recording if patch.records(call)]
        self._changing = patches.changing
        self._seeds = patches.seeds
        self._call = call

    def serves(self, layer: AttentionLayer) -> bool:
        """Whether this layer needs a hook in this call."""
        return (
            any(patch.perturbs_in(layer) for patch in self._perturbing)
            or any(patch.records_in(layer) for patch in self._recording)
            or any(patch.may_act(layer, self._call) for patch in self._changing)
        )

    def splits(self, layer: AttentionLayer, heads: int, batch: int) -> bool:
        """Whether sources differ by row here: perturbed rows, which need whole maps, stand beside others, or a patch
        draws for every picture."""
        if self._perturbed_rows(layer):
            return True
        place = self._place(layer, heads)
        return len(self._served_together(place, self._acting(place), range(batch))) > 1

    def sources(self, layer: AttentionLayer, heads: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The sources of K and V for all rows, for hosts that ask before they project. Not where rows split."""
        place = self._place(layer, heads)
        acting = self._acting(place)
        ((place, _),) = self._served_together(place, acting, range(len(key)))
        return changed_sources(acting, key, value, place)

    def attention(self, host: HostLayer) -> Tensor:
        """The layer's output for all rows: perturbed where the call's rows say so, else as the patches that act here
        change it, else the host's own."""
        layer, place = host.layer, self._place(host.layer, host.heads)
        acting = self._acting(place)
        for recorder in self._recording:
            if recorder.records_in(layer):
                self._record(recorder, host)
        attention = (lambda rows: self._changed(host, place, acting, rows)) if acting else host.plain
        rows = self._perturbed_rows(layer)
        if not rows:
            return attention(range(host.batch))
        patch = next(patch for patch in self._perturbing if patch.perturbs_in(layer))
        perturbed = host.finish(patch.perturb(host.project(rows), self._place(layer, host.heads, rows)))
        chosen = set(rows)
        others = [row for row in range(host.batch) if row not in chosen]
        if not others:
            return perturbed
        plain = attention(others)  # which stay what they are: all rows get their dtype
        return _joined([(rows, perturbed.to(plain.dtype)), (others, plain)])

    def _changed(self, host: HostLayer, place: Place, acting: Acting, rows: Rows) -> Tensor:
        parts = [
            (together, host.changed(together, at, acting))
            for at, together in self._served_together(place, acting, rows)
        ]
        return parts[0][1] if len(parts) == 1 else _joined(parts)

    def _served_together(self, place: Place, acting: Acting, rows: Rows) -> list[tuple[Place, Rows]]:
        """All rows at once, or those of one seed after another where a patch draws by it."""
        if len(set(self._seeds)) == 1 or not any(patch.draws_at(place) for patch in acting):
            return [(place, rows)]
        by_seed: dict[int, list[int]] = {}
        for row in rows:
            by_seed.setdefault(self._seed_of(row), []).append(row)
        return [(replace(place, seed=seed), together) for seed, together in by_seed.items()]

    def _seed_of(self, row: int) -> int:
        """The seed of a row's picture; the first picture's where nobody tells whose the row is."""
        picture = self._call.rows[row].picture if row < len(self._call.rows) else None
        return self._seeds[picture] if picture is not None and picture < len(self._seeds) else self._seeds[0]

    def _perturbed_rows(self, layer: AttentionLayer) -> Rows:
        perturbed = any(patch.perturbs_in(layer) for patch in self._perturbing)
        return self._call.rows_of(PERTURBED) if perturbed else []

    def _acting(self, place: Place) -> Acting:
        if any(patch.records_in(place.layer) for patch in self._recording):
            return []
        changing = (patch for patch in self._changing if patch.may_act(place.layer, place.call))
        return [patch for patch in changing if patch.acts_at(place)]

    def _record(self, recorder: RecordedAttention, host: HostLayer) -> None:
        for kind in (UNCOND, COND):
            rows = self._call.rows_of(kind)
            if rows:
                recorder.record(host.project(rows), self._place(host.layer, host.heads, rows))
                return

    def _place(self, layer: AttentionLayer, heads: int, picked: Rows = ()) -> Place:
        rows = tuple(self._call.rows[row] for row in picked)
        return Place(layer, self._call.sizes[layer.side, layer.block], heads, self._call, rows, self._seeds[0])


def _joined(parts: Sequence[tuple[Rows, Tensor]]) -> Tensor:
    """All rows in their order.

    Stacked from views: a scatter by row numbers would copy an index to the device in every layer.
    """
    by_row: dict[int, Tensor] = {}
    for rows, out in parts:
        by_row.update(zip(rows, out, strict=True))
    return torch.stack([by_row[row] for row in sorted(by_row)])
