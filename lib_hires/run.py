"""The facts of one sampling run, and of one denoiser call inside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lib_hires.noise import NoiseSchedule
from lib_hires.samplers import Sampler
from lib_hires.topology import UNetTopology

Size = tuple[int, int]  # (height, width)

FIRST_PASS, HIRES_PASS, IMG2IMG_PASS = "first pass", "hires pass", "img2img"
EPS, V, FLOW = "eps", "v", "flow"  # what a model predicts; flow: x = (1 - sigma) x0 + sigma noise
X0, LCM, IMG_TO_IMG = "x0", "lcm", "img_to_img"  # what a user can say of a model whose host cannot tell
COND, UNCOND, PERTURBED = "cond", "uncond", "perturbed"  # what one batch row of a UNet evaluation predicts


@dataclass(frozen=True)
class ModelFacts:
    """What the host knows of the loaded model."""

    family: str  # for people: "SD 1.x", "SDXL", "SD3" ...
    native: Size  # latent cells of the size that the model was trained for
    schedule: NoiseSchedule
    unet: UNetTopology | None  # None: not a UNet of the LDM family (a DiT, or a compiled replacement)
    no_unet_reason: str = "this model is not a UNet"
    prediction: str = EPS
    no_guidance_reason: str = ""  # why the combination of cond and uncond is out of reach; empty: it is not
    trained_schedule: NoiseSchedule | None = None  # where the host has rescaled the table to zero terminal SNR: before


@dataclass(frozen=True)
class Start:
    """What a hires or img2img pass begins from: the clean latent [B, C, h, w] (x0) of the picture that it refines, at
    this pass's size, and the host's own unit noise for it, which the pass's first noisy latent was made with."""

    latent: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Run:
    """One sampling run of one pass. Immutable.

    `sigmas` are the run's noise levels as planned by the sampler, in VE scaling, highest first where the sampler says
    them; adaptive samplers give only their range, and while a run is prepared they are the model's range. `seeds` are
    those of the batch's pictures. `start` is None where the pass begins from noise alone. `mask` is the mask [B or 1,
    C or 1, h, w] of an inpainting run, 1 = repaint; `other_scripts` are the titles of other extensions
    that are switched on.
    """

    host: str
    pass_name: str
    model: ModelFacts
    latent: Size
    sigmas: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    sampler: Sampler = field(default_factory=Sampler)
    start: Start | None = None
    hires_follows: bool = False  # a first pass whose picture a hires pass goes on with
    stage: str = ""  # which stage of a divided hires pass, for people: "stage 2 of 3"
    mask: Tensor | None = None
    other_scripts: tuple[str, ...] = ()

    @property
    def sigma_first(self) -> float:
        return max(self.sigmas)

    @property
    def lists_steps(self) -> bool:
        """Whether `sigmas` are the run's steps one by one; adaptive samplers give only the ends of their range."""
        return len(self.sigmas) > 2 or self.sigmas[-1] == 0

    def elapsed(self, sigma: float) -> float:
        """The fraction of this pass that lies behind at noise level sigma, in training time.

        0 at the pass's own first sigma, 1 at sigma 0. A pass that starts at full noise thus counts like ComfyUI's
        percent; a hires pass with denoise 0.5 counts its own half from 0 to 1.
        """
        first = self.model.schedule.timestep(self.sigma_first)
        if first <= 0:
            return 0.0
        return min(max(1.0 - self.model.schedule.timestep(sigma) / first, 0.0), 1.0)

    def sigma_at(self, fraction: float) -> float:
        """Noise level at an elapsed fraction. Inverse of `elapsed`; infinity at 0 and 0 at 1, so bounds include all."""
        if fraction <= 0:
            return float("inf")
        if fraction >= 1:
            return 0.0
        schedule = self.model.schedule
        return schedule.sigma(schedule.timestep(self.sigma_first) * (1 - fraction))


class Row(NamedTuple):
    """One batch row of a UNet evaluation: what it predicts, and for which picture of the batch, counted from 0.

    A picture has several cond rows where its prompt is composed (AND) or regional. None: the host does not tell.
    """

    predicts: str
    picture: int | None = None


@dataclass
class Call:
    """One evaluation of the denoiser inside a run.

    `sizes` holds the true (height, width) of the feature map inside each UNet block, by (side, index), filled while
    the UNet runs: techniques that work on tokens read it and never guess a size from a token count. `rows` are the
    batch rows of the UNet evaluation in progress, in their order; hosts set them where a site needs them.
    """

    sigma: float
    step: int
    sizes: dict[tuple[str, int], Size] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    def rows_of(self, kind: str) -> list[int]:
        """Batch rows of the evaluation in progress that predict `kind`."""
        return [number for number, row in enumerate(self.rows) if row.predicts == kind]
