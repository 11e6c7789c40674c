"""A toy network with one self-attention in the middle, and a guidance patch that keeps what it was given."""

import torch
from torch import Tensor, nn

from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan
from lib_hires.run import FIRST_PASS, ModelFacts, Run
from lib_hires.sites import Guidance, PerturbedAttention, RecordedAttention
from lib_hires.technique import Patch
from lib_hires.topology import unet_topology

SD = NoiseSchedule.scaled_linear()
CHANNELS = 4


def host_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return torch.softmax(q @ k.transpose(1, 2) / CHANNELS**0.5, dim=-1) @ v


class SelfAttention(nn.Module):
    heads = 1

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS, bias=False) for _ in range(3))
        self.to_out = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.to_out(host_attention(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = SelfAttention()

    def forward(self, h: Tensor, options: dict | None = None) -> Tensor:
        tokens = h.flatten(2).transpose(1, 2)
        replaced = (options or {}).get("patches_replace", {}).get("attn1", {})
        patch = replaced.get(("middle", 0, 0), replaced.get(("middle", 0)))
        if patch is None:
            out = self.attn1(tokens)
        else:  # as a host with a UNet patcher does it
            a, extra = self.attn1, {**options, "n_heads": 1, "block": ("middle", 0), "block_index": 0}
            n = key = value = tokens
            for change in options.get("patches", {}).get("attn1_patch", []):
                n, key, value = change(n, key, value, extra)
            out = a.to_out(patch(a.to_q(n), a.to_k(key), a.to_v(value), extra))
        return h + out.transpose(1, 2).unflatten(2, h.shape[-2:])


class Block(nn.Sequential):
    def forward(self, x: Tensor, emb=None, context=None) -> Tensor:
        return super().forward(x)


class ToyUNet(nn.Module):
    """Every row depends on its own latent, text and image only; attention makes it nonlinear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))])
        self.middle_block = Block(TransformerBlock())
        self.output_blocks = nn.ModuleList([Block(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))])

    def forward(self, x: Tensor, text: Tensor, image: Tensor | float = 0.0, options: dict | None = None) -> Tensor:
        h = self.input_blocks[0](x + image) + text.mean((1, 2))[:, None, None, None]
        for patch in (options or {}).get("patches", {}).get("input_block_patch", []):
            h = patch(h, {**options, "block": ("input", 0)})
        for patch in (options or {}).get("patches", {}).get("input_block_patch_after_skip", []):
            h = patch(h, {**options, "block": ("input", 0)})
        h = self.middle_block(h) if options is None else self.middle_block[0](h, options)
        for patch in (options or {}).get("patches", {}).get("output_block_patch", []):
            h, _ = patch(h, h, {**options, "block": ("output", 0)})
        return torch.tanh(self.output_blocks[0](h))


class Trace(Patch, Guidance, PerturbedAttention, RecordedAttention):
    """Asks for everything and changes what it is told to."""

    def __init__(self, perturbed=True, skip=False, before=None, after=None) -> None:
        super().__init__()
        self.wanted, self.skip, self.before, self.after = perturbed, skip, before, after
        self.raw, self.recorded = None, []

    def skips_uncond(self, call):
        return self.skip

    def before_mix(self, cond, uncond, raw):
        return self.before(cond, uncond) if self.before else (cond, uncond)

    def after_mix(self, denoised, raw):
        self.raw, self.mixed = raw, denoised
        return self.after(denoised, raw) if self.after else denoised

    def perturbs(self, call):
        return self.wanted

    def perturbs_in(self, layer):
        return True

    def perturb(self, projections, place):
        return projections.v

    def records(self, call):
        return True

    def records_in(self, layer):
        return True

    def record(self, projections, place):
        self.recorded.append((projections.q.detach().clone(), place.size))


def plan_of(patch, unet, prediction="eps"):
    facts = ModelFacts("SD 1.x", (8, 8), SD, unet_topology(unet), prediction=prediction)
    return Plan(Run("test", FIRST_PASS, facts, (8, 8), (14.6, 1.0, 0.0)), {"trace": patch})


def identity_attention(unet: ToyUNet, *args) -> Tensor:
    """What the toy predicts where every token sees itself only."""
    attention = unet.middle_block[0].attn1
    plain, attention.forward = attention.forward, lambda x, context=None: attention.to_out(attention.to_v(x))
    try:
        return unet(*args)
    finally:
        attention.forward = plain
        del attention.forward
