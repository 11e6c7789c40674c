"""Write the bench's model as a checkpoint that a real AUTOMATIC1111 WebUI v1.10.1 loads.

    python -m lib_hires.hosts.bench.assemble OUT_DIR

OUT_DIR receives `one-object.safetensors`, `one-object.yaml` beside it (the WebUI finds it by name) and the folder
`one-object-clip` with the tokenizer and the text model's shape, whose absolute path the yaml holds because the WebUI
hands it to transformers. Copying checkpoint and yaml elsewhere is fine as long as the folder stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_hires.hosts.bench import model as bench_model
from lib_hires.hosts.bench.text import text_state_dict, write_tokenizer

NAME = "one-object"


def read_config(weights_dir: Path) -> dict[str, Any]:
    """The values found in training that the architecture does not determine."""
    return json.loads((weights_dir / "config.json").read_text())


def host_config(scale_factor: float, clip_folder: Path) -> dict[str, Any]:
    """The WebUI's model description: SD 1.5's keys with the bench's sizes."""
    return {
        "model": {
            "base_learning_rate": 1.0e-4,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": bench_model.BETA_START,
                "linear_end": bench_model.BETA_END,
                "num_timesteps_cond": 1,
                "log_every_t": 200,
                "timesteps": bench_model.TRAIN_STEPS,
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": bench_model.NATIVE_SIZE // bench_model.LATENT_FACTOR,
                "channels": 4,
                "cond_stage_trainable": False,
                "conditioning_key": "crossattn",
                "monitor": "val/loss_simple_ema",
                "scale_factor": scale_factor,
                "use_ema": False,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": dict(bench_model.UNET_CONFIG),
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {
                        "embed_dim": 4,
                        "monitor": "val/rec_loss",
                        "ddconfig": dict(bench_model.VAE_CONFIG),
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                    "params": {"version": str(clip_folder.resolve())},
                },
            },
        }
    }


def checkpoint_tensors(weights_dir: Path) -> dict[str, Tensor]:
    """All weights in float32 under SD 1.x checkpoint names."""
    sources = (
        ("model.diffusion_model.", load_file(weights_dir / "unet.safetensors")),
        ("first_stage_model.", load_file(weights_dir / "vae.safetensors")),
        ("cond_stage_model.transformer.", text_state_dict()),
    )
    return {
        prefix + name: tensor.float() if tensor.is_floating_point() else tensor
        for prefix, tensors in sources
        for name, tensor in tensors.items()
    }


def assemble(out_dir: Path, weights_dir: Path = bench_model.WEIGHTS_DIR) -> Path:
    """Write checkpoint, description and tokenizer folder; return the checkpoint's path."""
    out_dir.mkdir(parents=True, exist_ok=True)
    clip_folder = out_dir / f"{NAME}-clip"
    write_tokenizer(clip_folder)
    config = host_config(read_config(weights_dir)["scale_factor"], clip_folder)
    (out_dir / f"{NAME}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    checkpoint = out_dir / f"{NAME}.safetensors"
    save_file(checkpoint_tensors(weights_dir), checkpoint)
    checkpoint.chmod(0o644)  # safetensors writes private files
    return checkpoint


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--weights-dir", type=Path, default=bench_model.WEIGHTS_DIR)
    arguments = parser.parse_args()
    print(assemble(arguments.out_dir, arguments.weights_dir))


if __name__ == "__main__":
    main()
