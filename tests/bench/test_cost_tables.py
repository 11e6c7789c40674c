"""What the cost tables count, against numbers counted by hand; and their arguments."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib_hires.hosts.bench import compare_rows, speed
from lib_hires.hosts.bench.evaluation import META, SD15, Evaluation, Network, operations, peak_bytes
from lib_hires.registry import BY_NAME
from lib_hires.techniques.attention.near_sighted_tile import NearSightedTileSettings

SMALL = Network(64, 2, (8, 8))


class Layer:
    """Anything that is evaluated on the meta device."""

    def __init__(self, compute, *held):
        self.compute, self._held = compute, list(held)

    @torch.inference_mode()
    def __call__(self, patched=None):
        return self.compute()

    def held(self):
        return self._held


def tokens(count, channels=40, heads=8, batch=2):
    return torch.empty(batch, heads, count, channels, device=META)


def test_attention_counts_as_its_two_products():
    q, k = tokens(16384), tokens(4096)
    counted = operations(Layer(lambda: F.scaled_dot_product_attention(q, k, k)))
    assert counted == 2 * (2 * 2 * 8 * 16384 * 4096 * 40)  # two products, multiply and add, batch, heads, N, M, d


def test_sd15_counts_as_the_published_tables_say():
    # 0.803 and 4.674 TFLOP for one picture without CFG; here there are cond and uncond
    for side, tera in ((64, 0.803), (128, 4.674)):
        assert operations(Evaluation(SD15, side, META)) / 2e12 == pytest.approx(tera, abs=1e-3)


def test_fused_attention_holds_its_answer_and_no_scores():
    q = tokens(16384)
    peak = peak_bytes(Layer(lambda: F.scaled_dot_product_attention(q, q, q), q))
    assert peak == q.numel() * 4


def test_peak_memory_is_what_lives_at_once():
    linear, x = nn.Linear(8, 8, bias=False, device=META), torch.empty(100, 8, device=META)
    one = 100 * 8 * 4

    def chain():
        y = x
        for _ in range(5):
            y = linear(y)  # the input of a step and its result live together, what came before is gone
        return y

    def kept():
        return [linear(x) for _ in range(5)]

    assert peak_bytes(Layer(chain, linear.weight, x)) == 2 * one
    assert peak_bytes(Layer(kept, linear.weight, x)) == 5 * one
    assert peak_bytes(Layer(lambda: x.view(8, 100), x)) == 0, "a view of what was there"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_evaluation_that_is_only_counted_has_the_shape_of_a_real_one(dtype):
    out = Evaluation(SMALL, 16, META, dtype)()
    assert (out.shape, out.dtype) == ((2, 4, 16, 16), dtype)


def test_the_case_tables_name_real_settings_and_act_or_step_aside():
    evaluation = Evaluation(speed.SD15_AT_02, 128, META)
    for case in speed.ATTENTION_CASES:
        assert evaluation.plan(case.technique, case.settings)[0].patches, case.title
    native = Evaluation(speed.SD15_AT_02, 64, META)
    for case in speed.NATIVE_CASES:
        assert not native.plan(case.technique, case.settings)[0].patches, case.title


def test_the_bound_of_a_technique_comes_from_what_it_leaves_out():
    even = {"time_decay": 0.0, "in_depth_decay": 0.0, "out_depth_decay": 0.0}
    cases = [speed.Case("", "slothful", even | {"in_slothful": r, "out_slothful": r}) for r in (1.0, 2.0, 4.0)]
    off, half, quarter, fused = speed.bounds(SMALL, 16, [*cases, speed.Case("", "scale_fusion")])
    assert off == 1 < half < quarter
    assert fused < 1, "windows and the whole map"


def test_reached_is_the_share_of_the_saving():
    assert speed.reached(2.0, 2.0) == pytest.approx(1)
    assert speed.reached(4 / 3, 2.0) == pytest.approx(0.5)
    assert speed.reached(1.0, 1.5) == 0
    assert speed.reached(0.7, 0.8) is None and speed.reached(1.0, 1.0) is None


def test_the_fourier_form_is_the_filter_that_ours_replaces():
    skip = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    for form in (speed.published_filter, speed.lean_filter):
        torch.testing.assert_close(form(skip, 0.2), speed.filter_skip(skip, 0.2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arguments", [["--part", "nonsense"], ["--repeats", "0"]])
def test_bad_arguments_of_the_cost_tables_are_named(arguments, capsys):
    with pytest.raises(SystemExit):
        speed.parse(arguments)
    assert arguments[1] in capsys.readouterr().err


def test_a_row_changes_a_preset_and_nothing_else():
    generation = compare_rows.ROWS["tiles-alone"].generation()
    settings = generation.selection["near_sighted_tile"]
    assert isinstance(settings, NearSightedTileSettings)
    changed = compare_rows.ROWS["tiles-alone"].changes["near_sighted_tile"]
    preset = BY_NAME["near_sighted_tile"].presets["Native tiles, fast"]
    assert settings == replace(preset, **changed) and settings != preset


def test_every_row_of_the_unet_group_acts_at_its_size():
    for name in compare_rows.GROUPS["unet"]:
        row = compare_rows.ROWS[name]
        evaluation = Evaluation(Network(64, 2, (16, 16)), row.width // 8, META)
        for technique, settings in row.generation().selection.items():
            patches = evaluation.plan(technique, settings)[0].patches
            assert len(patches) == 1, f"{name}: {technique}"
