"""Random offsets of windows and tiles go by each picture's own seed: each picture of a batch is as made alone."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.attention import attend
from lib_hires.attention_walk import AttentionPatches, AttentionWalk, HostLayer
from lib_hires.generation import Generation
from lib_hires.hosts import a1111
from lib_hires.hosts.bench.pipeline import Request
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.hosts.patcher_unet import PatchedUnet
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan
from lib_hires.run import COND, FIRST_PASS, PERTURBED, UNCOND, Call, ModelFacts, Row, Run
from lib_hires.sites import Place, SelfAttention
from lib_hires.technique import Patch
from lib_hires.techniques.attention import near_sighted_attention, near_sighted_tile, scale_fusion
from lib_hires.techniques.attention.scale_fusion import FAST, FUSION, NEIGHBOURHOOD
from lib_hires.topology import INPUT, MIDDLE, AttentionLayer, unet_topology
from tests.attention.oracle import a_place, a_run
from tests.attention.stand_ins import Perturbing
from tests.bench.conftest import bench  # noqa: F401
from tests.doubles import FakePatcher, LdmMiniUNet, PatcherMiniUNet
from tests.hosts import test_a1111_guidance as a1111_double
from tests.hosts import test_patcher_guidance as patcher_double
from tests.hosts.toy import host_attention

SEEDS = (3, 6, 7)
SIZE = (19, 13)  # leaves tiles of 7 room along both axes
SIGMA = 2.0
SMALL_TILES = {"base_tile_size": 8, "peak_tile_size": 8, "only_where_faster": False, "tiling_max_depth": 3}
TECHNIQUES = {
    "tile": (near_sighted_tile, near_sighted_tile.NearSightedTileSettings(**SMALL_TILES)),
    "attention": (near_sighted_attention, near_sighted_attention.NearSightedAttentionSettings(**SMALL_TILES)),
    "fusion": (scale_fusion, scale_fusion.ScaleFusionSettings(mode=FUSION, only_above_native=False)),
    "fast fusion": (scale_fusion, scale_fusion.ScaleFusionSettings(mode=FAST, only_above_native=False)),
    "neighbourhood": (scale_fusion, scale_fusion.ScaleFusionSettings(mode=NEIGHBOURHOOD, only_above_native=False)),
}
each_technique = pytest.mark.parametrize("name", TECHNIQUES)


def plan_of(name, unet, seeds, *more):
    facts = ModelFacts("SD 1.x", (8, 8), NoiseSchedule.scaled_linear(), unet_topology(unet))
    run = Run("test", FIRST_PASS, facts, SIZE, (14.6, 1.0, 0.0), seeds)
    module, settings = TECHNIQUES[name]
    patches = {name: module.begin(settings, run)}
    return Plan(run, patches | {str(number): patch for number, patch in enumerate(more)})


def drawn(double, **kwargs):
    """The inputs of a stand-in host, with latents that are large enough for windows."""
    inputs, g = double.draw(pictures=len(SEEDS), **kwargs), torch.Generator().manual_seed(1)
    inputs.x = torch.randn(len(SEEDS), 4, *SIZE, generator=g) * 8
    inputs.image = torch.zeros_like(inputs.x)
    return inputs


def assert_each_as_alone(made, inputs, one_of):
    """`made(inputs, seeds)` of the batch against that of each picture, which depends on its seed."""
    together = made(inputs, SEEDS)
    alone = [made(one_of(inputs, picture), SEEDS[picture : picture + 1]) for picture in range(len(SEEDS))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    others = [made(one_of(inputs, 0), (seed,)) for seed in SEEDS[1:]]
    distances = [float((other - alone[0]).abs().max()) for other in others]
    assert min(distances) > 2e-4, "these seeds prove nothing"


@pytest.fixture
def host_modules(monkeypatch):
    package, shared, folder = (ModuleType(name) for name in ("modules", "modules.shared", "modules.hypernetworks"))
    folder.hypernetwork = SimpleNamespace(apply_hypernetworks=lambda loaded, tokens: (tokens, tokens))
    package.shared, shared.loaded_hypernetworks = shared, []
    for module in (package, shared, folder):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def made_on_a1111(name, inputs, seeds, **kwargs):
    unet, denoiser = a1111_double.UNET, a1111_double.Denoiser(inputs.weights, **kwargs)
    sd_model = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet))
    open_call = a1111.ADAPTER.installation(sd_model, plan_of(name, unet, seeds))
    opened = []

    def callback(params):
        opened.append(open_call(Call(SIGMA, 0), params))
        opened[-1].__enter__()

    denoiser.callback = callback
    out = denoiser(inputs.x, inputs.text, inputs.negative, inputs.image, 2.0)
    opened[0].__exit__(None, None, None)
    assert not unet._forward_pre_hooks
    return out


@each_technique
@pytest.mark.parametrize("composed", [False, True], ids=["one prompt", "AND"])
@pytest.mark.parametrize("batch_all", [True, False], ids=["all rows at once", "some rows at once"])
@pytest.mark.usefixtures("host_modules")
def test_a1111(name, composed, batch_all):
    made = lambda inputs, seeds: made_on_a1111(name, inputs, seeds, batch_all=batch_all)
    assert_each_as_alone(made, drawn(a1111_double, composed=composed), a1111_double.one_of)


@pytest.mark.usefixtures("host_modules")
def test_a1111_without_uncond():
    made = lambda inputs, seeds: made_on_a1111("fusion", inputs, seeds, skip_uncond=True)
    assert_each_as_alone(made, drawn(a1111_double, composed=False), a1111_double.one_of)


def made_on_a_patcher(name, inputs, seeds, one_by_one):
    plan = plan_of(name, patcher_double.UNET, seeds)
    patched = PatchedUnet(patcher_double.Patcher(patcher_double.UNET), plan, host_attention, lambda *_: True)
    with patched.open(Call(SIGMA, 0)):
        return patcher_double.Host(one_by_one).sample(patched.patcher, inputs.x, inputs.cond, inputs.uncond, 2.0)


@each_technique
@pytest.mark.parametrize("composed", [1, 2], ids=["one prompt", "AND"])
@pytest.mark.parametrize("one_by_one", [True, False], ids=["a chunk at once", "all chunks at once"])
def test_a_patcher(name, composed, one_by_one):
    made = lambda inputs, seeds: made_on_a_patcher(name, inputs, seeds, one_by_one)
    assert_each_as_alone(made, drawn(patcher_double, composed=composed), patcher_double.one_of)


UNETS = LdmMiniUNet(attention=True).eval(), PatcherMiniUNet(attention=True).eval()


@each_technique
@torch.no_grad()
def test_perturbed_rows_beside_them_on_every_level(name):
    x, kinds = drawn(a1111_double, composed=False).x, (COND, PERTURBED)

    def on_ldm(x, seeds):
        rows = tuple(Row(kind, picture) for kind in kinds for picture in range(len(x)))
        with HookedUnet(UNETS[0], plan_of(name, UNETS[0], seeds, Perturbing())).open(Call(SIGMA, 0, rows=rows)):
            return UNETS[0](torch.cat([x, x])).unflatten(0, (2, -1)).transpose(0, 1)

    def on_patcher(x, seeds):
        plan = plan_of(name, UNETS[1], seeds, Perturbing())
        patched = PatchedUnet(FakePatcher(UNETS[1]), plan, attend, lambda *_: True)
        with patched.open(Call(SIGMA, 0)):
            patched.cell.open.rows.single_cond = True
            cond = patched.patcher.evaluate(x)
            return torch.stack([cond, patched.cell.open.rows.perturbed], dim=1)

    for made in (on_ldm, on_patcher):
        together = made(x, SEEDS)
        alone = [made(x[picture : picture + 1], SEEDS[picture : picture + 1]) for picture in range(len(SEEDS))]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_another_extensions_attention_learns_which_chunks_its_rows_are_of():
    inputs, base, seen = drawn(patcher_double, composed=2), patcher_double.Patcher(patcher_double.UNET), []

    def theirs(q, k, v, extra):
        seen.append((len(q), extra["cond_or_uncond"], extra["cond_mark"].tolist()))
        return host_attention(q, k, v, extra["n_heads"])

    base.set_model_attn1_replace(theirs, "middle", 0)
    patched = PatchedUnet(base, plan_of("fusion", patcher_double.UNET, SEEDS), host_attention, lambda *_: True)
    with patched.open(Call(SIGMA, 0)):
        patcher_double.Host().sample(patched.patcher, inputs.x, inputs.cond, inputs.uncond, 2.0)
    assert seen == [(3, [1, 0, 0], [1.0, 0.0, 0.0])] * len(SEEDS)


@each_technique
def test_the_bench(bench, name):  # noqa: F811
    module, settings = TECHNIQUES[name]
    if module is scale_fusion:  # windows as small as elsewhere here, so that some lie between borders
        settings = replace(settings, window_size=0.5)

    def made(pictures):
        prompts = ("a red ring", "a blue disc", "a green ring")[pictures]
        request = Request(prompts, SEEDS[pictures], width=104, height=152, steps=2)
        generation = Generation({module.TECHNIQUE.name: settings})
        latents = bench.generate(request, generation).latents
        assert generation.acted
        return latents

    alone = [made(slice(picture, picture + 1)) for picture in range(len(SEEDS))]
    torch.testing.assert_close(made(slice(None)), torch.cat(alone), rtol=1e-3, atol=1e-3)


class Drawing(Patch, SelfAttention):
    def __init__(self, draws=True):
        super().__init__()
        self._draws = draws

    def acts_at(self, place):
        return True

    def draws_at(self, place):
        return self._draws


LAYER = AttentionLayer(MIDDLE, 0, 0)


def served(rows, seeds, draws=True, batch=None):
    """The seeds and rows that patches are asked for, one after another, and whether sources are told to differ."""
    call, asked, batch = Call(1.0, 0, {(MIDDLE, 0): (1, 1)}, tuple(rows)), [], batch or len(rows)
    walk = AttentionWalk(AttentionPatches(changing=[Drawing(draws)], seeds=seeds), call)
    x = torch.arange(batch, dtype=torch.float32)[:, None, None]

    def changed(rows, place, acting):
        asked.append((place.seed, list(rows)))
        return x[list(rows)]

    host = HostLayer(LAYER, 1, batch, project=None, plain=None, changed=changed, finish=None)
    assert torch.equal(walk.attention(host), x), "rows keep their order"
    return asked, walk.splits(LAYER, 1, batch)


def test_rows_of_one_seed_are_served_together():
    rows = [Row(COND, 0), Row(COND, 0), Row(COND, 1), Row(UNCOND, 0), Row(UNCOND, 1)]
    assert served(rows, (3, 4)) == ([(3, [0, 1, 3]), (4, [2, 4])], True)
    assert served(rows, (3, 3)) == ([(3, [0, 1, 2, 3, 4])], False)
    assert served(rows, (3, 4), draws=False) == ([(3, [0, 1, 2, 3, 4])], False)
    assert served(rows[2:3], (3, 4)) == ([(4, [0])], False)


def test_rows_of_unknown_pictures_go_by_the_first_seed():
    rows = [Row(COND, None), Row(COND, None), Row(COND, 1), Row(COND, 2)]
    assert served(rows, (3, 4)) == ([(3, [0, 1, 3]), (4, [2])], True)
    assert served([], (3, 4), batch=2) == ([(3, [0, 1])], False)


@each_technique
def test_nothing_is_drawn_where_offsets_have_no_room_or_are_off(name):
    module, settings = TECHNIQUES[name]
    run = plan_of(name, UNETS[0], SEEDS).run
    place = lambda size: Place(AttentionLayer(INPUT, 1, 0), size, 1, Call(SIGMA, 0))
    assert module.begin(settings, run).draws_at(place(SIZE))
    off = {"jitter": False} if module is scale_fusion else {"shift_tiles": False}
    assert not module.begin(replace(settings, **off), run).draws_at(place(SIZE))
    cramped = (8, 8) if module is scale_fusion else (16, 24)
    assert not module.begin(settings, run).draws_at(place(cramped))


@given(
    size=st.tuples(st.integers(8, 30), st.integers(8, 30)),
    mode=st.sampled_from([FUSION, NEIGHBOURHOOD]),
    native=st.sampled_from([8, 9, 16]),
)
def test_scale_fusion_draws_where_some_seed_moves_a_window(size, mode, native):
    run = a_run(size, native=(native, native))
    patch = scale_fusion.begin(scale_fusion.ScaleFusionSettings(mode=mode, only_above_native=False), run)
    places = [a_place(size, seed=seed) for seed in range(8)]
    keys = [patch._windows(place, torch.device("cpu")).keys for place in places]
    assert patch.draws_at(places[0]) == any(not torch.equal(keys[0], other) for other in keys[1:])
