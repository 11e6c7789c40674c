"""The walk over a layer's attention: who is perturbed, who is recorded, and that everybody else stays as he was."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib_hires.attention import attend
from lib_hires.attention_walk import AttentionPatches, AttentionWalk, HostLayer
from lib_hires.run import COND, PERTURBED, UNCOND, Call, Row
from lib_hires.sites import PerturbedAttention, Projections, RecordedAttention
from lib_hires.topology import MIDDLE, OUTPUT, AttentionLayer

MIDDLE_0 = AttentionLayer(MIDDLE, 0, 0)
MIDDLE_1 = AttentionLayer(MIDDLE, 0, 1)
UP = AttentionLayer(OUTPUT, 3, 0)
HEADS, SIZE = 2, (3, 5)
ROWS = st.lists(st.sampled_from([COND, UNCOND, PERTURBED]), min_size=1, max_size=7).map(tuple)


def nobody_changes(rows, place, acting):
    raise AssertionError("no patch at this site")


class Layer:
    """A self-attention as hosts have it: projections, heads, and an output projection."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8).to(dtype).requires_grad_(False) for _ in range(4))
        self.projected = []  # "q", "k", "v" as they were computed for the walk's patches

    def plain(self, x):
        return torch.stack([self.out(attend(self.q(row), self.k(row), self.v(row), HEADS)[0]) for row in x[:, None]])

    def project(self, x):
        def noted(name):
            self.projected.append(name)
            return getattr(self, name)(x)

        return Projections(lambda: noted("q"), lambda: noted("k"), lambda: noted("v"))

    def walked(self, walk, x, layer=MIDDLE_0):
        return walk.attention(self.host(x, self.out, layer))

    def host(self, x, finish, layer=MIDDLE_0):
        project, plain = (lambda rows: self.project(x[list(rows)])), (lambda rows: self.plain(x[list(rows)]))
        return HostLayer(layer, HEADS, len(x), project, plain, nobody_changes, finish)


class Identity(PerturbedAttention):
    def __init__(self, active=True, layers=(MIDDLE_0,)):
        self.active, self.layers, self.places = active, layers, []

    def perturbs(self, call):
        return self.active

    def perturbs_in(self, layer):
        return layer in self.layers

    def perturb(self, projections, place):
        self.places.append(place)
        return projections.v


class Recorder(RecordedAttention):
    def __init__(self, layers=(MIDDLE_0,)):
        self.layers, self.seen = layers, []

    def records(self, call):
        return True

    def records_in(self, layer):
        return layer in self.layers

    def record(self, projections, place):
        self.seen.append((place, projections.q, projections.k))


def call_with(rows):
    """Every row of a kind is another picture's."""
    rows = [Row(kind, list(rows[:number]).count(kind)) for number, kind in enumerate(rows)]
    return Call(1.0, 0, sizes={(MIDDLE, 0): SIZE, (OUTPUT, 3): SIZE}, rows=tuple(rows))


def tokens(rows, dtype=torch.float32):
    return torch.randn(len(rows), 15, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


@given(rows=ROWS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_only_perturbed_rows_change_in_any_layout(rows, dtype):
    layer, x = Layer(dtype), tokens(rows, dtype)
    out = layer.walked(AttentionWalk(AttentionPatches([Identity()], []), call_with(rows)), x)
    plain = layer.plain(x)
    assert out.shape == plain.shape and out.dtype == plain.dtype
    for row, kind in enumerate(rows):
        want = layer.out(layer.v(x[row])) if kind == PERTURBED else plain[row]
        assert torch.equal(out[row], want) or (kind == PERTURBED and torch.allclose(out[row], want, atol=1e-2))


def test_plain_rows_keep_their_bits_where_the_perturbed_ones_are_less_precise():
    class Half(Identity):
        def perturb(self, projections, place):
            return projections.v.half().float()

    layer, x = Layer(), tokens("..")
    walk = AttentionWalk(AttentionPatches([Half()], []), call_with([COND, PERTURBED]))
    out = walk.attention(layer.host(x, lambda t: layer.out(t).half()))
    assert out.dtype == torch.float32 and torch.equal(out[0], layer.plain(x)[0])


@given(rows=ROWS)
def test_a_recorder_sees_uncond_rows_or_else_cond_rows_and_changes_nothing(rows):
    layer, x, recorder = Layer(), tokens(rows), Recorder()
    call = call_with(rows)
    out = layer.walked(AttentionWalk(AttentionPatches([], [recorder]), call), x)
    assert torch.equal(out, layer.plain(x))
    kind = UNCOND if UNCOND in rows else COND
    shown = [row for row, predicts in enumerate(rows) if predicts == kind]
    assert len(recorder.seen) == bool(shown)
    for place, q, k in recorder.seen:
        assert place.rows == tuple(Row(kind, picture) for picture in range(len(shown)))
        assert (place.size, place.tokens, place.heads) == (SIZE, 15, HEADS)
        assert place.call is call and place.layer == MIDDLE_0
        torch.testing.assert_close(q, layer.q(x[shown]))
        torch.testing.assert_close(k, layer.k(x[shown]))
    assert "v" not in layer.projected


def test_both_in_one_layer():
    rows = (COND, PERTURBED, UNCOND)
    layer, x, recorder, identity = Layer(), tokens(rows), Recorder(), Identity()
    out = layer.walked(AttentionWalk(AttentionPatches([identity], [recorder]), call_with(rows)), x)
    assert torch.equal(out[[0, 2]], layer.plain(x)[[0, 2]])
    torch.testing.assert_close(out[1], layer.out(layer.v(x[1])))
    assert [place.rows for place, _, _ in recorder.seen] == [(Row(UNCOND, 0),)]
    assert [place.rows for place in identity.places] == [(Row(PERTURBED, 0),)]


def test_identity_attention_computes_values_only():
    layer = Layer()
    layer.walked(AttentionWalk(AttentionPatches([Identity()], []), call_with([PERTURBED])), tokens("."))
    assert layer.projected == ["v"]


def test_projections_are_made_once():
    made = []
    projections = Projections(lambda: made.append("q") or torch.zeros(1), None, None)
    assert projections.q is projections.q and made == ["q"]


@pytest.mark.parametrize(
    ("walk", "layer", "served"),
    [
        (([Identity()], []), MIDDLE_0, True),
        (([Identity()], []), MIDDLE_1, False),
        (([Identity(active=False)], []), MIDDLE_0, False),
        (([], [Recorder()]), MIDDLE_0, True),
        (([], [Recorder()]), UP, False),
        (([Identity(layers=[UP])], [Recorder()]), UP, True),
        (([], []), MIDDLE_0, False),
    ],
)
def test_it_serves_the_layers_that_somebody_needs(walk, layer, served):
    assert AttentionWalk(AttentionPatches(*walk), call_with([COND])).serves(layer) == served


def test_rows_that_nobody_told_of_stay_plain():
    layer, x, recorder = Layer(), tokens("..."), Recorder()
    out = layer.walked(AttentionWalk(AttentionPatches([Identity()], [recorder]), call_with([])), x)
    assert torch.equal(out, layer.plain(x)) and not recorder.seen


def test_an_idle_patch_leaves_its_rows_plain():
    layer, x = Layer(), tokens("..")
    walk = AttentionWalk(AttentionPatches([Identity(active=False)], []), call_with([COND, PERTURBED]))
    assert torch.equal(layer.walked(walk, x), layer.plain(x))


@given(heads=st.sampled_from([1, 2, 4]), n=st.integers(1, 9), m=st.integers(1, 9))
def test_attend_is_the_textbook_attention(heads, n, m):
    q, k, v = (torch.randn(2, count, 8, generator=torch.Generator().manual_seed(count)) for count in (n, m, m + 1))
    v = v[:, :m]
    want = []
    for head in range(heads):
        part = slice(head * 8 // heads, (head + 1) * 8 // heads)
        weights = F.softmax(q[..., part] @ k[..., part].mT / (8 // heads) ** 0.5, dim=-1)
        want.append(weights @ v[..., part])
    torch.testing.assert_close(attend(q, k, v, heads), torch.cat(want, dim=-1), rtol=1e-5, atol=1e-5)
