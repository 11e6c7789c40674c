"""What it is for: at twice the native size, one object instead of several.

Needs the bench's model in A1111 (docs/testing.md): HIRES_ONE_OBJECT is its checkpoint's title.
"""

from __future__ import annotations

import os

import pytest
from PIL import Image

from .client import WebUI, shrink
from .page import SCREENSHOTS

CHECKPOINT = os.environ.get("HIRES_ONE_OBJECT", "")
PICTURES = 12
NATIVE = 128
REQUEST = {"steps": 20, "cfg_scale": 3, "sampler_name": "Euler", "scheduler": "Automatic", "negative_prompt": ""}

pytestmark = pytest.mark.skipif(not CHECKPOINT, reason="needs the bench's model in A1111: set HIRES_ONE_OBJECT")


def count_errors(webui: WebUI, size: int, plugin=None) -> int:
    """How many of the pictures do not hold exactly one object of the prompt's colour."""
    from lib_hires.hosts.bench.compare import prompt
    from lib_hires.hosts.bench.counter import count_objects

    errors, pictures = 0, []
    for index in range(PICTURES):
        text = prompt(index)
        answer = webui.txt2img(plugin, prompt=text, seed=index, width=size, height=size, **REQUEST)
        assert answer.status == 200, answer.body
        errors += count_objects(answer.picture, text.split()[-2]).count != 1
        pictures.append(answer.picture)
    _save_sheet(pictures, f"one object {size} {'with' if plugin else 'without'}")
    return errors


def _save_sheet(pictures, name):
    if not SCREENSHOTS:
        return
    side = pictures[0].shape[0]
    sheet = Image.new("RGB", (side * 6, side * (len(pictures) // 6)))
    for index, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (side * (index % 6), side * (index // 6)))
    os.makedirs(SCREENSHOTS, exist_ok=True)
    sheet.save(os.path.join(SCREENSHOTS, f"{name}.png"))


def test_one_object_instead_of_several(webui, record_property):
    with webui.using_checkpoint(CHECKPOINT):
        native = count_errors(webui, NATIVE)
        naive = count_errors(webui, 2 * NATIVE)
        treated = count_errors(webui, 2 * NATIVE, shrink(preset="2x, composition first"))
    print(f"wrong counts of {PICTURES}: native {native}, naive 2x {naive}, DeepShrink 2x {treated}")
    for name, errors in (("native", native), ("naive", naive), ("deep_shrink", treated)):
        record_property(name, errors)
    assert native <= PICTURES // 6
    assert naive >= PICTURES // 2
    assert treated <= naive // 2
