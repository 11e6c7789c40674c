"""Train the bench's model on the CPU, reproducibly from a seed and resumable.

    python -m lib_hires.hosts.bench.train vae --workers 2
    python -m lib_hires.hosts.bench.train latents --workers 2
    python -m lib_hires.hosts.bench.train unet --workers 2
    ./dev bench --rows native,naive --pictures 120

Each of the first three leaves its checkpoint in the run folder and what the bench needs, in half precision, in the
weights folder; the last measures the result. Threads of one process spin on shared cores, so every process has one
thread; `--workers` averages gradients over processes instead.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_hires.hosts.bench import model as bench_model
from lib_hires.hosts.bench import scenes
from lib_hires.hosts.bench.text import TextEncoder

RUN_DIR = Path("out/bench_train")
POOL_SIZE = 20_000
POOL_SEED = 1_000
UNCONDITIONAL_RATE = 0.1
SHAPE_COLOUR_PAIRS = [(shape, colour) for colour in scenes.COLOURS for shape in scenes.SHAPES]


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
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def save_half(module: nn.Module, path: Path) -> None:
    """Write a module's weights in half precision, replacing the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.half().contiguous() for name, tensor in module.state_dict().items()}, partial)
    partial.chmod(0o644)  # safetensors writes private files
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
        self.step, self.seconds, self.last_loss = 0, 0.0, math.nan
        self.checkpoint = settings.run_dir / f"{name}.pt"
        if self.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.last_loss = state["step"], state["seconds"], state["last_loss"]

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
            "last_loss": self.last_loss,
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
        self.last_loss = sum(losses) / len(losses)
        if self.rank == 0:
            pace = f"{self.seconds / self.step:.3f} s/step"
            print(f"{self.name} step {self.step} loss {self.last_loss:.4f} {pace}", flush=True)


def run_summary(trainer: Trainer) -> dict[str, Any]:
    """What a training run was, for the metrics file."""
    settings = trainer.settings
    return {
        "seed": settings.seed,
        "steps": trainer.step,
        "batch": settings.batch * settings.workers,
        "seconds": round(trainer.seconds),
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "last_loss": round(trainer.last_loss, 4),
    }


# ------------------------------------------------------------------------------------------------- initialisation
#
# Group norms in 32 groups see pairs of channels at width 64, and what they remove is learned back late. So a signal x
# starts out as a pair (x + offset, -x - offset), from which the norm subtracts nothing; behind SiLU it is x again,
# because silu(a) - silu(-a) = a. An offset well above x keeps the contrast of x, no offset keeps its mean.


def signed_pairs(convolution: nn.Conv2d, signals: int, tap: Tensor, offset: float, first: int = 0) -> None:
    """Let a convolution put its inputs into channel pairs (x + offset, -x - offset) from channel `first` on."""
    weight, bias = convolution.weight, cast_bias(convolution)
    weight[first : first + 2 * signals] = 0
    for k in range(signals):
        plus, minus = first + 2 * k, first + 2 * k + 1
        weight[plus, k], weight[minus, k] = tap, -tap
        bias[plus], bias[minus] = offset, -offset


def keep_pairs(convolution: nn.Conv2d, signals: int, tap: Tensor, first_input: int = 0) -> None:
    """Let a convolution pass on the pairs that its inputs carry from `first_input` on."""
    weight, bias = convolution.weight, cast_bias(convolution)
    weight[: 2 * signals], bias[: 2 * signals] = 0, 0
    for k in range(2 * signals):
        weight[k, first_input + k] = tap


def read_pairs(convolution: nn.Conv2d, signals: int, tap: Tensor, gain: float, shift: float, first: int = 0) -> None:
    """Let a convolution behind norm and SiLU turn the pairs back into signals times `gain` minus `shift`."""
    weight, bias = convolution.weight, cast_bias(convolution)
    weight[:signals] *= 0.1 if first == 0 else 1
    weight[:signals, first : first + 2 * signals] = 0
    for k in range(signals):
        plus, minus = first + 2 * k, first + 2 * k + 1
        weight[k, plus], weight[k, minus] = gain * tap, -gain * tap
        bias[k] = -shift


def cast_bias(convolution: nn.Conv2d) -> Tensor:
    """The bias of a convolution that has one."""
    assert convolution.bias is not None
    return convolution.bias


def centre_tap(size: int = 3) -> Tensor:
    """A kernel that passes a pixel on."""
    tap = torch.zeros(size, size)
    tap[size // 2, size // 2] = 1
    return tap


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


OFFSET = 2.0
LATENT_GAIN = 3.0


@torch.no_grad()
def start_as_colour_average(autoencoder: Any) -> None:
    """Initialise the autoencoder so that three latent channels hold each patch's mean colour.

    From ordinary random weights colour emerges only after thousands of steps.
    """
    centre, mean = centre_tap(), torch.zeros(3, 3)
    mean[:2, :2] = 0.25
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    signed_pairs(encoder.conv_in, 3, centre, OFFSET)
    signed_pairs(decoder.conv_in, 3, centre * OFFSET / LATENT_GAIN, OFFSET)
    for name, module in autoencoder.named_modules():
        if name.endswith(("downsample.conv", "upsample.conv")):
            keep_pairs(module, 3, mean if "down" in name else centre)
        elif name.endswith(("conv2", "proj_out")):
            module.weight[:6], module.bias[:6] = 0, 0
    read_pairs(encoder.conv_out, 3, centre, LATENT_GAIN, LATENT_GAIN)
    encoder.conv_out.weight[4:], encoder.conv_out.bias[4:] = 0, -5  # small posterior variance
    read_pairs(decoder.conv_out, 3, centre, OFFSET, OFFSET)
    for convolution in (autoencoder.quant_conv, autoencoder.post_quant_conv):
        convolution.weight.copy_(torch.eye(len(convolution.weight))[:, :, None, None])
        convolution.bias.zero_()


def build_initial_vae() -> nn.Module:
    """The autoencoder as training starts with it."""
    autoencoder = bench_model.build_autoencoder()
    start_as_colour_average(autoencoder)
    return autoencoder


def vae_loss(autoencoder: Any, images: Tensor, generator: torch.Generator) -> Tensor:
    """Pixel and edge errors plus a KL term just large enough to keep latents bounded and smooth."""
    target = images * 2 - 1
    posterior = autoencoder.encode(target)
    mean, std = posterior.mean.float(), posterior.std.float()
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    output = autoencoder.decode(latents).float()
    error = output - target
    divergence = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
    # The squared error leads: to absolute errors alone the median, grey, is a good guess for a colour.
    return 6 * (error**2).mean() + 0.5 * error.abs().mean() + 0.5 * edge_loss(output, target) + 1e-4 * divergence


def train_vae(settings: Settings, rank: int) -> None:
    """Train the autoencoder and store the factor that scales its latents to unit deviation."""
    trainer = Trainer("vae", build_initial_vae, settings, rank)

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
    quality = {f"{factor}x": round(reconstruction_psnr(vae, factor, 32 // factor), 2) for factor in (1, 2, 4)}
    print("psnr_db", quality, "scale_factor", scale_factor, flush=True)
    summary = {**run_summary(trainer), "psnr_db": quality}
    update_json(settings.weights_dir / "metrics.json", vae=summary)


def reconstruction_psnr(vae: bench_model.Vae, factor: int, count: int) -> float:
    """PSNR in dB of scenes at `factor` times the native size after encoding and decoding."""
    size = factor * bench_model.NATIVE_SIZE
    images = scenes.render_batch(scenes.sample_scenes(8, count), size, size)
    return psnr(vae.decode(vae.encode(images)), images)


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in 0..1."""
    return -10 * math.log10(float(F.mse_loss(image, reference)))


# ------------------------------------------------------------------------------------------------------- latents


def encode_pool(settings: Settings, rank: int) -> None:
    """Encode this worker's share of the training scenes, so that the UNet's training never waits for the encoder."""
    share = POOL_SIZE // settings.workers
    source = scenes.sample_scenes(POOL_SEED + settings.seed, POOL_SIZE)[rank * share : (rank + 1) * share]
    vae = bench_model.load_vae(settings.weights_dir)
    size = bench_model.NATIVE_SIZE
    parts = [vae.encode(scenes.render_batch(source[i : i + 32], size, size)) for i in range(0, len(source), 32)]
    pairs = torch.tensor([SHAPE_COLOUR_PAIRS.index((scene.shape, scene.colour)) for scene in source])
    torch.save({"latents": torch.cat(parts), "pairs": pairs}, settings.run_dir / f"pool-{rank}.pt")


def load_pool(run_dir: Path) -> tuple[Tensor, Tensor]:
    """All encoded scenes: latents (N,4,16,16) and the number of their shape and colour (N,)."""
    parts = [torch.load(path, weights_only=True) for path in sorted(run_dir.glob("pool-*.pt"))]
    return torch.cat([part["latents"] for part in parts]), torch.cat([part["pairs"] for part in parts])


def encode_captions() -> Tensor:
    """Encodings of every caption in every form, (forms*24 + 1, 77, C); the last is the empty prompt's."""
    captions = [
        form.format(shape=shape, colour=colour) for form in scenes.CAPTION_FORMS for shape, colour in SHAPE_COLOUR_PAIRS
    ]
    return TextEncoder().encode([*captions, ""])


# ---------------------------------------------------------------------------------------------------------- UNet


@dataclass(frozen=True)
class Denoising:
    """The UNet's task: predict the noise in a scene's latents from its caption."""

    latents: Tensor
    pairs: Tensor
    contexts: Tensor
    alphas: Tensor
    batch: int

    def pick_contexts(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Encodings of the rows' captions in a random form, (B,77,C); some are the empty prompt's."""
        forms = torch.randint(len(scenes.CAPTION_FORMS), rows.shape, generator=generator)
        captions = forms * len(SHAPE_COLOUR_PAIRS) + self.pairs[rows]
        dropped = torch.rand(rows.shape, generator=generator) < UNCONDITIONAL_RATE
        return self.contexts[torch.where(dropped, len(self.contexts) - 1, captions)]

    def loss(self, unet: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        """Weighted mean squared error of the predicted noise at random times."""
        rows = torch.randint(len(self.latents), (self.batch,), generator=generator)
        times = torch.randint(bench_model.TRAIN_STEPS, (self.batch,), generator=generator)
        clean = self.latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        alpha = self.alphas[times][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        predicted = unet(noisy, times, context=self.pick_contexts(rows, generator))
        # An error at time t moves the predicted picture by its noise level, so layout is decided where levels are high.
        weight = ((1 - alpha) / alpha).sqrt().clamp(0.3, 3)
        return (weight * (predicted.float() - noise) ** 2).mean()


@torch.no_grad()
def start_as_identity(unet: Any) -> None:
    """Initialise the UNet to predict its input as the noise, which is right for the noisiest steps.

    The input takes the outermost skip connection; the blocks' zero-initialised outputs add nothing at first. Its
    contrast must survive the last norm exactly: a starting noise 2 % stronger than usual would else leave a third of a
    latent's deviation as grain. Two pairs with opposite offsets keep it; what one loses by the mean the other gains.
    """
    offset, signals = 3.0, 4
    first_conv, skip, last_conv = unet.input_blocks[0][0], unet.output_blocks[-1][0].skip_connection, unet.out[-1]
    for first, shift in ((0, offset), (2 * signals, -offset)):
        signed_pairs(first_conv, signals, centre_tap(), shift, first)
        read_pairs(last_conv, signals, centre_tap(), math.hypot(offset, 1) / 2, 0, first)
    keep_pairs(skip, 2 * signals, centre_tap(1), first_input=unet.model_channels)


def build_initial_unet() -> nn.Module:
    """The UNet as training starts with it."""
    unet = bench_model.build_unet()
    start_as_identity(unet)
    return unet


def train_unet(settings: Settings, rank: int) -> None:
    """Train the UNet on the encoded scenes."""
    latents, pairs = load_pool(settings.run_dir)
    task = Denoising(latents, pairs, encode_captions(), bench_model.alphas_cumprod(), settings.batch)
    trainer = Trainer("unet", build_initial_unet, settings, rank)
    trainer.run(task.loss)
    if rank == 0:
        update_json(settings.weights_dir / "metrics.json", unet=run_summary(trainer))


# -------------------------------------------------------------------------------------------------- command line

COMMANDS: dict[str, Callable[[Settings, int], None]] = {
    "vae": train_vae,
    "latents": encode_pool,
    "unet": train_unet,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "vae": {"steps": 1400, "batch": 16, "ema_decay": 0.995, "warmup": 50, "save_every": 200},
    "unet": {"steps": 1300, "batch": 16, "ema_decay": 0.999, "warmup": 100, "save_every": 250},
}


def worker(rank: int, command: str, settings: Settings) -> None:
    """Run one process of a training run."""
    torch.set_num_threads(1)
    if settings.workers > 1:
        store = f"file://{(settings.run_dir / 'rendezvous').absolute()}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=settings.workers)
    COMMANDS[command](settings, rank)


def parse_arguments() -> tuple[str, Settings]:
    """Read the command and its settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, help="length of the run and of its learning-rate schedule")
    parser.add_argument("--batch", type=int, help="images per step and worker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR)
    parser.add_argument("--weights-dir", type=Path, default=bench_model.WEIGHTS_DIR)
    options = vars(parser.parse_args())
    command = options.pop("command")
    defaults = DEFAULTS.get(command, DEFAULTS["unet"]) | {"learning_rate": 1.5e-3, "weight_decay": 1e-4}
    given = {name: value for name, value in options.items() if value is not None}
    return command, Settings(**{**defaults, **given})


def main() -> None:
    """Entry point."""
    command, settings = parse_arguments()
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    (settings.run_dir / "rendezvous").unlink(missing_ok=True)
    if settings.workers > 1:
        mp.spawn(worker, (command, settings), nprocs=settings.workers)
    else:
        worker(0, command, settings)


if __name__ == "__main__":
    main()
