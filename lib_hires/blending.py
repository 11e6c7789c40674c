"""How two latents are blended, and how the share of each changes over a run.

Shares are those of the reference (the upscaled picture); the running sample has the rest. With p the position in the
run (see progress.py) and b where the curve ends, the share falls as

    cosine     [(1 + cos(pi p / b)) / 2]^alpha          = cos^2(pi p / 2b)^alpha
    linear     1 - p / b
    logistic   1 - 1 / (1 + exp(-5 alpha (p - m)))      m half way between start and stop

and is 1 before start and 0 beyond stop. A stop above 1 stretches the curve, so that some of the reference stays until
the end. ComfyUI's node writes the cosine as the sample's rising share, which leaves 1 - sin^2(pi p / 2b)^alpha for the
reference. The two agree at alpha 1 only; away from it alpha acts in opposite directions.

References: DemoFusion (Du et al. 2024, skip residual, eq. 4), FreeScale (Qiu et al. 2025, eq. 4), ComfyUI's Iterative
Mixing nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_hires.precision import working_dtype

COSINE, LINEAR, LOGISTIC = "Cosine", "Linear", "Logistic"
SCHEDULES = (COSINE, LINEAR, LOGISTIC)
ADDITION, SLERP, NORM_ONLY = "Addition", "Slerp", "Norm only"
FUNCTIONS = (ADDITION, SLERP, NORM_ONLY)

Share = float | Tensor  # a number, or one per cell [B, 1, h, w]

_SMALLEST_SINE = 1e-4  # nearly parallel or opposed latents have no arc worth following


@dataclass(frozen=True)
class BlendingSchedule:
    """The reference's share over positions 0 to 1 of a run.

    `start`, `stop` and `clamp` are positions: up to `start` the share is whole, beyond `stop` and from `clamp` on there
    is none. `minimum` and `maximum` then become the ends of the scale. `node_weights`: ComfyUI's form of the cosine.
    """

    kind: str = COSINE
    start: float = 0.0
    stop: float = 1.0
    clamp: float = math.inf
    minimum: float = 0.0
    maximum: float = 1.0
    node_weights: bool = False

    def share(self, position: float, alpha: Share) -> Share:
        """The reference's share at a position, for a number alpha or a map [B, 1, h, w]."""
        return self.minimum + (self.maximum - self.minimum) * self._falling(position, alpha)

    def _falling(self, position: float, alpha: Share) -> Share:
        if position >= self.clamp:
            return 0.0
        if position < self.start:
            return 1.0
        if position > self.stop or self.stop <= 0:
            return 0.0
        if self.kind == LINEAR:
            return 1 - position / self.stop
        if self.kind == LOGISTIC:
            return _sigmoid((5 * ((self.start + self.stop) / 2 - position)) * alpha)
        quarter = math.pi * position / (2 * self.stop)
        sine, cosine = math.sin(quarter) ** 2, math.cos(quarter) ** 2
        return 1 - sine**alpha if self.node_weights else cosine**alpha


def _sigmoid(x: Share) -> Share:
    if isinstance(x, Tensor):
        return torch.sigmoid(x)
    return 0.5 * (1 + math.tanh(x / 2))  # does not overflow


def blended(reference: Tensor, sample: Tensor, share: Share, function: str = ADDITION) -> Tensor:
    """Blend latents [B, C, h, w] of one space and one noise level; `share` is the reference's. In `sample`'s dtype.

    Share 0 returns `sample` itself. Addition and slerp give exactly the reference at share 1. Norms and angles are
    taken per picture, over channels and cells.
    """
    if not isinstance(share, Tensor) and share == 0:
        return sample
    dtype = working_dtype(sample)
    a, b = reference.to(sample.device, dtype), sample.to(dtype)
    if isinstance(share, Tensor):
        share = share.to(sample.device, dtype)
    return _FUNCTIONS[function](a, b, share).to(sample.dtype)


def _addition(reference: Tensor, sample: Tensor, share: Share) -> Tensor:
    return torch.lerp(sample, reference, share)


def _slerp(reference: Tensor, sample: Tensor, share: Share) -> Tensor:
    """Along the arc between two latents; the straight line where they point the same or the opposite way.

    The angle is 2 atan2(|u - v|, |u + v|) of the unit vectors u, v, which stays exact where acos(<u, v>) does not.
    """
    u, v = (x / _norm(x).clamp(min=1e-30) for x in (reference, sample))
    angle = 2 * torch.atan2(_norm(u - v), _norm(u + v))
    sine = torch.sin(angle)
    flat = sine < _SMALLEST_SINE
    sine = sine.masked_fill(flat, 1.0)
    of_reference = torch.where(flat, share, torch.sin(share * angle) / sine)
    of_sample = torch.where(flat, 1 - share, torch.sin((1 - share) * angle) / sine)
    return of_reference * reference + of_sample * sample


def _norm_only(reference: Tensor, sample: Tensor, share: Share) -> Tensor:
    """The straight line to the sample at the reference's length: mixes what is in the latents, not how loud it is."""
    scaled = sample * (_norm(reference) / _norm(sample).clamp(min=1e-30))
    return torch.lerp(scaled, reference, share)


def _norm(x: Tensor) -> Tensor:
    """Length over all but the batch, [B, 1, 1, 1]."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)


_FUNCTIONS = {ADDITION: _addition, SLERP: _slerp, NORM_ONLY: _norm_only}
