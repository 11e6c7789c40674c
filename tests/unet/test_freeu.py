"""FreeU: recorded results of the reference, the FFT that it stands for, and the blocks of every family."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.plan import Plan
from lib_hires.run import Call
from lib_hires.sites import FeatureMaps
from lib_hires.technique import Patch, Refusal, Rest
from lib_hires.techniques.unet.freeu import (
    TECHNIQUE,
    V1,
    V2,
    FreeUSettings,
    begin,
    filter_skip,
    scale_backbone,
    stages,
    strength,
)
from lib_hires.topology import UNetTopology
from tests.bench.test_real_unets import evaluate
from tests.unet.networks import EARLY, FAMILIES, LATE, WIDTH, a_run, network, planned, topology, without_unet

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "freeu.npz")
CASES = json.loads(str(GOLDEN["meta"]))["cases"]
OFF = FreeUSettings(b1=1.0, b2=1.0, s1=1.0, s2=1.0)


def golden(case, name):
    return GOLDEN[f"case_{case['case']}_{name}"]


def maps(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_agrees_with_the_reference(case):
    (b, s), version = case["parameters"]["scale_used"], V2 if case["parameters"]["version"] == "FreeU_V2" else V1
    h = scale_backbone(torch.from_numpy(golden(case, "in_h")), b, version)
    skip = filter_skip(torch.from_numpy(golden(case, "in_skip")), s)
    for got, name in ((h, "out"), (skip, "out_skip")):
        want = golden(case, name)
        bound = case["tolerance"]["atol"] + case["tolerance"]["rtol_of_max"] * abs(want.astype(np.float64)).max()
        assert got.numpy().dtype == want.dtype
        assert abs(got.double().numpy() - want).max() <= bound


def filtered_by_fft(x, s):
    """The definition: four bins around the centre of the spectrum, and the real part of what comes back."""
    height, width = x.shape[-2:]
    spectrum = np.fft.fftshift(np.fft.fft2(x), axes=(-2, -1))
    middle = [slice(max(n // 2 - 1, 0), n // 2 + 1) for n in (height, width)]
    spectrum[..., middle[0], middle[1]] *= s
    return np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1))).real


SIDES = st.integers(1, 48) | st.sampled_from([65, 97, 101, 128])


@given(height=SIDES, width=SIDES, s=st.floats(0, 3), seed=st.integers(0, 9))
def test_the_closed_form_is_the_fft_filter_at_any_size(height, width, s, seed):
    x = maps(2, 3, height, width, seed=seed)
    np.testing.assert_allclose(filter_skip(x, s).numpy(), filtered_by_fft(x.double().numpy(), s), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 7), (7, 1), (3, 2)])
def test_the_closed_form_at_the_sizes_where_bins_coincide(height, width):
    x = maps(1, 2, height, width)
    np.testing.assert_allclose(filter_skip(x, 0.3).numpy(), filtered_by_fft(x.double().numpy(), 0.3), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_only_at_the_end(dtype):
    x = maps(2, 8, 33, 20, dtype=dtype)
    assert torch.equal(filter_skip(x, 0.2), filter_skip(x.float(), 0.2).to(dtype))
    large = torch.full((1, 4, 64, 64), 6e4, dtype=dtype)
    assert filter_skip(large, 0.2).isfinite().all(), "the sum over the map is beyond half precision"


def test_autocast_does_not_reach_the_filter():
    x = maps(1, 8, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = filter_skip(x, 0.2)
    assert inside.dtype == torch.float32 and torch.equal(inside, filter_skip(x, 0.2))


def test_maps_that_are_not_contiguous():
    both = maps(2, 12, 9, 14)
    skip = both[:, 5:]
    torch.testing.assert_close(filter_skip(skip, 0.2), filter_skip(skip.contiguous(), 0.2))
    assert torch.equal(both, maps(2, 12, 9, 14)), "changed in place"


@pytest.mark.parametrize("version", [V1, V2])
@given(height=st.integers(1, 20), width=st.integers(1, 20), b=st.floats(0, 10))
def test_a_sample_does_not_depend_on_its_batch_mates(version, height, width, b):
    h = maps(3, 8, height, width) * torch.tensor([1.0, 50.0, 0.01]).view(3, 1, 1, 1)
    for part in range(3):
        alone = scale_backbone(h[part : part + 1], b, version)
        torch.testing.assert_close(scale_backbone(h, b, version)[part : part + 1], alone)
        filtered = filter_skip(h[part : part + 1], 0.2)
        torch.testing.assert_close(filter_skip(h, 0.2)[part : part + 1], filtered, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.3, -7.0, 3e4])
def test_v2_leaves_a_constant_map_as_it_is(value, dtype):
    h = torch.full((2, 6, 5, 7), value, dtype=dtype)
    assert torch.equal(scale_backbone(h, 1.6, V2), h)


def test_v2_does_not_amplify_rounding():
    """One cell differs from the others in the last bits."""
    h = torch.full((1, 64, 8, 8), 1.0)
    h[0, :, 3, 3] += 1e-6
    torch.testing.assert_close(scale_backbone(h, 10.0, V2), h, rtol=1e-5, atol=0)


def test_v2_amplifies_by_b_where_the_map_is_strongest_and_not_at_all_where_it_is_weakest():
    h = torch.rand(1, 10, 6, 6, generator=torch.Generator().manual_seed(3)) + 0.1
    mean = h.mean(dim=1).flatten()
    ratio = (scale_backbone(h, 1.6, V2) / h)[0, 0].flatten()
    assert ratio[mean.argmax()] == pytest.approx(1.6) and ratio[mean.argmin()] == pytest.approx(1.0)


@pytest.mark.parametrize("version", [V1, V2])
def test_only_the_first_half_of_the_channels_is_scaled_and_nothing_in_place(version):
    h = maps(1, 10, 6, 6)
    out = scale_backbone(h, 1.5, version)
    assert torch.equal(h, maps(1, 10, 6, 6))
    assert torch.equal(out[:, 5:], h[:, 5:]) and not torch.equal(out[:, :5], h[:, :5])


def test_one_returns_the_very_tensors():
    h = maps(1, 4, 5, 5)
    assert filter_skip(h, 1.0) is h and scale_backbone(h, 1.0, V2) is h


class Meeting(Patch, FeatureMaps):
    """Notes the width of the map that arrives at each output block."""

    def __init__(self):
        super().__init__()
        self.widths = {}

    def join(self, h, skip, index, call):
        self.widths[index] = h.shape[1]
        return h, skip


PUBLISHED_STAGES = {  # reference: SD 0-6 and 7-9 of 0-11, SDXL 0-3 and 4-6 of 0-8
    "SD 1.x": dict.fromkeys(range(7), 1) | dict.fromkeys(range(7, 10), 2),
    "SD 2.x": dict.fromkeys(range(7), 1) | dict.fromkeys(range(7, 10), 2),
    "SDXL": dict.fromkeys(range(4), 1) | dict.fromkeys(range(4, 7), 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_the_family_is_told_its_stage(family):
    assert topology(family).model_channels == WIDTH
    assert stages(topology(family)) == PUBLISHED_STAGES[family]
    meeting = Meeting()
    with HookedUnet(network(family), Plan(a_run(family), {"meeting": meeting})).open(Call(EARLY, 0)):
        evaluate(family, network(family), maps(1, 4, 16, 24))
    by_width = {4 * WIDTH: 1, 2 * WIDTH: 2}
    assert {i: by_width[w] for i, w in meeting.widths.items() if w in by_width} == PUBLISHED_STAGES[family]
    assert tuple(meeting.widths[i] for i in sorted(meeting.widths)) == topology(family).backbone_channels


def test_where_the_widths_do_not_tell_stages_apart_the_levels_do():
    """The bench's network has 1, 1, 1, 2 times its width."""
    assert stages(topology("bench")) == dict.fromkeys(range(3), 1) | dict.fromkeys(range(3, 6), 2)
    unknown = UNetTopology(9, 9, (3, 6))
    assert stages(unknown) == dict.fromkeys(range(3), 1) | dict.fromkeys(range(3, 6), 2)
    assert set(stages(UNetTopology(3, 3, ())).values()) == {1}


@pytest.mark.parametrize("family", [*FAMILIES, "bench"])
def test_on_a_real_network_each_value_acts_and_neutral_is_identity(family):
    x = maps(1, 4, 16, 24)
    plain = evaluate(family, network(family), x)

    def sample(settings, sigma=EARLY):
        plan = planned(TECHNIQUE, settings, a_run(family))
        with HookedUnet(network(family), plan).open(Call(sigma, 0)):
            return evaluate(family, network(family), x), plan.patches["freeu"].fired

    results = [plain]
    for name, value in {"b1": 1.4, "b2": 1.4, "s1": 0.2, "s2": 0.2, "version": V1}.items():
        base = {"b1": 1.2} if name == "version" else {"b1": 1.0, "b2": 1.0, "s1": 1.0, "s2": 1.0}
        out, fired = sample(FreeUSettings(**base | {name: value}))
        assert fired and out.isfinite().all()
        assert not any(torch.equal(out, other) for other in results), name
        results.append(out)
    late, fired = sample(FreeUSettings(end=0.5), LATE)
    assert torch.equal(late, plain) and not fired
    assert torch.equal(evaluate(family, network(family), x), plain)


@pytest.mark.parametrize(
    ("settings", "elapsed", "want"),
    [
        (FreeUSettings(), 0.0, 1),
        (FreeUSettings(start=0.2, end=0.8), 0.2, 1),
        (FreeUSettings(fade=0.1), 0.0, 1),
        (FreeUSettings(fade=0.1), 1.0, 1),
        (FreeUSettings(start=0.2, end=0.8, fade=0.1), 0.2, 0),
        (FreeUSettings(start=0.2, end=0.8, fade=0.1), 0.25, 0.5),
        (FreeUSettings(start=0.2, end=0.8, fade=0.1), 0.5, 1),
        (FreeUSettings(start=0.2, end=0.8, fade=0.1), 0.775, 0.25),
        (FreeUSettings(end=0.5, fade=0.5), 0.375, 0.5),
        (FreeUSettings(start=0.4, end=0.6, fade=0.5), 0.5, 1),
    ],
)
def test_the_strength_fades_inside_the_window(settings, elapsed, want):
    assert strength(settings, elapsed) == pytest.approx(want)


@given(start=st.floats(0, 0.6), length=st.floats(0.05, 0.4), fade=st.floats(0, 0.5), step=st.integers(0, 99))
def test_the_patch_follows_the_fade_without_a_jump(start, length, fade, step):
    settings, run = FreeUSettings(version=V1, b1=2.0, s1=1.0, start=start, end=start + length, fade=fade), a_run()
    elapsed = start + length * (step + 0.5) / 100
    h = torch.ones(1, 4, 3, 3)
    scaled, _ = begin(settings, run).join(h, h, 0, Call(run.sigma_at(elapsed), step))
    assert scaled[0, 0, 0, 0].item() == pytest.approx(1 + strength(settings, elapsed), abs=1e-3)
    for outside in (start - 0.02, start + length + 0.02):
        if 0 < outside < 1:
            assert begin(settings, run).join(h, h, 0, Call(run.sigma_at(outside), 0)) == (h, h)


def test_it_does_not_act_and_says_why():
    with pytest.raises(Rest, match="changes nothing"):
        begin(OFF, a_run())
    with pytest.raises(Refusal, match=r"not a UNet.*switch it off"):
        begin(FreeUSettings(), without_unet())
    assert "raise End" in FreeUSettings(start=0.5, end=0.5).problem()


def test_the_log_line_names_values_blocks_and_noise_levels():
    text = begin(FreeUSettings(end=0.5), a_run()).describe()
    assert "V2" in text and "b 1.3, s 0.9 in output blocks 0 to 6" in text
    assert "b 1.4, s 0.2 in output blocks 7 to 9" in text and f"sigma 14.61 to {a_run().sigma_at(0.5):.4g}" in text
