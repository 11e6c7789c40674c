"""How a hires pass is divided: sizes, values per stage, who acts in which, and where a relay hands over."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.generation import Generation
from lib_hires.noise import NoiseSchedule
from lib_hires.run import FIRST_PASS, HIRES_PASS, Call, ModelFacts, Run
from lib_hires.settings import Unusable, read_settings
from lib_hires.stage_plan import divides, plan_stages, selection_of
from lib_hires.stages import HiresPass, Stage, even_factors, scaled, sizes
from lib_hires.technique import Refusal, Rest
from lib_hires.techniques.guidance.apg import APGSettings
from lib_hires.techniques.hires import cascade, relay
from lib_hires.techniques.hires.cascade import CascadeSettings
from lib_hires.techniques.hires.relay import RelaySettings
from lib_hires.techniques.unet.deep_shrink import DeepShrinkSettings

SD = NoiseSchedule.scaled_linear()
sides = st.integers(8, 256).map(lambda cells: cells * 8)


def first_pass(sigmas=None, follows=True):
    levels = sigmas or (*(SD.sigma(999 * (1 - i / 20)) for i in range(20)), 0.0)
    return Run("test", FIRST_PASS, ModelFacts("SD 1.x", (64, 64), SD, None), (64, 64), levels, hires_follows=follows)


@given(scale=st.floats(1, 64), largest=st.floats(1.1, 4))
def test_even_factors_multiply_to_the_scale_and_are_as_few_as_can_be(scale, largest):
    factors = even_factors(scale, largest)
    assert math.prod(factors) == pytest.approx(scale, rel=1e-9)
    assert max(factors) <= largest * (1 + 1e-6)
    assert largest ** (len(factors) - 1) < scale * (1 + 1e-6) or len(factors) == 1


@given(base=st.tuples(sides, sides), target=st.tuples(sides, sides), count=st.integers(1, 5))
def test_sizes_end_at_the_target_and_lie_between(base, target, count):
    found = sizes(base, target, (2.0,) * count)
    assert found[-1] == target and len(found) == count
    for axis in (0, 1):
        low, high = sorted((base[axis], target[axis]))
        assert all(low - 8 <= size[axis] <= high + 8 and size[axis] % 8 == 0 for size in found[:-1])


def test_listed_factors_go_where_they_lead():
    assert scaled((512, 768), (1.5, 2.0)) == [(768, 1152), (1536, 2304)]


def test_four_times_is_two_stages_and_twice_is_one():
    stages = cascade.divide(CascadeSettings(), HiresPass((512, 512), (2048, 2048)), [Stage((2048, 2048))])
    assert [stage.size for stage in stages] == [(1024, 1024), (2048, 2048)]
    with pytest.raises(Rest, match="one stage"):
        cascade.divide(CascadeSettings(), HiresPass((512, 512), (1024, 1024)), [Stage((1024, 1024))])


def test_values_per_stage_and_the_last_serves_the_rest():
    settings = CascadeSettings(
        factors="2, 2, 1.5", denoise="0.6, 0.4", steps="20", cleanup=0.1, changes="deep_shrink.factor = 2, 4"
    )
    stages = cascade.divide(settings, HiresPass((64, 64), (128, 128)), [Stage((128, 128))])
    assert [stage.size for stage in stages] == [(128, 128), (256, 256), (384, 384), (384, 384)]
    assert [stage.denoise for stage in stages] == [0.6, 0.4, 0.4, 0.1]
    assert [stage.steps for stage in stages] == [20, 20, 20, None]
    assert [stage.cleanup for stage in stages] == [False, False, False, True]
    assert [dict(stage.changes) for stage in stages[:3]] == [
        {"deep_shrink": {"factor": factor}} for factor in ("2", "4", "4")
    ]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("factors", "2, x", "'x' is not a number"),
        ("factors", "0.1", "outside 0.25 to 8"),
        ("denoise", "1.5", "denoise 1.5 is outside 0 to 1"),
        ("steps", "0", "steps 0 is outside 1 to 1000"),
        ("changes", "factor = 2", "not of the form"),
        ("factors", ",".join(["1.1"] * 9), "9 stages are more than 8"),
    ],
)
def test_bad_lists_are_told_with_value_and_range(field, value, told):
    with pytest.raises(Unusable, match=told):
        read_settings(CascadeSettings, {field: value})


def test_a_stage_changes_only_what_is_on_and_keeps_going_with_bad_values():
    selection = {"deep_shrink": DeepShrinkSettings(), "cascade": CascadeSettings()}
    changes = {"deep_shrink": {"factor": "4", "block": "x"}, "apg": {"eta": "1"}, "nobody": {"a": "1"}}
    chosen, notes = selection_of(Stage((64, 64), changes=changes), selection)
    assert chosen["deep_shrink"] == DeepShrinkSettings() and "apg" not in chosen
    assert any("'x' is not a number" in note for note in notes) and any("nobody" in note for note in notes)
    chosen, notes = selection_of(Stage((64, 64), changes={"deep_shrink": {"factor": "4"}}), selection)
    assert chosen["deep_shrink"].factor == 4 and notes == []


def test_a_clean_up_leaves_out_what_looks_back_at_the_picture_before():
    chosen, _ = selection_of(Stage((64, 64), cleanup=True), {"apg": APGSettings(), "relay": RelaySettings()})
    assert set(chosen) == {"apg"}


def test_planning_notes_what_acted_and_what_rests():
    generation = Generation({"cascade": CascadeSettings(), "relay": RelaySettings()})
    assert divides(generation.selection)
    stages = plan_stages(generation, HiresPass((512, 512), (1024, 1024)))
    assert stages == [Stage((1024, 1024))] and not generation.acted
    assert set(generation.rested) == {"Cascade", "Relay"}


def test_a_mask_belongs_to_one_size():
    generation = Generation({"cascade": CascadeSettings(factors="2, 2")})
    assert plan_stages(generation, HiresPass((64, 64), (256, 256), masked=True)) == [Stage((256, 256))]
    assert "mask" in generation.rested["Cascade"] and not generation.acted


@given(share=st.floats(0.05, 0.9), scale=st.sampled_from([1.0, 1.5, 2.0, 4.0]))
def test_the_relay_hands_over_at_equal_signal_to_noise_ratio(share, scale):
    """MegaFusion's abar' = abar / (gamma - (gamma - 1) abar), as long as the schedule reaches that far."""
    run = first_pass()
    sigma = relay.handover(run.sigmas, share)
    side = int(512 * scale)
    [stage] = relay.divide(RelaySettings(share=share), HiresPass((512, 512), (side, side), run), [Stage((side, side))])
    abar, gamma = 1 / (1 + sigma**2), scale**2
    large = abar / (gamma - (gamma - 1) * abar)
    wanted = math.sqrt(1 / large - 1)
    begins = 20 * (1 - stage.denoise)  # in steps
    low, high = run.sigmas[min(math.ceil(begins), 19)], run.sigmas[math.floor(begins)]
    assert stage.denoise == 1.0 if wanted >= run.sigmas[0] else low * 0.999 <= wanted <= high * 1.001
    assert stage.steps == max(1, round(20 * stage.denoise))


def test_the_relay_ends_the_first_pass_at_the_same_level():
    run = first_pass()
    patch = relay.begin(RelaySettings(share=0.3), run)
    ends = [patch.ends_after(Call(float(torch.tensor(sigma)), 0)) for sigma in run.sigmas[:20]]
    assert ends.index(True) == 14 and patch.fired  # 70 % of 20 steps, counted from 0


def test_the_relay_rests_without_a_hires_pass_and_refuses_a_sampler_without_steps():
    with pytest.raises(Rest, match=r"Hires\. fix is off"):
        relay.begin(RelaySettings(), first_pass(follows=False))
    with pytest.raises(Refusal, match="chooses its own steps"):
        relay.begin(RelaySettings(), first_pass(sigmas=(14.6, 0.03)))
    hires = Run("test", HIRES_PASS, ModelFacts("SD 1.x", (64, 64), SD, None), (64, 64), (5.0, 1.0, 0.0))
    with pytest.raises(Rest, match="first pass only"):
        relay.begin(RelaySettings(), hires)
