"""What inpainting with soft masks does on the bench: how much each grey changes, what black keeps, and seams.

    ./dev python -m lib_hires.hosts.bench.inpaint --pictures 24

Each picture of one object is inpainted with another object's prompt, in four ways: the host's rounded mask, the plain
soft mask, the hosts' Soft Inpainting (its documented formula, see blend.py; without its composite in pixels), and
Differential Diffusion. Measured on what the latents decode to, as each way's latents are; no original pixels are laid
over the result.

* Change: mean |latent - latent of the original| over the cells of each mask value, which stand at every place in turn.
* Black: the number of latent values under mask 0 that are not the original's bits.
* Seam: a vertical edge, half a picture kept and half free, with a soft border. The mean squared jump between
  neighbouring pixels that the original does not have, in the worst column; means over pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_hires.generation import Generation
from lib_hires.hosts.bench.blend import HARD, SOFT, SOFT_INPAINTING
from lib_hires.hosts.bench.model import LATENT_FACTOR, NATIVE_SIZE, load_models
from lib_hires.hosts.bench.pipeline import Bench, Request
from lib_hires.hosts.bench.scenes import COLOURS, SHAPES, balanced_scenes, caption, render_batch
from lib_hires.registry import BY_NAME

DIFFERENTIAL = "differential diffusion"
VALUES = 8  # mask values of a ramp: bands of two cells at native size
BORDER = 6  # cells from black to white at the soft edge
_BATCH = 4


@dataclass(frozen=True)
class Pictures:
    """Originals [B, 3, H, W] in 0..1, and the prompt and seed of what is to be painted into each."""

    images: Tensor
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass
class Measures:
    """Of one way to blend."""

    change: list[float]  # by rising mask value
    black_changed: int
    seam: float

    @property
    def monotone(self) -> bool:
        return all(a <= b for a, b in zip(self.change, self.change[1:], strict=False))


def sample_pictures(count: int, size: int = NATIVE_SIZE, seed: int = 0) -> Pictures:
    """Originals of every shape and colour in turn, to be painted over with the next shape and another colour."""
    scenes = balanced_scenes(seed, count)
    colours = list(COLOURS)
    others = [
        f"a {colours[(colours.index(s.colour) + 3) % len(colours)]} {SHAPES[(SHAPES.index(s.shape) + 1) % len(SHAPES)]}"
        for s in scenes
    ]
    assert all(caption(scene) != other for scene, other in zip(scenes, others, strict=True))
    return Pictures(render_batch(scenes, size, size), tuple(others), tuple(range(1000, 1000 + count)))


def ramps(size: int, values: int = VALUES) -> Tensor:
    """Masks [values, 1, size, size] of vertical bands from 0 to 1, rolled until every value was at every place: what is
    painted differs from place to place, and must not be taken for what the mask does."""
    bands = torch.linspace(0, 1, values)
    rolled = [bands.roll(shift).repeat_interleave(size // values).expand(size, size) for shift in range(values)]
    return torch.stack(rolled)[:, None]


def soft_edge(size: int, border: int = BORDER) -> Tensor:
    """A mask [1, 1, size, size]: black on the left, white on the right, `border` latent cells from one to the other."""
    cells = size // LATENT_FACTOR
    place = torch.arange(cells) + 0.5 - cells / 2
    return (place / border + 0.5).clamp(0, 1).repeat_interleave(LATENT_FACTOR).expand(1, 1, size, size)


def measure(bench: Bench, pictures: Pictures, steps: int = 20, denoise: float = 0.9) -> dict[str, Measures]:
    """Every way on every picture, by its name."""
    ways = {kind: (kind, Generation()) for kind in (HARD, SOFT, SOFT_INPAINTING)}
    name = "differential_diffusion"
    ways[DIFFERENTIAL] = (SOFT, Generation({name: BY_NAME[name].settings()}))
    job = _Job(bench, pictures, steps, denoise)
    return {title: job.measures(kind, generation) for title, (kind, generation) in ways.items()}


class _Job:
    def __init__(self, bench: Bench, pictures: Pictures, steps: int, denoise: float) -> None:
        self._bench, self._pictures = bench, pictures
        self._steps, self._denoise = steps, denoise
        self._size = int(pictures.images.shape[-1])
        with torch.inference_mode():
            self._clean = bench.models.vae.encode(pictures.images)
            self._decoded = bench.models.vae.decode(self._clean)

    def measures(self, kind: str, generation: Generation) -> Measures:
        change, black = torch.zeros(VALUES, dtype=torch.float64), 0
        masks = ramps(self._size)
        for mask in masks:
            latents, _ = self._paint(mask[None], kind, generation)
            differs = (latents - self._clean).abs().mean((0, 1))
            small = F.interpolate(mask[None], size=differs.shape, mode="area")[0, 0]
            for index, value in enumerate(small.unique()):
                change[index] += differs[small == value].double().mean() / len(masks)
            black += int((latents != self._clean)[:, :, small == 0].sum())
        _, images = self._paint(soft_edge(self._size), kind, generation)
        return Measures(change.tolist(), black, seam_energy(images, self._decoded))

    def _paint(self, mask: Tensor, kind: str, generation: Generation) -> tuple[Tensor, Tensor]:
        results = []
        for first in range(0, len(self._pictures.seeds), _BATCH):
            part = slice(first, first + _BATCH)
            request = Request(
                prompts=self._pictures.prompts[part],
                seeds=self._pictures.seeds[part],
                width=self._size,
                height=self._size,
                steps=self._steps,
                init_images=self._pictures.images[part],
                denoise=self._denoise,
                mask=mask,
                blend=kind,
            )
            results.append(self._bench.generate(request, generation))
        return torch.cat([r.latents for r in results]), torch.cat([r.images for r in results])


def seam_energy(images: Tensor, originals: Tensor) -> float:
    """The mean squared jump to the next pixel on the right that the original has not, in the worst column."""
    jumps = (images.diff(dim=-1) - originals.diff(dim=-1)).square().mean((1, 2))
    return float(jumps.amax(dim=-1).mean())


def table(measured: Mapping[str, Measures]) -> str:
    lines = [f"{'way':24}{'seam':>10}  {'black':>6}  {'monotone':>8}  mean change by mask value"]
    for title, m in measured.items():
        change = " ".join(f"{value:.2f}" for value in m.change)
        lines.append(f"{title:24}{m.seam:10.5f}  {m.black_changed:6d}  {'yes' if m.monotone else 'no':>8}  {change}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures inpainting with soft masks.")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--denoise", type=float, default=0.9)
    options = parser.parse_args()
    bench = Bench(load_models())
    print(table(measure(bench, sample_pictures(options.pictures), options.steps, options.denoise)))


if __name__ == "__main__":
    main()
