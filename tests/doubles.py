"""A miniature UNet with SD 1.5's block layout, run both ways: as LDM runs its blocks, and as a patcher's host does.

Same weights, same blocks: what the two host adapters do to it must be the same.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_hires.attention import attend

CHANNELS = 8


class Downsample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class MiniAttention(nn.Module):
    """LDM's CrossAttention: projections without bias, an output projection with one."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        value = context if value is None else value
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(value), self.heads))


class MiniTransformer(nn.Module):
    """A transformer block of self-attention alone. With options it is the block of a host with a UNet patcher."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(CHANNELS), MiniAttention()

    def forward(self, x: Tensor, options: dict | None = None) -> Tensor:
        n = self.norm1(x.flatten(2).transpose(1, 2))
        out = self.attn1(n) if options is None else self.patched(n, options)
        return x + out.transpose(1, 2).unflatten(2, x.shape[-2:])

    def patched(self, n: Tensor, options: dict) -> Tensor:
        extra = {**options, "n_heads": self.attn1.heads, "block_index": 0}
        key = value = n
        for patch in options.get("patches", {}).get("attn1_patch", []):
            n, key, value = patch(n, key, value, extra)
        replaced = options.get("patches_replace", {}).get("attn1", {})
        block = (*options["block"], 0)
        replacement = replaced.get(block if block in replaced else options["block"])
        if replacement is None:
            return self.attn1(n, key, value)
        projected = self.attn1.to_q(n), self.attn1.to_k(key), self.attn1.to_v(value)
        return self.attn1.to_out(replacement(*projected, extra))


class Block(nn.Sequential):
    """Called as hosts call theirs, with an embedding and a context that it ignores."""

    def forward(self, x: Tensor, emb: Any = None, context: Any = None, options: dict | None = None) -> Tensor:
        for layer in self:
            x = layer(x, options) if isinstance(layer, MiniTransformer) else layer(x)
        return x


class MiniUNet(nn.Module):
    def __init__(self, seed: int = 0, attention: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        conv = lambda cin: nn.Sequential(nn.Conv2d(cin, CHANNELS, 3, padding=1), nn.SiLU())
        self.input_blocks = nn.ModuleList(
            [Block(conv(4))] + [Block(Downsample() if i in (3, 6, 9) else conv(CHANNELS)) for i in range(1, 12)]
        )
        self.middle_block = Block(conv(CHANNELS))
        self.output_blocks = nn.ModuleList(Block(conv(2 * CHANNELS)) for _ in range(12))
        self.out = nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.upsamples = (2, 5, 8)
        if attention:
            self._add_attention()

    def _add_attention(self) -> None:
        """Where SD 1.5 has it: at the three upper levels and in the middle."""
        outputs = self.output_blocks[3:]
        for block in [*(self.input_blocks[i] for i in (1, 2, 4, 5, 7, 8)), self.middle_block, *outputs]:
            block.append(MiniTransformer())

    def forward(self, x: Tensor) -> Tensor:
        """LDM's loop; like A1111, a map that meets a skip of another size is resized to it (nearest)."""
        skips, h = [], x
        for block in self.input_blocks:
            h = block(h, None, None)
            skips.append(h)
        h = self.middle_block(h, None, None)
        for index, block in enumerate(self.output_blocks):
            skip = skips.pop()
            if h.shape[-2:] != skip.shape[-2:]:
                h = F.interpolate(h, size=skip.shape[-2:], mode="nearest")
            h = block(torch.cat([h, skip], dim=1), None, None)
            if index in self.upsamples:
                h = F.interpolate(h, scale_factor=2, mode="nearest")
        return self.out(h)


# LDM's Upsample is part of the output block: a hook on the block sees the doubled map.
class LdmMiniUNet(MiniUNet):
    def __init__(self, seed: int = 0, attention: bool = False) -> None:
        super().__init__(seed, attention)
        for index in self.upsamples:
            self.output_blocks[index].append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.upsamples = ()


def controlled_as_in_a1111(unet: LdmMiniUNet, x: Tensor, control: dict[str, list[Tensor]]) -> Tensor:
    """The loop of A1111's ControlNet extension: it replaces the UNet's forward, runs the same block modules, and
    resizes each residual (nearest) to the map that it is added to."""

    def add(h: Tensor, residual: Tensor) -> Tensor:
        return h + F.interpolate(residual, size=h.shape[-2:], mode="nearest")

    middle, output = list(control["middle"]), list(control["output"])
    skips, h = [], x
    for block in unet.input_blocks:
        h = block(h, None, None)
        skips.append(h)
    h = add(unet.middle_block(h, None, None), middle.pop())
    for block in unet.output_blocks:
        skip = add(skips.pop(), output.pop())
        if h.shape[-2:] != skip.shape[-2:]:
            h = F.interpolate(h, size=skip.shape[-2:], mode="nearest")
        h = block(torch.cat([h, skip], dim=1), None, None)
    return unet.out(h)


class PatcherMiniUNet(MiniUNet):
    """The loop of a host with a UNet patcher: patches, ControlNet residuals, Upsample to the next skip's size."""

    def forward(self, x: Tensor, control: dict | None = None, transformer_options: dict | None = None) -> Tensor:
        options = transformer_options or {}
        patches = options.get("patches", {})
        skips, h = [], x
        for index, block in enumerate(self.input_blocks):
            options["block"] = ("input", index)
            h = host_adds_control(block(h, None, None, options), control, "input")
            for patch in patches.get("input_block_patch", []):
                h = patch(h, options)
            skips.append(h)
            for patch in patches.get("input_block_patch_after_skip", []):
                h = patch(h, options)
        options["block"] = ("middle", 0)
        h = host_adds_control(self.middle_block(h, None, None, options), control, "middle")
        for index, block in enumerate(self.output_blocks):
            options["block"] = ("output", index)
            skip = host_adds_control(skips.pop(), control, "output")
            for patch in patches.get("output_block_patch", []):
                h, skip = patch(h, skip, options)
            h = block(torch.cat([h, skip], dim=1), None, None, options)
            if index in self.upsamples:
                h = F.interpolate(h, size=skips[-1].shape[-2:], mode="nearest")
        return self.out(h)


class ControlDropped(Exception):
    """The host would print a warning and go on without the control."""


def host_adds_control(h: Tensor, control: dict | None, side: str) -> Tensor:
    residual = control[side].pop() if control and control.get(side) else None
    if residual is None:
        return h
    if residual.shape != h.shape:
        raise ControlDropped(f"{side}: {tuple(residual.shape)} does not fit {tuple(h.shape)}")
    return h + residual


class FakePatcher:
    """A UNet patcher whose clone() deep-copies its options, as the hosts' do."""

    def __init__(self, unet: nn.Module, options: dict | None = None) -> None:
        self.model = SimpleNamespace(diffusion_model=unet)
        self.model_options = options or {"transformer_options": {}}

    def clone(self) -> FakePatcher:
        return FakePatcher(self.model.diffusion_model, copy.deepcopy(self.model_options))

    def _add(self, name: str, patch: Any) -> None:
        self.model_options["transformer_options"].setdefault("patches", {}).setdefault(name, []).append(patch)

    def set_model_input_block_patch(self, patch: Any) -> None:
        self._add("input_block_patch", patch)

    def set_model_input_block_patch_after_skip(self, patch: Any) -> None:
        self._add("input_block_patch_after_skip", patch)

    def set_model_output_block_patch(self, patch: Any) -> None:
        self._add("output_block_patch", patch)

    def set_model_attn1_patch(self, patch: Any) -> None:
        self._add("attn1_patch", patch)

    def set_model_attn1_replace(self, patch: Any, side: str, block: int, depth: int | None = None) -> None:
        replaced = self.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault("attn1", {})
        replaced[(side, block) if depth is None else (side, block, depth)] = patch

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def evaluate(self, x: Tensor, control: dict | None = None) -> Tensor:
        """What the host does with the patcher for one UNet evaluation."""
        options = {**self.model_options["transformer_options"], "cond_or_uncond": [0]}
        conditions = {"transformer_options": options} | ({"control": control} if control else {})

        def apply_model(x: Tensor, _timestep: Any, **c: Any) -> Tensor:
            return self.model.diffusion_model(x, c.get("control"), c["transformer_options"])

        wrapper = self.model_options.get("model_function_wrapper")
        if wrapper is None:
            return apply_model(x, None, **conditions)
        return wrapper(apply_model, {"input": x, "timestep": None, "c": conditions, "cond_or_uncond": [0]})


def residuals(x: Tensor, seed: int = 0) -> dict[str, list[Tensor]]:
    """ControlNet residuals for an unshrunk UNet: one for the middle and one per skip, in the hosts' order."""
    generator = torch.Generator().manual_seed(seed)
    sizes = []
    height, width = x.shape[-2:]
    for index in range(12):
        if index in (3, 6, 9):
            height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    draw = lambda size: torch.randn(x.shape[0], CHANNELS, *size, generator=generator)
    return {"input": [], "middle": [draw(sizes[-1])], "output": [draw(size) for size in sizes]}
