"""A ControlNet with seeded random weights that fits any SD 1.x checkpoint, for tests on machines without downloads.

    python -m tests.webui.random_controlnet CHECKPOINT.safetensors OUT.safetensors

A ControlNet is a copy of the UNet's encoder plus a hint encoder and "zero convolutions"; here these are random and not
zero, so that the control has an effect. Put the result into the WebUI's ControlNet model folder and restart.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

UNET = "model.diffusion_model."
ENCODER = ("time_embed.", "input_blocks.", "middle_block.")
HINT_WIDTHS = (3, 16, 16, 32, 32, 96, 96, 256)  # then the UNet's own width
GAIN = 0.5


def random_convolution(width_in: int, width_out: int, size: int) -> dict[str, Tensor]:
    scale = GAIN / (width_in * size * size) ** 0.5
    return {"weight": torch.randn(width_out, width_in, size, size) * scale, "bias": torch.zeros(width_out)}


def control_weights(checkpoint: Path) -> dict[str, Tensor]:
    torch.manual_seed(7)
    weights = {}
    with safe_open(checkpoint, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            name = key.removeprefix(UNET)
            if key.startswith(UNET) and name.startswith(ENCODER):
                weights[name] = file.get_tensor(key)

    def add(prefix: str, convolution: dict[str, Tensor]) -> None:
        weights.update({f"{prefix}.{name}": tensor.half() for name, tensor in convolution.items()})

    for index, width in enumerate(block_widths(weights)):
        add(f"zero_convs.{index}.0", random_convolution(width, width, 1))
    middle = len(weights["middle_block.0.in_layers.0.weight"])
    add("middle_block_out.0", random_convolution(middle, middle, 1))
    widths = (*HINT_WIDTHS, len(weights["input_blocks.0.0.weight"]))
    for index, (width_in, width_out) in enumerate(pairwise(widths)):
        add(f"input_hint_block.{2 * index}", random_convolution(width_in, width_out, 3))
    return {f"control_model.{name}": tensor.contiguous() for name, tensor in weights.items()}


def block_widths(weights: dict[str, Tensor]) -> list[int]:
    """Output channels of every input block."""
    widths = []
    last_layers = ("0.out_layers.3.weight", "0.op.weight", "0.weight")
    while found := [weights[k] for layer in last_layers if (k := f"input_blocks.{len(widths)}.{layer}") in weights]:
        widths.append(len(found[0]))
    return widths


if __name__ == "__main__":
    save_file(control_weights(Path(sys.argv[1])), sys.argv[2])
