"""The plot shows the technique's own curve, at any step count, in words as well."""

import gc
import re
import sys
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_hires.registry import BY_NAME, TECHNIQUES
from lib_hires.technique import Curve
from lib_hires.webui.plot import phase_texts, plot, synthetic_run
from tests.webui_layer import strategies

DEEP_SHRINK = BY_NAME["deep_shrink"]
KIND = DEEP_SHRINK.settings


CURVED = [technique for technique in TECHNIQUES if technique.curve is not None]


@given(st.sampled_from(CURVED).flatmap(lambda t: st.tuples(st.just(t), strategies.settings_of(t))), st.integers())
def test_any_settings_give_well_formed_svg(pair, steps):
    technique, settings = pair
    svg = ET.fromstring(plot(technique, settings, steps))
    bars = svg.findall("rect")
    assert len(bars) == min(max(steps, 1), 150)
    for bar in bars:
        assert float(bar.get("height")) > 0 and float(bar.get("width")) > 0 and float(bar.get("y")) >= 0


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda technique: technique.name)
def test_there_is_a_plot_exactly_where_there_is_a_curve(technique):
    for settings in (technique.settings(), strategies.all_changed(technique)):
        drawn = plot(technique, settings)
        assert drawn.startswith("<svg") if technique in CURVED else drawn == ""


@pytest.mark.parametrize("technique", CURVED, ids=lambda technique: technique.name)
def test_a_curve_has_a_value_and_a_phase_for_every_step_and_fits_its_axis(technique):
    for settings in technique.presets.values():
        curve = technique.curve(settings, synthetic_run(20))
        assert len(curve.values) == len(curve.phases) == 20 and curve.caption
        assert all(curve.low <= value <= curve.high for value in curve.values)


def test_the_bars_are_the_curve():
    settings = KIND(factor=2.0, end=0.35, gradual=0.6)
    curve = DEEP_SHRINK.curve(settings, synthetic_run(20))
    heights = [float(bar.get("height")) for bar in ET.fromstring(plot(DEEP_SHRINK, settings, 20)).findall("rect")]
    for height, value in zip(heights, curve.values, strict=True):
        assert height / max(heights) == pytest.approx(value, abs=0.01)


def test_phases_are_named_in_words():
    label = ET.fromstring(plot(DEEP_SHRINK, KIND(), 20)).get("aria-label")
    assert re.fullmatch(r"scale of the deep map\. full shrink: steps 1-\d+; growing: .*; original: steps \d+-20", label)


def test_a_single_step_and_a_returning_phase():
    curve = Curve((1, 0, 0, 1), ("b", "a", "a", "b"), 0, 1, "")
    assert phase_texts(curve) == [("b", "b: step 1"), ("a", "a: steps 2-3"), ("b", "b: step 4")]


def test_a_phase_keeps_its_colour():
    def colour_of_original(settings):
        bars = ET.fromstring(plot(DEEP_SHRINK, settings, 20)).findall("rect")
        return bars[-1].get("fill")

    assert colour_of_original(KIND()) == colour_of_original(KIND(end=0.0, gradual=0.0))


@pytest.mark.parametrize("technique", CURVED, ids=lambda technique: technique.name)
def test_while_another_thread_holds_all_objects(technique):
    """As reForge's does. Here whoever fills a tuple from a generator finds it held, at the worst moment."""
    held = {}

    def hold(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_name == "<genexpr>" and "lib_hires" in code.co_filename and code not in held:
            held[code] = gc.get_objects()

    before = sys.getprofile()
    sys.setprofile(hold)
    try:
        assert plot(technique, technique.settings())
    finally:
        sys.setprofile(before)
