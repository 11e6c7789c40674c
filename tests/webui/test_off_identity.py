"""Off is free: absent, disabled and never installed give the same pixels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .baseline import REQUESTS, baseline_file, checkpoint_file
from .client import same, shrink

BASELINES = os.environ.get("HIRES_BASELINE_DIR", "")


@pytest.mark.skipif(not BASELINES, reason="needs pictures of a WebUI without the extension: set HIRES_BASELINE_DIR")
@pytest.mark.parametrize("name", REQUESTS)
def test_like_a_webui_without_the_extension(webui, name):
    directory = Path(BASELINES)
    file = baseline_file(directory, webui.host, name)
    if not file.exists():
        pytest.skip(f"no baseline was recorded for {webui.host}")
    assert json.loads(checkpoint_file(directory, webui.host).read_text()) == webui.checkpoint("sd1")
    with Image.open(file) as recorded:
        wanted = np.asarray(recorded)
    answer = REQUESTS[name](webui)
    assert same(np.concatenate(answer.pictures, axis=0), wanted)


@pytest.mark.parametrize("name", ["hires", "img2img", "inpaint"])
def test_disabled_like_absent(webui, name):
    ways = {"hires": webui.hires, "img2img": webui.img2img, "inpaint": webui.inpaint}
    absent, disabled = ways[name](), ways[name](shrink(enabled=False))
    assert same(absent.picture, disabled.picture)
    assert not absent.keys
    assert not disabled.keys
