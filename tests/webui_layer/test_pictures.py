"""The small pictures show the technique's own preview, at any step count, in words as well."""

import base64
import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib_hires.registry import TECHNIQUES
from lib_hires.webui.panel import view
from lib_hires.webui.pictures import pictures
from lib_hires.webui.plot import synthetic_run
from tests.webui_layer import strategies

PREVIEWED = [technique for technique in TECHNIQUES if technique.preview is not None]


def images(svg):
    sources = [image.get("href").split(",", 1)[1] for image in ET.fromstring(svg).findall("image")]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]


@given(st.sampled_from(PREVIEWED).flatmap(lambda t: st.tuples(st.just(t), strategies.settings_of(t))), st.integers())
def test_any_settings_give_the_pictures_of_the_preview(pair, steps):
    technique, settings = pair
    shown = images(pictures(technique, settings, steps))
    for got, want in zip(shown, technique.preview(settings, synthetic_run(steps)), strict=True):
        assert np.abs(got / 255 - want.grey).max() < 0.003


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda technique: technique.name)
def test_the_view_has_pictures_exactly_where_there_is_a_preview(technique):
    assert ("<image" in view(technique, technique.settings(), [])) == (technique in PREVIEWED)


def test_settings_and_steps_are_seen():
    technique = PREVIEWED[0]
    drawn = {pictures(technique, settings, steps) for settings in technique.presets.values() for steps in (4, 20)}
    assert len(drawn) == 2 * len(technique.presets)
