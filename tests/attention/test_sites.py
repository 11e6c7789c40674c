"""The self-attention site on both kinds of host, on one miniature network: same results, and nothing where idle."""

import pytest
import torch

from lib_hires.attention import attend
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.hosts.patcher_unet import PatchedUnet
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan
from lib_hires.run import COND, FIRST_PASS, PERTURBED, Call, ModelFacts, Row, Run
from lib_hires.sites import RecordedAttention, SelfAttention
from lib_hires.technique import Patch
from lib_hires.topology import MIDDLE, AttentionLayer, unet_topology
from tests.attention.stand_ins import Perturbing
from tests.doubles import FakePatcher, LdmMiniUNet, PatcherMiniUNet

LDM, PATCHER = LdmMiniUNet(attention=True).eval(), PatcherMiniUNet(attention=True).eval()
TOPOLOGY = unet_topology(LDM)
RUN = Run(
    "test", FIRST_PASS, ModelFacts("SD 1.x", (8, 8), NoiseSchedule.scaled_linear(), TOPOLOGY), (24, 16), (14.6, 0)
)
SIGMA = 5.0


class Changing(Patch, SelfAttention):
    """Every second token as key, values turned round, and the result halved."""

    def __init__(self, level=None, may=True):
        super().__init__()
        self._level, self._may = level, may
        self.seen = []

    def may_act(self, layer, call):
        return self._may

    def acts_at(self, place):
        return self._level is None or TOPOLOGY.halvings_at(place.layer.side, place.layer.block) == self._level

    def sources(self, key_source, value_source, place):
        return key_source[:, ::2], value_source[:, ::2].flip(1)

    def attend(self, q, k, v, place, inner):
        self.seen.append((place, tuple(q.shape), tuple(k.shape)))
        return inner(q, k, v) / 2


class Halves(Patch, SelfAttention):
    """Two windows, folded into the rows."""

    def acts_at(self, place):
        return True

    def attend(self, q, k, v, place, inner):
        return torch.cat([inner(half, k, v) for half in q.chunk(2, dim=1)], dim=1)


class Recording(Patch, RecordedAttention):
    def __init__(self):
        super().__init__()
        self.tokens = []

    def records(self, call):
        return True

    def records_in(self, layer):
        return layer.side == MIDDLE

    def record(self, projections, place):
        self.tokens.append((projections.q.shape[1], projections.k.shape[1]))


def latents(batch=2, seed=0):
    return torch.randn(batch, 4, 24, 16, generator=torch.Generator().manual_seed(seed))


def plan_of(*patches):
    return Plan(RUN, patches={str(number): patch for number, patch in enumerate(patches)})


@torch.no_grad()
def on_ldm(x, *patches, rows=COND):
    kinds = (rows,) * len(x) if isinstance(rows, str) else rows
    call = Call(SIGMA, 0, rows=tuple(Row(kind) for kind in kinds))
    with HookedUnet(LDM, plan_of(*patches)).open(call):
        return LDM(x)


@torch.no_grad()
def on_patcher(x, *patches, patcher=None):
    patched = a_patched_unet(*patches, patcher=patcher)
    with patched.open(Call(SIGMA, 0)):
        return patched.patcher.evaluate(x)


def a_patched_unet(*patches, patcher=None):
    patcher = patcher or FakePatcher(PATCHER)
    return PatchedUnet(patcher, plan_of(*patches), host_attention=attend, fits=lambda model, shape, device: True)


@pytest.mark.parametrize("patches", [[Changing()], [Changing(level=1)], [Halves()], [Changing(), Halves()]])
def test_both_hosts_compute_the_same(patches):
    x = latents()
    ldm, patcher = on_ldm(x, *patches), on_patcher(x, *patches)
    torch.testing.assert_close(ldm, patcher, rtol=1e-5, atol=1e-5)
    if isinstance(patches[0], Changing):
        assert not torch.allclose(ldm, LDM(x), atol=1e-4)


@pytest.mark.parametrize("on_host", [on_ldm, on_patcher])
def test_a_patch_meets_the_true_size_and_reduced_keys_at_every_layer(on_host):
    patch = Changing()
    on_host(latents(), patch)
    assert len(patch.seen) == len(TOPOLOGY.attention)
    for place, q, k in patch.seen:
        height, width = place.size
        assert (height, width) == (
            24 >> TOPOLOGY.halvings_at(place.layer.side, place.layer.block),
            16 >> TOPOLOGY.halvings_at(place.layer.side, place.layer.block),
        )
        assert q[1] == height * width and k[1] == -(-q[1] // 2) and place.heads == 2


@pytest.mark.parametrize("idle", [Changing(level=9), Changing(may=False)])
def test_where_nobody_acts_the_hosts_own_attention_runs_bit_for_bit(idle):
    x = latents()
    assert torch.equal(on_ldm(x, idle), LDM(x)) and torch.equal(on_patcher(x, idle), FakePatcher(PATCHER).evaluate(x))
    assert not idle.seen


def test_a_layer_in_which_nobody_may_act_is_not_touched():
    hooked = HookedUnet(LDM, plan_of(Changing(may=False)))
    with hooked.open(Call(SIGMA, 0)):
        assert all("forward" not in vars(module) for module in LDM.modules())
        assert all(not module._forward_hooks for module in LDM.modules())


def test_levels_follow_the_skips():
    at = {layer: TOPOLOGY.halvings_at(layer.side, layer.block) for layer in TOPOLOGY.attention}
    assert [at[AttentionLayer("input", i, 0)] for i in (1, 2, 4, 5, 7, 8)] == [0, 0, 1, 1, 2, 2]
    assert at[AttentionLayer("middle", 0, 0)] == 3
    assert [at[AttentionLayer("output", i, 0)] for i in (3, 5, 6, 8, 9, 11)] == [2, 2, 1, 1, 0, 0]


@torch.no_grad()
def test_perturbed_rows_are_plain_in_their_layer_and_do_not_change_the_others():
    x, changing = latents(1), [Changing(), Perturbing()]
    both = on_ldm(x.repeat(2, 1, 1, 1), *changing, rows=(COND, PERTURBED))
    torch.testing.assert_close(both[:1], on_ldm(x, *changing), rtol=1e-5, atol=1e-5)
    patched = a_patched_unet(*changing)
    with patched.open(Call(SIGMA, 0)):
        patched.cell.open.rows.single_cond = True
        cond = patched.patcher.evaluate(x)
        perturbed = patched.cell.open.rows.perturbed
    torch.testing.assert_close(cond, both[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(perturbed, both[1:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(cond, perturbed, atol=1e-5)


@pytest.mark.parametrize("on_host", [on_ldm, on_patcher])
def test_a_recorded_layer_is_plain(on_host):
    changing, recording = Changing(), Recording()
    on_host(latents(), changing, recording)
    assert recording.tokens == [(6, 6)]
    assert MIDDLE not in {place.layer.side for place, _, _ in changing.seen}


def test_another_extensions_attention_ends_the_chain_for_whole_maps_only():
    calls = []

    def theirs(q, k, v, extra):
        calls.append(q.shape[1])
        return attend(q, k, v, extra["n_heads"]) * 3

    base = FakePatcher(PATCHER)
    base.set_model_attn1_replace(theirs, "input", 1)
    alone = base.evaluate(latents())
    with_changing = on_patcher(latents(), Changing(), patcher=base)
    assert calls == [24 * 16] * 2
    assert not torch.allclose(with_changing, alone) and not torch.allclose(
        with_changing, on_patcher(latents(), Changing())
    )
    on_patcher(latents(), Halves(), patcher=base)
    assert len(calls) == 2, "a window is no map: its rows and options would not fit their function"


def test_a_closed_patcher_does_nothing():
    patched = a_patched_unet(Changing())
    assert torch.equal(patched.patcher.evaluate(latents()), FakePatcher(PATCHER).evaluate(latents()))
