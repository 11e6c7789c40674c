"""How the bench runs ldm's modules, against ldm's own formulas."""

import pytest
import torch

from lib_hires.hosts.bench.evaluation import LiveBytes


@pytest.fixture
def attention(bench):
    """The autoencoder's own attention, 64 channels."""
    return bench.models.vae.autoencoder.decoder.mid.attn_1


@torch.inference_mode()
def test_the_autoencoders_attention_is_softmax_over_all_cells(attention):
    x = torch.randn(2, 64, 6, 9, generator=torch.Generator().manual_seed(0))
    q, k, v = (layer(attention.norm(x)).flatten(2) for layer in (attention.q, attention.k, attention.v))
    weights = torch.softmax(q.transpose(1, 2) @ k / 64**0.5, dim=-1)
    expected = x + attention.proj_out((v @ weights.transpose(1, 2)).unflatten(2, (6, 9)))
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_the_autoencoders_attention_holds_no_scores(attention):
    x = torch.zeros(1, 64, 64, 64)
    with torch.inference_mode(), LiveBytes(attention.parameters(), "cpu") as live:
        attention(x)
    assert live.peak < 10 * x.numel() * 4 < (64 * 64) ** 2 * 4
