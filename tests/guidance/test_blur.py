"""The blur against scipy and padded convolution, and its behaviour at every size and sigma."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d

from lib_hires.blur import gaussian_blur

SIZES = st.integers(1, 23)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(h=SIZES, w=SIZES, sigma=st.floats(0.1, 60), radius=st.one_of(st.none(), st.integers(0, 40)))
def test_it_is_scipys_gaussian_with_a_mirror_at_the_edge_cells(h, w, sigma, radius):
    x = noise(2, 3, h, w)
    want = x.double().numpy()
    for axis in (-2, -1):
        taps = int(np.ceil(3 * sigma)) if radius is None else radius
        want = gaussian_filter1d(want, sigma, axis=axis, mode="mirror", radius=taps)
    assert abs(gaussian_blur(x, sigma, radius).double().numpy() - want).max() <= 1e-5


def test_with_room_for_its_padding_it_is_a_padded_convolution():
    x = noise(2, 4, 17, 29)
    taps = torch.exp(-0.5 * (torch.arange(-4, 5) / 2.0) ** 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    want = F.conv2d(F.pad(x, (4,) * 4, mode="reflect"), kernel.expand(4, 1, 9, 9), groups=4)
    torch.testing.assert_close(gaussian_blur(x, 2.0, radius=4), want, rtol=0, atol=1e-6)


def test_sigma_zero_is_the_input_itself():
    x = noise(1, 1, 5, 7)
    assert gaussian_blur(x, 0.0) is x


@given(h=SIZES, w=SIZES)
def test_sigma_infinity_is_the_mean(h, w):
    x = noise(2, 3, h, w)
    got = gaussian_blur(x, float("inf"))
    torch.testing.assert_close(got, x.mean(dim=(-2, -1), keepdim=True).expand_as(x))


@given(
    h=SIZES,
    w=SIZES,
    sigma=st.one_of(st.floats(0, 1e12), st.just(5e-324), st.just(float("inf"))),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_every_sigma_keeps_constants_shape_and_dtype(h, w, sigma, dtype):
    x = torch.full((1, 2, h, w), 0.75, dtype=dtype)
    out = gaussian_blur(x, sigma)
    assert out.shape == x.shape and out.dtype == dtype
    assert (out.float() - 0.75).abs().max() < 1e-2 if dtype.itemsize == 2 else (out - 0.75).abs().max() < 1e-5


def test_a_sigma_far_beyond_the_map_is_flat():
    out = gaussian_blur(noise(1, 1, 8, 13), 1e6)
    assert (out - out.mean()).abs().max() < 1e-4


def test_maps_of_a_batch_and_channels_do_not_mix():
    x = noise(3, 2, 9, 5)
    torch.testing.assert_close(gaussian_blur(x, 1.3)[1:2, 1:], gaussian_blur(x[1:2, 1:], 1.3))


def test_it_keeps_its_precision_where_the_host_samples_under_autocast():
    x = noise(1, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = gaussian_blur(x, 2.0)
    assert torch.equal(got, gaussian_blur(x, 2.0))


@pytest.mark.parametrize("sigma", [-1.0, float("nan")])
def test_a_sigma_that_means_nothing_is_an_error(sigma):
    with pytest.raises(ValueError, match="at least 0"):
        gaussian_blur(noise(1, 1, 2, 2), sigma)
