"""Train the bench's model on the CPU, reproducibly from a seed and resumable.

    python -m lib_hires.hosts.bench.train vae --workers 2
    python -m lib_hires.hosts.bench.train latents
    python -m lib_hires.hosts.bench.train unet
    python -m lib_hires.hosts.bench.train measure

Each step leaves its checkpoint in the run folder and what the bench needs, in half precision, in the weights folder.
Threads of one process spin on shared cores, so every process has one thread; `--workers` averages gradients over
processes instead.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib_hires.hosts.bench import model as bench_model
from lib_hires.hosts.bench import scenes

RUN_DIR = Path("out/bench_train")


@dataclass(frozen=True)
class Settings:
    """Everything a training run depends on; `steps` fixes the learning-rate schedule."""

    seed: int
    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    warmup: int
    ema_decay: float
    workers: int
    save_every: int
    run_dir: Path
    weights_dir: Path


# ---------------------------------------------------------------------------------------------- shared machinery


def learning_rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warm = min(1.0, (step + 1) / settings.warmup)
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def step_generator(settings: Settings, step: int, rank: int) -> torch.Generator:
    """A generator that depends on the step alone, so that a resumed run draws what an unbroken one would."""
    return torch.Generator().manual_seed((settings.seed * 1_000_003 + step) * 64 + rank)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the weights that warms up: early weights are forgotten fast."""
    keep = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in module.parameters()], 1 - keep)


def average_gradients(parameters: list[nn.Parameter], workers: int) -> None:
    """Average the gradients over all workers in one transfer."""
    if workers == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= workers
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def save_half(module: nn.Module, path: Path) -> None:
    """Write a module's weights in half precision, replacing the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.half().contiguous() for name, tensor in module.state_dict().items()}, partial)
    partial.replace(path)


def update_json(path: Path, **entries: Any) -> None:
    """Merge entries into a JSON object on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **entries}, indent=2, sort_keys=True) + "\n")


class Trainer:
    """The optimisation loop that autoencoder and UNet share: AdamW, clipping, averaging, checkpoints."""

    def __init__(self, name: str, build: Callable[[], nn.Module], settings: Settings, rank: int):
        self.name, self.settings, self.rank = name, settings, rank
        torch.manual_seed(settings.seed)
        self.module, self.average = build().train(), build().eval().requires_grad_(False)
        self.average.load_state_dict(self.module.state_dict())
        self.parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True
        )
        self.step, self.seconds = 0, 0.0
        self.checkpoint = settings.run_dir / f"{name}.pt"
        if self.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write the resumable checkpoint and the averaged weights that the bench loads."""
        if self.rank:
            return
        self.settings.run_dir.mkdir(parents=True, exist_ok=True)
        state = {
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)
        save_half(self.average, self.settings.weights_dir / f"{self.name}.safetensors")

    def run(self, loss_of: Callable[[nn.Module, int, torch.Generator], Tensor]) -> None:
        """Train to the last step with `loss_of(module, step, generator)`."""
        losses: list[float] = []
        while self.step < self.settings.steps:
            started = time.perf_counter()
            losses.append(self._one_step(loss_of))
            self.seconds += time.perf_counter() - started
            self.step += 1
            if self.step % 50 == 0:
                self._report(losses)
                losses = []
            if self.step % self.settings.save_every == 0:
                self.save()
        self.save()

    def _one_step(self, loss_of: Callable[[nn.Module, int, torch.Generator], Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.settings)
        generator = step_generator(self.settings, self.step, self.rank)
        # bfloat16 halves the step time on processors with AVX512-BF16 and does not change the loss visibly.
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(self.module, self.step, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.parameters, self.settings.workers)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        update_average(self.average, self.module, self.step, self.settings.ema_decay)
        return float(loss.detach())

    def _report(self, losses: list[float]) -> None:
        if self.rank == 0:
            mean = sum(losses) / len(losses)
            print(f"{self.name} step {self.step} loss {mean:.4f} {self.seconds / self.step:.3f} s/step", flush=True)


# --------------------------------------------------------------------------------------------------- autoencoder


def zoomed_window(scene: scenes.Scene, crop: int, generator: torch.Generator) -> scenes.Window:
    """A crop around the object out of a render between 0.9 and 5 times the native size.

    An object at 2x and 4x looks like a zoom to a convolution, and must decode as well as one at the native size.
    """
    zoom, shift_x, shift_y = torch.rand(3, generator=generator).tolist()
    frame = bench_model.NATIVE_SIZE * 0.9 * (5 / 0.9) ** zoom
    side = min(1.0, crop / frame)
    reach = 1.3 * scene.radius

    def start(centre: float, shift: float) -> float:
        return min(max(centre + (2 * shift - 1) * reach - side / 2, 0.0), 1 - side)

    return scenes.Window(start(scene.centre_y, shift_y), start(scene.centre_x, shift_x), side, side)


def vae_batch(step: int, batch: int, generator: torch.Generator) -> Tensor:
    """Images for one step: mostly 64 px zooms, regularly whole frames of 128 and 256 px for the global layers."""
    if step % 8 == 1:
        return scenes.render_batch(scenes.sample_scenes(generator, max(1, batch // 16)), 256, 256)
    if step % 4 == 3:
        return scenes.render_batch(scenes.sample_scenes(generator, max(1, batch // 4)), 128, 128)
    crops = scenes.sample_scenes(generator, batch)
    return scenes.render_batch(crops, 64, 64, [zoomed_window(scene, 64, generator) for scene in crops])


def edge_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L1 distance of the horizontal and vertical differences."""
    error = prediction - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def vae_loss(autoencoder: Any, images: Tensor, generator: torch.Generator) -> Tensor:
    """Pixel and edge errors plus a KL term just large enough to keep latents bounded and smooth."""
    target = images * 2 - 1
    posterior = autoencoder.encode(target)
    mean, std = posterior.mean.float(), posterior.std.float()
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    output = autoencoder.decode(latents).float()
    error = output - target
    divergence = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
    return error.abs().mean() + 2 * (error**2).mean() + edge_loss(output, target) + 2e-4 * divergence


def train_vae(settings: Settings, rank: int) -> None:
    """Train the autoencoder and store the factor that scales its latents to unit deviation."""
    trainer = Trainer("vae", bench_model.build_autoencoder, settings, rank)

    def loss_of(module: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        return vae_loss(module, vae_batch(step, settings.batch, generator), generator)

    trainer.run(loss_of)
    if rank == 0:
        finish_vae(settings, trainer)


def finish_vae(settings: Settings, trainer: Trainer) -> None:
    """Measure the averaged autoencoder: scale factor of its latents, PSNR at 1x, 2x and 4x."""
    pool = scenes.render_batch(scenes.sample_scenes(7, 256), bench_model.NATIVE_SIZE, bench_model.NATIVE_SIZE)
    raw = bench_model.Vae(trainer.average, 1.0).encode(pool)
    scale_factor = round(1 / float(raw.std()), 5)
    update_json(settings.weights_dir / "config.json", scale_factor=scale_factor)
    vae = bench_model.Vae(trainer.average, scale_factor)
    metrics = {"steps": trainer.step, "seconds": round(trainer.seconds), "seed": settings.seed, "psnr_db": {}}
    for factor, count in ((1, 32), (2, 16), (4, 4)):
        size = factor * bench_model.NATIVE_SIZE
        images = scenes.render_batch(scenes.sample_scenes(8, count), size, size)
        metrics["psnr_db"][f"{factor}x"] = round(psnr(vae.decode(vae.encode(images)), images), 2)
    print(metrics, "scale_factor", scale_factor, flush=True)
    update_json(settings.weights_dir / "metrics.json", vae=metrics)


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in 0..1."""
    return -10 * math.log10(float(F.mse_loss(image, reference)))


# -------------------------------------------------------------------------------------------------- command line


def worker(rank: int, command: str, settings: Settings) -> None:
    """Run one process of a training run."""
    torch.set_num_threads(1)
    if settings.workers > 1:
        store = f"file://{(settings.run_dir / 'rendezvous').absolute()}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=settings.workers)
    {"vae": train_vae}[command](settings, rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["vae"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR)
    parser.add_argument("--weights-dir", type=Path, default=bench_model.WEIGHTS_DIR)
    a = parser.parse_args()
    a.run_dir.mkdir(parents=True, exist_ok=True)
    (a.run_dir / "rendezvous").unlink(missing_ok=True)
    s = Settings(0, a.steps, 16, 1e-3, 1e-4, 50, 0.995, a.workers, 200, a.run_dir, a.weights_dir)
    mp.spawn(worker, (a.command, s), nprocs=a.workers) if a.workers > 1 else worker(0, a.command, s)


if __name__ == "__main__":
    main()
