"""Against recorded results of the references."""

import pytest
import torch

from lib_hires.attention import attend
from lib_hires.techniques.attention.curves import between, time_curve
from lib_hires.techniques.attention.near_sighted_attention import NearSight
from lib_hires.techniques.attention.near_sighted_tile import tiles_with_samples
from lib_hires.techniques.attention.scale_fusion import fused, overlapping_windows
from lib_hires.techniques.attention.tiles import Tiles
from lib_hires.tiling import attend_in, strided_grids, tokens_in
from lib_hires.token_blur import blur, gaussian
from lib_hires.tokens import Reduction, reduced
from tests.attention.oracle import Golden, assert_golden

SLOTHFUL, TILE = Golden("slothful_attention"), Golden("near_sighted_tile")
NEAR, FUSION = Golden("near_sighted_attention"), Golden("scale_fusion")


def inner(heads):
    return lambda q, k, v: attend(q, k, v, heads)


def elapsed(p):
    return 1 - p["timestep"] / 1000


@SLOTHFUL.cases()
def test_slothful(case):
    p, n = case["parameters"], SLOTHFUL.array(case, "in_tokens")
    first = 2 if p["treated_as_xl"] else 1
    decayed = p["slothful"] * time_curve(elapsed(p), p["peak_time"], p["time_decay"])
    rate = decayed * (first / p["depth"]) ** p["depth_decay"]
    assert rate == pytest.approx(p["effective_stride"])
    reduction = Reduction.of(p["mode"], tuple(p["map_hw"]), rate, rate)
    key, value = reduced(n, n, reduction, p["k_blend"], p["v_blend"])
    assert_golden(key, SLOTHFUL.array(case, "out_k_source"), case)
    assert_golden(value, SLOTHFUL.array(case, "out_v_source"), case)
    assert_golden(inner(p["heads"])(*SLOTHFUL.projections(case, key, value)), SLOTHFUL.array(case, "out"), case)


@TILE.cases()
def test_near_sighted_tile(case):
    p, size = case["parameters"], tuple(case["parameters"]["map_hw"])
    tiles = Tiles.of(size, p["tile_size"], None)
    assert [len(tiles.rows), len(tiles.columns)] == p["tiles_yx"]
    q, k, v = TILE.projections(case)
    plain = inner(p["heads"])
    got = attend_in(tiles_with_samples(tiles, p["global_ratio"]), q, k, v, plain) if p["tiled"] else plain(q, k, v)
    assert_golden(got, TILE.array(case, "out"), case)


@NEAR.cases()
def test_near_sighted_attention(case):
    p, size = case["parameters"], tuple(case["parameters"]["map_hw"])
    weight = time_curve(elapsed(p), p["peak_time"], p["time_decay"])
    tile = round(between(p["base_tile_size"], p["peak_tile_size"], weight))
    ratio = between(p["base_global_ratio"], p["peak_global_ratio"], weight)
    assert tile == p["tile_used"] and ratio == pytest.approx(p["global_ratio_used"])
    tiles = Tiles.of(size, tile if p["tiled"] else max(size), None)
    sight = NearSight.of(tiles, ratio, p["effective_stride"], p["mode"])
    n = NEAR.array(case, "in_tokens")
    key, value = sight.reduced(n, n, tiles.tokens(), p["k_blend"], p["v_blend"])
    assert key.shape[1] == sight.sources
    windows = sight.windows()
    for source, name in ((key, "out_k_source"), (value, "out_v_source")):
        assert_golden(source[0][windows.keys], NEAR.array(case, name), case)
    got = attend_in(windows, *NEAR.projections(case, key, value), inner(p["heads"]))
    assert_golden(got, NEAR.array(case, "out"), case)


def is_fusion(parameters):
    return "kind" not in parameters


@FUSION.cases(is_fusion)
def test_scale_fusion(case):
    """The reference fuses after the output projection; before it, the result is the same."""
    p, size = case["parameters"], tuple(case["parameters"]["map_hw"])
    projections, plain = FUSION.projections(case), inner(p["heads"])
    windows = overlapping_windows(size, tuple(p["window_hw"]))
    down, right = p["pad_hw"]
    listed = [(y - down, x - right) for y, _, x, _ in p["windows_in_padded_map_y0_y1_x0_x1"]]
    assert torch.equal(windows.queries, tokens_in(listed, tuple(p["window_hw"]), size))
    local = attend_in(windows, *projections, plain)
    stride = (p["target_hw"][0] // p["train_side"], p["target_hw"][1] // p["train_side"])
    whole = attend_in(strided_grids(size, stride), *projections, plain) if p["fast_mode"] else plain(*projections)
    weights = gaussian(p["gaussian_taps"], p["gaussian_sigma"])
    difference = blur(local - whole, size, weights, zero_borders=True)
    got = (whole + difference) @ FUSION.array(case, "in_wo").T + FUSION.array(case, "in_bo")
    assert_golden(got, FUSION.array(case, "out"), case)
    ours = fused(whole, local, size, weights, released=False)
    middle = torch.zeros(size, dtype=torch.bool)
    middle[3:-3, 3:-3] = True
    torch.testing.assert_close(ours[:, middle.flatten()], (whole + difference)[:, middle.flatten()])


@pytest.mark.parametrize("case", [c for c in FUSION.all if "kind" in c["parameters"]], ids=lambda case: case["name"])
def test_both_gaussians(case):
    p, x = case["parameters"], FUSION.array(case, "in_x")
    released = p["kind"] == "gaussian3d"
    maps = x if released else x.permute(0, 2, 3, 1)
    size = tuple(maps.shape[1:3])
    weights = gaussian(p["taps"], p["sigma"])
    got = blur(maps.flatten(1, 2), size, weights, channels=released, zero_borders=True).unflatten(1, size)
    assert_golden(got if released else got.permute(0, 3, 1, 2), FUSION.array(case, "out"), case)
