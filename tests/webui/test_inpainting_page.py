"""Differential Diffusion from the page: grey masks that are uploaded or sketched arrive grey, in both hosts."""

from __future__ import annotations

import numpy as np
import pytest

from .client import FORGE, distance, is_alive, same, scene
from .test_differential_diffusion import SIZE, differential, paint, ramp


def prepared(page, webui, inpainting):
    """An inpainting tab with Differential Diffusion on and the settings of `paint`."""
    page.open()
    tab = page.tab("img2img")
    tab.paste(paint(webui, differential(), cfg_scale=2).infotext)
    tab.inpainting(inpainting)
    tab.set_host_number("mask_blur", 0)
    assert tab.is_on("differential_diffusion")
    return tab


@pytest.fixture
def original(tmp_path):
    file = tmp_path / "scene.png"
    scene().save(file)
    return file


def test_an_uploaded_mask_stays_grey(page, webui, tmp_path, original):
    tab = prepared(page, webui, "Inpaint upload")
    ramp().save(tmp_path / "mask.png")
    tab.upload("img_inpaint_base", original)
    tab.upload("img_inpaint_mask", tmp_path / "mask.png")
    tab.generate()
    page.screenshot("inpaint upload")
    assert "Differential Diffusion: on" in tab.infotext()
    assert distance(tab.picture(), paint(webui, differential(), cfg_scale=2).picture) < 1
    tab.open_panel()
    tab.ours("differential_diffusion-visible-checkbox").uncheck()
    page.at.wait_for_timeout(500)
    tab.generate()
    assert "Differential Diffusion" not in tab.infotext()
    assert distance(tab.picture(), paint(webui, cfg_scale=2, mask=rounded(webui)).picture) < 1, "off is the host's own"


def rounded(webui):
    """The mask as the host's page leaves it without us."""
    return ramp().point(lambda v: 255 if v > 128 else 0) if webui.host == FORGE else ramp()


def sketched(page, webui, original, opacity):
    """The picture after one stroke from left to right in its middle."""
    tab = prepared(page, webui, "Inpaint sketch")
    tab.upload("inpaint_sketch", original)
    tab.sketch(opacity, (0.2, 0.5), (0.8, 0.5))
    tab.generate()
    page.screenshot(f"inpaint sketch, opacity {opacity}")
    assert "Differential Diffusion: on" in tab.infotext()
    return tab.picture()


def test_a_sketch_is_as_grey_as_it_is_opaque(page, webui, original):
    before = np.asarray(scene().convert("RGB"))
    opaque, faint = (sketched(page, webui, original, opacity) for opacity in (1.0, 0.3))
    for picture in (opaque, faint):
        assert is_alive(picture)
        assert same(picture[: SIZE // 4], before[: SIZE // 4]), "nothing was drawn there"
    middle = slice(SIZE // 2 - 2, SIZE // 2 + 2), slice(SIZE // 4, -SIZE // 4)
    assert distance(opaque[middle], before[middle]) > distance(faint[middle], before[middle]) > 0.5
