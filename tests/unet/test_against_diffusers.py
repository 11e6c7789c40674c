"""FreeU against diffusers, alone in its module: the import takes many seconds."""

import pytest
import torch
from diffusers.utils.torch_utils import apply_freeu, fourier_filter

from lib_hires.techniques.unet.freeu import V1, filter_skip, scale_backbone

SIZES = [(8, 8), (9, 13), (32, 20), (7, 1), (2, 3), (65, 97)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("s", [0.2, 0.9, 1.7])
def test_the_skip_filter(size, s):
    x = torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(filter_skip(x, s), fourier_filter(x, threshold=1, scale=s), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_version_one(stage):
    h, skip = torch.randn(2, 2, 8, 9, 13, generator=torch.Generator().manual_seed(2))
    values = {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4}
    want_h, want_skip = apply_freeu(stage - 1, h.clone(), skip.clone(), **values)
    torch.testing.assert_close(scale_backbone(h, values[f"b{stage}"], V1), want_h)
    torch.testing.assert_close(filter_skip(skip, values[f"s{stage}"]), want_skip, rtol=1e-5, atol=1e-5)
