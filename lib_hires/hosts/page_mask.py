"""The grey mask of a WebUI's page, where the host makes it black and white before any script is asked.

Forge's page (and no other host's, and not its API) turns masks to black and white on its way to `p`. What the user
drew or uploaded is still at hand in the function that serves the page, which is running when scripts are asked: there
it is read. Nothing is patched, and a host that has no such function, or other names in it, keeps its own mask.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from PIL import Image, ImageFilter

_MODULE, _FUNCTION = "modules.img2img", "img2img_function"
_INPAINT_SKETCH, _INPAINT_UPLOAD = 3, 4
# As Forge widens a sketch: by this part of the shorter side, in each direction
_SKETCH_MARGIN = 0.015


def unrounded(mask: Any) -> Image.Image | None:
    """The grey mask behind `mask`, the one that p was given. None: `mask` is all that the user gave.

    Painted in the Inpaint tab it stays as it is: there the brush's opacity is only how it is shown.
    """
    page = _page()
    if mask is None or page.get("mask") is not mask:
        return None  # another extension's own request, or one picture of a folder
    if page.get("mode") == _INPAINT_SKETCH and isinstance(page.get("inpaint_color_sketch_fg"), Image.Image):
        return _widened(page["inpaint_color_sketch_fg"].getchannel("A"))
    if page.get("mode") == _INPAINT_UPLOAD and isinstance(page.get("init_mask_inpaint"), Image.Image):
        return page["init_mask_inpaint"]
    return None


def _page() -> Mapping[str, Any]:
    """The variables of the function that serves img2img's page, where this runs inside of it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == _FUNCTION and frame.f_globals.get("__name__") == _MODULE:
            return frame.f_locals
        frame = frame.f_back
    return {}


def _widened(opacity: Image.Image) -> Image.Image:
    margin = int(_SKETCH_MARGIN * min(opacity.size))
    return opacity.filter(ImageFilter.MaxFilter(2 * margin + 1))
