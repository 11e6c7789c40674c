"""Plain numpy beside the code under test: golden cases, a softmax attention, a miniature run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lib_hires.noise import NoiseSchedule
from lib_hires.run import FIRST_PASS, Call, ModelFacts, Run
from lib_hires.sites import Place
from lib_hires.topology import AttentionLayer, UNetTopology

SD = NoiseSchedule.scaled_linear()
ATTENTION_IN = [("input", i) for i in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", i) for i in range(3, 12)]
SD15 = UNetTopology(12, 12, (3, 6, 9), tuple(AttentionLayer(side, block, 0) for side, block in ATTENTION_IN))
SDXL = UNetTopology(
    9, 9, (3, 6), tuple(AttentionLayer("input", i, d) for i, n in ((4, 2), (5, 2), (7, 10), (8, 10)) for d in range(n))
)
TOP, SECOND, MIDDLE = AttentionLayer("input", 1, 0), AttentionLayer("input", 4, 0), AttentionLayer("middle", 0, 0)
LAST = AttentionLayer("output", 11, 0)


class Golden:
    """The cases of one file that agree with the specification."""

    def __init__(self, name):
        self._arrays = np.load(Path(__file__).parent.parent / "golden" / f"{name}.npz")
        self.all = json.loads(str(self._arrays["meta"]))["cases"]

    def cases(self, wanted=lambda parameters: True):
        chosen = [case for case in self.all if case["agrees_with_spec"] == "yes" and wanted(case["parameters"])]
        assert chosen
        return pytest.mark.parametrize("case", chosen, ids=lambda case: case["name"])

    def array(self, case, name):
        return torch.from_numpy(self._arrays[f"case_{case['case']}_{name}"])

    def projections(self, case, key=None, value=None):
        tokens = self.array(case, "in_tokens")
        sources = tokens, tokens if key is None else key, tokens if value is None else value
        return [s @ self.array(case, f"in_w{name}").T for s, name in zip(sources, "qkv", strict=True)]


def assert_golden(got, want, case):
    got, want = got.double().numpy(), want.double().numpy()
    bound = case["tolerance"]["atol"] + case["tolerance"]["rtol_of_max"] * abs(want).max()
    assert got.shape == want.shape and abs(got - want).max() <= bound


def numpy_attention(q, k, v, heads):
    """softmax(q k^T / sqrt d) v in float64, one head at a time. [N, C], [M, C], [M, C] -> [N, C]."""
    q, k, v = (np.asarray(t, dtype=np.float64) for t in (q, k, v))
    out = []
    for head in range(heads):
        d = q.shape[-1] // heads
        part = slice(head * d, (head + 1) * d)
        scores = q[:, part] @ k[:, part].T / np.sqrt(d)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
    return np.concatenate(out, axis=-1)


def a_run(latent=(128, 128), unet=SD15, native=(64, 64), **changes):
    sigmas = tuple(SD.sigma(999 * (1 - i / 20)) for i in range(20))
    return Run("bench", FIRST_PASS, ModelFacts("SD 1.x", native, SD, unet), latent, sigmas, **changes)


def sigma_at(run, elapsed):
    return run.sigma_at(elapsed) if elapsed > 0 else run.sigma_first


def a_place(size, layer=TOP, sigma=SD.sigma_max, heads=2, seed=0):
    return Place(layer, size, heads, Call(sigma, 0), seed=seed)


def tokens(size, batch=1, channels=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size[0] * size[1], channels, generator=generator).to(dtype)
