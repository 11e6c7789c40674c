"""Restrained dilation: recorded results of the reference, torch's own dilation, and modules that stay as they were."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.hosts.convolutions import dilated
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.hosts.patcher_unet import PatchedUnet
from lib_hires.plan import Plan
from lib_hires.run import Call
from lib_hires.technique import Refusal, Rest
from lib_hires.techniques.unet import deep_shrink
from lib_hires.techniques.unet.dilation import TECHNIQUE, DilationSettings, begin, default_layers, parse_layers
from lib_hires.topology import INPUT, convolution_modules, unet_topology
from tests.bench.test_real_unets import evaluate
from tests.doubles import FakePatcher, LdmMiniUNet, PatcherMiniUNet
from tests.unet.networks import EARLY, FAMILIES, LATE, a_run, network, planned, topology, without_unet

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "dilated_conv.npz")
CASES = json.loads(str(GOLDEN["meta"]))["cases"]
TWICE = DilationSettings(factor=2.0)


def conv(stride=1, kernel=3, padding=None, seed=0, **options):
    torch.manual_seed(seed)
    padding = kernel // 2 if padding is None else padding
    return torch.nn.Conv2d(3, 4, kernel, stride=stride, padding=padding, **options).requires_grad_(False)


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(module):
    """Everything that the instances hold, to be compared before and after."""
    return [(type(m), {k: v for k, v in vars(m).items() if not k.startswith("__")}) for m in module.modules()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_agrees_with_the_reference(case):
    x, weight, bias, want = (
        torch.from_numpy(GOLDEN[f"case_{case['case']}_{name}"]) for name in ("in_x", "in_weight", "in_bias", "out")
    )
    module = torch.nn.Conv2d(6, 5, 3, stride=case["parameters"]["stride"], padding=1).requires_grad_(False)
    module.weight.copy_(weight), module.bias.copy_(bias)
    factor = case["parameters"].get("factor", case["parameters"]["dilation"])
    bound = case["tolerance"]["atol"] + case["tolerance"]["rtol_of_max"] * want.abs().max()
    assert (dilated(module, module.forward, x, factor) - want).abs().max() <= bound


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_layers_are_the_papers(family):
    """SDXL's list is FreeScale's, in LDM names; SD's is the same rule one level deeper."""
    first = 6 if family == "SDXL" else 9
    resnets = [f"input {i} 0.{part}" for i in (first + 1, first + 2) for part in ("in_layers.2", "out_layers.3")]
    middle = [f"middle 0 {i}.{part}" for i in (0, 2) for part in ("in_layers.2", "out_layers.3")]
    patch = begin(TWICE, a_run(family))
    chosen = [f"{x.side} {x.block} {x.path}" for x in topology(family).convolutions if patch.dilates_in(x)]
    assert chosen == [f"input {first} 0.op", *resnets, *middle]
    if family == "SDXL":
        assert len(chosen) == len(CASES[0]["parameters"]["modules_dilated"])


@given(
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    factor=st.integers(2, 5),
    stride=st.sampled_from([1, 2]),
    kernel=st.sampled_from([3, 5]),
)
def test_whole_factors_are_torchs_dilation(height, width, factor, stride, kernel):
    module, x = conv(stride, kernel), maps(2, 3, height, width)
    want = F.conv2d(x, module.weight, module.bias, stride, factor * (kernel // 2), factor)
    got = dilated(module, module.forward, x, factor)
    assert torch.equal(got, want) and got.shape == module(x).shape


def test_a_dilated_convolution_by_hand():
    """Cell by cell, out of the definition: the sum over the taps of h(o + d t) k(t), and 0 beyond the border."""
    module, x, d = conv(), maps(1, 3, 5, 7), 2
    got = dilated(module, module.forward, x, d)
    for row in range(5):
        for column in range(7):
            total = module.bias.clone()
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    y, z = row + d * i, column + d * j
                    if 0 <= y < 5 and 0 <= z < 7:
                        total += module.weight[:, :, i + 1, j + 1] @ x[0, :, y, z]
            torch.testing.assert_close(got[0, :, row, column], total, rtol=1e-5, atol=1e-5)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    factor=st.floats(1.01, 8),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1]),
)
def test_any_factor_keeps_the_plain_convolutions_size(height, width, factor, stride, padding):
    if min(height, width) < 3 and padding == 0:
        return  # no plain result either
    module, x = conv(stride, padding=padding), maps(1, 3, height, width)
    got = dilated(module, module.forward, x, factor)
    assert got.shape == module(x).shape and got.isfinite().all()


def test_a_fraction_lies_between_its_neighbours():
    """On a smooth map the second difference grows with the square of the distance of the taps."""
    module = conv()
    module.weight.zero_(), module.bias.zero_()
    module.weight[:, :, 1, 1], module.weight[:, :, 1, 0], module.weight[:, :, 1, 2] = -2.0, 1.0, 1.0
    x = (torch.arange(64.0).view(1, 1, 1, 64) ** 2).expand(1, 3, 8, 64)
    for factor in (1.25, 1.5, 2.0, 2.5, 3.5):
        middle = dilated(module, module.forward, x, factor)[0, 0, 4, 24:40] / 3
        assert middle.mean().item() == pytest.approx(2 * factor**2, rel=0.15), factor


def test_tileable_pictures_stay_tileable():
    """A1111's Tiling pads in circles; torch takes that padding from another attribute."""
    module, x = conv(), maps(1, 3, 8, 12)
    module.padding_mode = "circular"
    want = F.conv2d(F.pad(x, (3, 3, 3, 3), mode="circular"), module.weight, module.bias, dilation=3)
    assert torch.equal(dilated(module, module.forward, x, 3), want)


class CastConv(torch.nn.Conv2d):
    """Stores half precision and casts for every call, as Forge's operations do."""

    def forward(self, x):
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_are_cast_as_the_host_casts_them(storage):
    torch.manual_seed(0)
    module = CastConv(3, 4, 3, padding=1).requires_grad_(False)
    module.weight.data, module.bias.data = module.weight.data.to(storage), module.bias.data.to(storage)
    x = maps(1, 3, 9, 9)
    want = F.conv2d(x, module.weight.float(), module.bias.float(), padding=2, dilation=2)
    assert torch.equal(dilated(module, module.forward, x, 2), want)
    assert module.weight.dtype == storage


def statically_dilated(unet, factor, chosen):
    """An oracle: a copy of the network whose convolutions were built that way."""
    unet = copy.deepcopy(unet)
    for layer, module in convolution_modules(unet).items():
        if chosen(layer):
            module.dilation, module.padding = (factor, factor), (factor, factor)
    return unet


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(16, 24), (32, 32)])
def test_a_real_network_computes_what_a_dilated_network_computes(family, size):
    x, patch = maps(1, 4, *size), begin(TWICE, a_run(family))
    want = evaluate(family, statically_dilated(network(family), 2, patch.dilates_in), x)
    before, plain = state(network(family)), evaluate(family, network(family), x)
    with HookedUnet(network(family), Plan(a_run(family), {"dilation": patch})).open(Call(EARLY, 0)):
        got = evaluate(family, network(family), x)
    assert torch.equal(got, want) and not torch.equal(got, plain)
    assert patch.fired == 9, "the downsampler and four ResBlocks of two"
    assert state(network(family)) == before
    assert torch.equal(evaluate(family, network(family), x), plain)


def test_one_convolution_can_be_chosen_alone():
    x, family = maps(1, 4, 16, 24), "SD 1.x"
    settings = DilationSettings(factor=3.0, layers="i2.out, o5.up")
    chosen = lambda layer: (layer.side, layer.block, layer.part) in {("input", 2, "out"), ("output", 5, "up")}
    want = evaluate(family, statically_dilated(network(family), 3, chosen), x)
    with HookedUnet(network(family), planned(TECHNIQUE, settings, a_run())).open(Call(EARLY, 0)):
        assert torch.equal(evaluate(family, network(family), x), want)


LDM, PATCHER = LdmMiniUNet().eval().requires_grad_(False), PatcherMiniUNet().eval().requires_grad_(False)


def mini_run(x):
    return a_run(latent=tuple(x.shape[-2:]), native=(8, 8), unet=unet_topology(LDM))


def on_ldm(x, plan, sigma=EARLY):
    with HookedUnet(LDM, plan).open(Call(sigma, 0)):
        return LDM(x)


def on_patcher(x, plan, sigma=EARLY):
    patched = PatchedUnet(FakePatcher(PATCHER), plan, host_attention=None, fits=lambda *_: True)
    with patched.open(Call(sigma, 0)):
        return patched.patcher.evaluate(x)


@given(
    cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    factor=st.sampled_from([0.0, 1.5, 2.0, 4.0]),
    layers=st.sampled_from(["", "m", "i2-5, o", "i9.down, i4"]),
    sigma=st.sampled_from([EARLY, 2.0, LATE]),
)
def test_both_hosts_compute_the_same(cells, factor, layers, sigma):
    x = maps(2, 4, 8 * cells[0], 8 * cells[1])
    settings = DilationSettings(factor=factor, layers=layers, only_above_native=False)
    try:
        plans = [planned(TECHNIQUE, settings, mini_run(x)) for _ in range(2)]
    except Rest:
        return
    torch.testing.assert_close(on_ldm(x, plans[0], sigma), on_patcher(x, plans[1], sigma), rtol=1e-5, atol=1e-5)
    assert plans[0].patches["dilation"].fired == plans[1].patches["dilation"].fired


@pytest.mark.parametrize("on_host", [on_ldm, on_patcher])
def test_outside_its_window_the_result_is_bit_identical_to_off(on_host):
    x = maps(1, 4, 40, 24)
    off = Plan(mini_run(x))
    plan = planned(TECHNIQUE, TWICE, mini_run(x))
    assert torch.equal(on_host(x, plan, LATE), on_host(x, off))
    assert plan.patches["dilation"].fired == 0
    assert not torch.equal(on_host(x, plan, EARLY), on_host(x, off))


@pytest.mark.parametrize(("on_host", "unet"), [(on_ldm, LDM), (on_patcher, PATCHER)])
def test_an_exception_inside_a_dilated_convolution_leaves_the_modules_untouched(on_host, unet, monkeypatch):
    x, plan = maps(1, 4, 32, 32), planned(TECHNIQUE, TWICE, mini_run(maps(1, 4, 32, 32)))
    before, seen = state(unet), []

    def fail(module, x, weight, bias):
        seen.append(module.dilation)
        if len(seen) == 12:
            raise RuntimeError("out of memory")
        return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        on_host(x, plan)
    assert seen[-1] == (2, 2), "it was to fail inside a dilated one"
    assert state(unet) == before


@pytest.mark.parametrize(("on_host", "unet"), [(on_ldm, LDM), (on_patcher, PATCHER)])
def test_without_the_technique_no_module_is_touched(on_host, unet):
    x, seen = maps(1, 4, 16, 16), []
    handle = unet.middle_block.register_forward_pre_hook(
        lambda *_: seen.append([m for m in unet.modules() if "forward" in vars(m)])
    )
    on_host(x, Plan(mini_run(x)))
    on_host(x, planned(TECHNIQUE, TWICE, mini_run(x)))
    handle.remove()
    assert seen[0] == [] and len(seen[1]) == 4, "the middle and input blocks 9 to 11"


@pytest.mark.parametrize(
    ("latent", "native", "factor"),
    [
        ((128, 128), (64, 64), 2),
        ((256, 256), (128, 128), 2),
        ((512, 512), (128, 128), 4),
        ((128, 256), (128, 128), 1.5),  # half as wide again by area
        ((192, 192), (128, 128), 1.5),
        ((97, 65), (64, 64), 1.25),
        ((131, 130), (64, 64), 2),  # not a dilation of 3 on a map of 1.5 times the size
        ((68, 72), (64, 64), 1),
    ],
)
def test_the_automatic_factor(latent, native, factor):
    run = a_run(latent=latent, native=native)
    if factor == 1:
        with pytest.raises(Rest, match="about the native"):
            begin(DilationSettings(), run)
        return
    patch = begin(DilationSettings(), run)
    assert f"factor {factor:g} in 9 convolutions" in patch.describe()
    for layer in topology("SD 1.x").convolutions:
        if patch.dilates_in(layer):
            halved = tuple(-(-n // 2**layer.level) for n in latent)
            assert patch.dilation(layer, halved, Call(EARLY, 0)) == factor, "the same at every level"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layers_level_is_the_true_one(family):
    """Asked with the sizes that the real maps have, odd ones included."""
    asked = []

    class Asking(type(begin(TWICE, a_run(family)))):
        def dilation(self, layer, size, call):
            asked.append((layer, size))
            return 1.0

    layers = topology(family).convolutions
    plan = Plan(a_run(family), {"asking": Asking(TWICE, a_run(family), layers)})
    with HookedUnet(network(family), plan).open(Call(EARLY, 0)):
        evaluate(family, network(family), maps(1, 4, 24, 40))
    assert len(asked) == len(layers)
    for layer, size in asked:
        assert size == (-(-24 // 2**layer.level), -(-40 // 2**layer.level)), layer


def test_while_deep_shrink_holds_the_map_at_native_size_there_is_nothing_to_widen():
    x, run = maps(1, 4, 32, 32), a_run(latent=(32, 32), native=(16, 16))

    def fired(sigma, **shrink):
        shrunk = deep_shrink.begin(deep_shrink.DeepShrinkSettings(end=0.3, gradual=0.6, **shrink), run)
        patch = begin(DilationSettings(), run)
        with HookedUnet(network("SD 1.x"), Plan(run, {"shrink": shrunk, "dilation": patch})).open(Call(sigma, 0)):
            evaluate("SD 1.x", network("SD 1.x"), x)
        return patch.fired

    assert fired(EARLY, factor=2.0) == 0
    assert fired(run.sigma_at(0.65), factor=2.0) == 9, "the map has grown back"


def test_a_chosen_factor_is_not_changed():
    patch = begin(TWICE, a_run())
    layer = next(layer for layer in topology("SD 1.x").convolutions if patch.dilates_in(layer))
    assert patch.dilation(layer, (3, 3), Call(EARLY, 0)) == 2


@pytest.mark.parametrize(
    ("settings", "run", "error", "words"),
    [
        (TWICE, without_unet(), Refusal, "not a UNet.*switch it off"),
        (DilationSettings(), a_run(latent=(64, 64)), Rest, "not above the native 64x64"),
        (DilationSettings(factor=1.0), a_run(), Rest, "factor 1 is off"),
        (DilationSettings(only_above_native=False), a_run(latent=(32, 32)), Rest, "factor 1 is off"),
        (DilationSettings(layers="m, i12"), a_run(), Refusal, "'i12' names no convolution of SD 1.x.*i0 to i11"),
        (DilationSettings(layers="i7.down"), a_run("SDXL"), Refusal, "i3.down, i6.down, o2.up, o5.up"),
    ],
)
def test_it_does_not_act_and_says_why(settings, run, error, words):
    with pytest.raises(error, match=words):
        begin(settings, run)


def test_values_that_are_useless_together():
    assert "below 1" in DilationSettings(factor=0.5).problem()
    assert "raise End" in DilationSettings(start=0.8).problem()
    assert DilationSettings().problem() is None


@pytest.mark.parametrize("bad", ["x3", "i3m", "m1", "i3.side", "i7-5", "i-3", "3", "i3.down.up", "i 3"])
def test_bad_layer_grammar_is_explained(bad):
    with pytest.raises(ValueError, match=r"not of the form i, m or o|runs backwards"):
        parse_layers(bad)


def test_layer_grammar_and_the_default_written_out():
    convolutions = topology("SDXL").convolutions
    written = parse_layers("i6.down, i7-8, m")
    assert parse_layers(" i6.down;i7-8  m,") == written
    default = default_layers(topology("SDXL"))
    assert [any(x in rule for rule in written) for x in convolutions] == [
        any(x in rule for rule in default) for x in convolutions
    ]
    assert {x.block for x in convolutions if x in parse_layers("i7-8.in")[0]} == {7, 8}
    assert all(x in parse_layers("i")[0] for x in convolutions if x.side == INPUT)
