"""Self-attention guidance (SAG): move away from a prediction that saw its most attended spots blurred.

A = softmax(Q K^T / sqrt(d)) is the self-attention of the middle block for uncond. The attention that a key receives,
averaged over heads and summed over queries, is 1 on average; the mask M marks the keys that receive more. With u the
uncond prediction, G a Gaussian blur and r the guided result,

    D = M G(u) + (1 - M) u                only what the model looks at is degraded
    s = model(x + alpha (D - u), sigma)   the same noise over a degraded picture, predicted once more as uncond
    out = r + scale (D - s)               in x0 space: for eps it is r + scale (eps_u - eps_s)

alpha is 1 where x = x0 + sigma noise, and 1 - sigma for a flow model. Without CFG there is no u, and cond takes its
place throughout. A picture of several prompts (AND) then has several maps A. No reference says how they go together: we
take their mean, for any of them is a part of the picture that the model looks at, whatever weight its prompt has, also
below 0. The mask is as large as the middle block's map and is enlarged to the latent, nearest neighbour. The
blur is defined on any map, so latents of 4 cells and less, which ComfyUI leaves alone, are no exception here.

Reference: Hong et al. 2023, "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance", arXiv
2210.00939; ComfyUI's SelfAttentionGuidance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_hires.attention_blocks import layer_names
from lib_hires.blur import gaussian_blur
from lib_hires.precision import full_precision
from lib_hires.run import COND, FLOW, UNCOND, Call, Row, Run
from lib_hires.settings import Settings, number, passes_choice, toggle, window_end, window_start
from lib_hires.sites import Guidance, Place, Predictions, Projections, RecordedAttention
from lib_hires.technique import Patch, Refusal, Rest, Technique, unet_of
from lib_hires.topology import MIDDLE, AttentionLayer
from lib_hires.window import Windowed

COMFYUI_RADIUS = 4  # its kernel has 9 taps whatever the sigma
_CHUNK = 2**23  # attention weights held at once: 32 MiB before and 32 MiB after the softmax


@dataclass(frozen=True)
class SagSettings(Windowed, Settings):
    scale: float = number(
        0.5, -2.0, 5.0, 0.01,
        label="Scale",
        help="How far to move away from the blurred prediction. 0.5 to 1 is usual; lower the CFG scale a little. "
        "0 does nothing, below 0 softens.",
    )  # fmt: skip
    blur_sigma: float = number(
        2.0, 0.0, 10.0, 0.1,
        label="Blur sigma",
        help="How strongly the attended spots are blurred, in latent cells (8 pixels). 0 does nothing.",
    )  # fmt: skip
    threshold: float = number(
        1.0, 0.0, 4.0, 0.05,
        label="Threshold",
        help="Spots that receive more attention than this are blurred; 1 is the average. Lower blurs more of the "
        "picture, 0 all of it.",
    )  # fmt: skip
    comfyui_kernel: bool = toggle(
        False,
        label="ComfyUI kernel",
        help="Blurs with ComfyUI's kernel of 9 taps, which is weaker than Blur sigma says above 1.5. Switch it on to "
        "get ComfyUI's pictures.",
    )
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()


@torch.no_grad()
def received_attention(q: Tensor, k: Tensor, heads: int, chunk: int = _CHUNK) -> Tensor:
    """What each key receives of softmax(q k^T / sqrt(d)), [B, M], averaged over heads and summed over queries.

    q [B, N, heads * d], k [B, M, heads * d]. In float32, whatever q and k are. Queries go through in pieces, so that at
    most about `chunk` attention weights are held at once.
    """
    return torch.stack([_received(*row, heads, chunk) for row in zip(q, k, strict=True)])


def _received(q: Tensor, k: Tensor, heads: int, chunk: int) -> Tensor:
    """The same for one row: q [N, heads * d], k [M, heads * d] -> [M]."""
    q, k = (t.float().unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k))
    q = q / math.sqrt(q.shape[-1])
    received = torch.zeros(k.shape[1], device=k.device)
    with full_precision(k):
        for queries in q.split(max(1, chunk // (heads * k.shape[1])), dim=1):
            received += (queries @ k.mT).softmax(dim=-1).sum(dim=(0, 1))
    return received / heads


def degraded(base: Tensor, mask: Tensor, sigma: float, radius: int | None = None) -> Tensor:
    """D of the module's formula for x0 [B, C, h, w] and a 0/1 mask [B, 1, any h, any w]."""
    mask = F.interpolate(mask.to(base.dtype), size=base.shape[-2:], mode="nearest")
    return gaussian_blur(base, sigma, radius) * mask + base * (1 - mask)


class AttentionOfCall:
    """The attention received in one call, a map [h, w] for every row; a call may take several evaluations."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._maps: dict[Row, list[Tensor]] = {}

    def add(self, rows: Sequence[Row], received: Tensor) -> None:
        """Maps [rows, h, w]."""
        for row, one in zip(rows, received, strict=True):
            self._maps.setdefault(row, []).append(one)

    def per_picture(self, kind: str, pictures: int) -> Tensor | None:
        """The map of every picture [pictures, 1, h, w], the mean over its rows of this kind.

        None where one has none: its rows were not seen, or nobody tells whose they are. None as well where maps are of
        different sizes (regional prompts).
        """
        maps = [self._maps.get(Row(kind, picture), []) for picture in range(pictures)]
        if not all(maps) or len({one.shape for of_picture in maps for one in of_picture}) != 1:
            return None
        return torch.stack([torch.stack(of_picture).mean(dim=0, keepdim=True) for of_picture in maps])


class SagPatch(Patch, Guidance, RecordedAttention):
    def __init__(self, settings: SagSettings, run: Run, layer: AttentionLayer) -> None:
        super().__init__()
        self._settings = settings
        self._run = run
        self._layer = layer
        self._name = layer_names((layer,), run.model.unet) if run.model.unet else ""
        self._window = settings.window(run)
        self._radius = COMFYUI_RADIUS if settings.comfyui_kernel else None
        self._recorded: AttentionOfCall | None = None
        self._finished: Call | None = None

    def records(self, call: Call) -> bool:
        return call.sigma in self._window

    def records_in(self, layer: AttentionLayer) -> bool:
        return layer == self._layer

    def record(self, projections: Projections, place: Place) -> None:
        if place.call is self._finished:  # the extra evaluation of this patch, or what others ask for after it
            return
        k = projections.k
        if k.shape[1] != place.tokens:  # another extension reduced the tokens: nobody knows what lies where
            return
        if self._recorded is None or self._recorded.call is not place.call:
            self._recorded = AttentionOfCall(place.call)
        received = received_attention(projections.q, k, place.heads)
        self._recorded.add(place.rows, received.unflatten(-1, place.size))

    def after_mix(self, denoised: Tensor, raw: Predictions) -> Tensor:
        recorded, self._recorded, self._finished = self._recorded, None, raw.call
        if recorded is None or recorded.call is not raw.call or raw.call.sigma not in self._window:
            return denoised
        kind, base = (COND, raw.cond) if raw.uncond is None else (UNCOND, raw.uncond)
        received = recorded.per_picture(kind, len(base))
        if received is None:
            return denoised
        self.fired += 1
        worse = degraded(base, received > self._settings.threshold, self._settings.blur_sigma, self._radius)
        alpha = 1 - raw.call.sigma if self._run.model.prediction == FLOW else 1.0
        seen = raw.predict(raw.x + alpha * (worse - base), kind)
        return denoised + self._settings.scale * (worse - seen)

    def describe(self) -> str:
        settings, upper = self._settings, min(self._window.upper, self._run.sigma_first)
        what = f"{self._name}, scale {settings.scale:g}, blur sigma {settings.blur_sigma:g}"
        return f"{what}, from sigma {upper:.4g} to {self._window.lower:.4g}"


def begin(settings: SagSettings, run: Run) -> SagPatch:
    """The patch for one run. Raises `Refusal` on a model without UNet blocks or without attention in the middle."""
    unet = unet_of(run, "SAG reads UNet attention")
    middle = [layer for layer in unet.attention if layer.side == MIDDLE]
    if not middle:
        raise Refusal(f"the middle block of {run.model.family} has no self-attention: switch SAG off for this model")
    if settings.scale == 0:
        raise Rest("scale 0 changes nothing")
    if settings.blur_sigma == 0:
        raise Rest("blur sigma 0 changes nothing")
    return SagPatch(settings, run, min(middle, key=lambda layer: layer.depth))


TECHNIQUE = Technique(
    name="sag",
    title="SAG",
    family="Guidance",
    summary="Makes details crisper and more coherent where the model looks, by moving away from a blurred prediction.",
    source="Self-Attention Guidance (Hong et al. 2023); ComfyUI SelfAttentionGuidance",
    twins=("SelfAttentionGuidance", "Self Attention Guidance"),
    settings=SagSettings,
    begin=begin,
    presets={
        "Default": SagSettings(),
        "Strong": SagSettings(scale=1.0),
        "ComfyUI": SagSettings(comfyui_kernel=True),
        "Light, early steps only": SagSettings(scale=0.3, end=0.5),
    },
    cost="+50 % time",
)
