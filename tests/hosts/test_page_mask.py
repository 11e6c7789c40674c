"""The grey mask behind a rounded one: read in the function that serves the page, and nowhere else."""

from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lib_hires.hosts import masks, page_mask

INPAINT, SKETCH, UPLOAD, FOLDER = 2, 3, 4, 5


def img2img_function(serve, mode, init_mask_inpaint=None, inpaint_color_sketch_fg=None):
    """As Forge's: black and white before p is made."""
    mask = Image.new("L", (8, 8), 255) if mode != FOLDER else None
    return serve(mask)


def page_of(module):
    """The function as if it stood in another module."""
    return FunctionType(
        img2img_function.__code__, {**globals(), "__name__": module}, "page", img2img_function.__defaults__
    )


PAGE = page_of("modules.img2img")


def uploaded():
    return Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8))


def sketched(size=200):
    """One grey dot on a transparent layer."""
    layer = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    layer.putpixel((100, 60), (255, 0, 0, 77))
    return layer


def test_an_uploaded_mask():
    grey = uploaded()
    assert PAGE(page_mask.unrounded, UPLOAD, grey, None) is grey


def test_a_sketch_is_as_grey_as_it_is_opaque_and_as_wide_as_the_hosts():
    found = np.asarray(PAGE(page_mask.unrounded, SKETCH, uploaded(), sketched()))
    want = np.zeros((200, 200), np.uint8)
    want[57:64, 97:104] = 77  # 0.015 of 200 px to each side
    assert np.array_equal(found, want)


def test_a_sketch_in_a_picture_too_small_to_be_widened():
    layer = sketched().crop((80, 40, 120, 80))
    assert np.array_equal(PAGE(page_mask.unrounded, SKETCH, None, layer), layer.getchannel("A"))


@pytest.mark.parametrize("mode", [INPAINT, FOLDER])
def test_other_tabs_keep_the_hosts_mask(mode):
    assert PAGE(page_mask.unrounded, mode, uploaded(), sketched()) is None


@pytest.mark.parametrize("mode", [SKETCH, UPLOAD])
def test_a_page_without_what_is_looked_for(mode):
    assert PAGE(page_mask.unrounded, mode) is None


def test_another_mask_is_somebody_elses():
    """A generation that an extension makes within that of the page."""
    assert PAGE(lambda mask: page_mask.unrounded(mask.copy()), UPLOAD, uploaded()) is None


def test_nothing_is_found_elsewhere():
    assert page_mask.unrounded(Image.new("L", (8, 8))) is None
    assert page_of("modules.api")(page_mask.unrounded, UPLOAD, uploaded()) is None


def test_it_is_p_s_only_while_the_masks_are_made():
    grey = uploaded()

    def serve(mask):
        p = SimpleNamespace(mask_round=True, image_mask=mask)
        masks.keep_grey(p)
        meanwhile, cell = p.image_mask, SimpleNamespace(**vars(p))
        for one in (p, cell):
            masks.restore_rounding(one)
        return meanwhile, p.image_mask is mask, cell.image_mask is mask, vars(p) == vars(cell)

    assert PAGE(serve, UPLOAD, grey) == (grey, True, True, True)
