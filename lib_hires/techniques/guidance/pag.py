"""Perturbed-attention guidance (PAG), smoothed energy guidance (SEG): away from a prediction with weak attention.

One more prediction of cond is made with perturbed self-attention in some layers, c_p. What it lacks, the structure that
attention brings into a picture, is then added on top of the guided result r, with g = s (c - c_p):

    out = r + g        in x0 space; the papers write it for eps, which is the same: x0 = x - sigma eps

PAG lets every token attend to itself only: the attention map is the identity and the output is V. SEG blurs the queries
over the map with a Gaussian, which flattens the energy landscape of the attention; with an infinite sigma every query
is the mean query.

An adaptive scale fades with the training timestep t, and a rescale rho takes back what g adds to the contrast:

    s' = max(s - s a^4 (1000 - t), 0)
    g' = g (rho std(c) / std(y) + 1 - rho)    y = r + g ("full") or c + g ("partial"), std per picture

"snf" (saliency-adaptive noise fusion, Wang et al. 2023) takes, cell by cell, either r - u or g, whichever is the more
salient: out = u + (r - u or g), saliency being the softmax over the map of a blurred magnitude.

Reference: Ahn et al. 2024, arXiv 2403.17377 (PAG, "perturbed self-attention"); Hong 2024, arXiv 2408.00760 (SEG); the
adaptive scale, rescale and snf as in the well-known advanced node.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_hires.attention import attend
from lib_hires.attention_blocks import FORM, layer_names, parse_blocks, resolve_blocks
from lib_hires.blur import gaussian_blur
from lib_hires.precision import working_dtype
from lib_hires.run import Call, Run, Size
from lib_hires.settings import Settings, choice, number, passes_choice, text, window_end, window_start
from lib_hires.sites import Guidance, PerturbedAttention, Place, Predictions, Projections
from lib_hires.technique import Curve, Patch, Refusal, Rest, Technique, unet_of
from lib_hires.topology import AttentionLayer
from lib_hires.window import Windowed

log = logging.getLogger("hires_plus")

PAG, SEG, SEG_MEAN = "PAG (identity attention)", "SEG (blurred queries)", "SEG (mean query)"
FULL, PARTIAL, SNF = "full", "partial", "snf"
_MEAN_QUERY = float("inf")


@dataclass(frozen=True)
class PagSettings(Windowed, Settings):
    mode: str = choice(
        PAG,
        (PAG, SEG, SEG_MEAN),
        label="Mode",
        help="How attention is weakened in the prediction to move away from. PAG: every spot sees only itself. "
        "SEG: attention is blurred. SEG with the mean query: blurred without limit, usually the strongest clean-up.",
    )
    scale: float = number(
        3.0, 0.0, 100.0, 0.1,
        label="Scale",
        help="How far to move away. Lower the CFG scale by about as much. 0 does nothing.",
    )  # fmt: skip
    blur_sigma: float = number(
        10.0, 0.0, 100.0, 0.1,
        label="SEG blur sigma",
        help="Width of the blur in SEG (blurred queries), in cells of the layer's map. Larger acts more strongly. "
        "The other modes do not use it.",
    )  # fmt: skip
    blocks: str = text(
        "m0",
        check=parse_blocks,
        label="Blocks",
        help=f"Attention blocks to weaken, separated by commas, each {FORM}. Only blocks with attention are counted: "
        "SD 1.x has d0 to d5, m0, u0 to u8; SDXL d0 to d3, m0, u0 to u5. m0, the middle, is the usual one.",
    )
    adaptive_scale: float = number(
        0.0, 0.0, 1.0, 0.01,
        label="Adaptive scale",
        help="Fades the scale from high noise to low. 0 keeps it; 0.15 halves it by the end; 0.2 ends it after about "
        "60 % of a full run; 0.5 and above leave only the very first steps.",
    )  # fmt: skip
    rescale: float = number(
        0.0, 0.0, 1.0, 0.01,
        label="Rescale",
        help="Takes back added contrast and saturation: 0 not at all, 1 completely. The rescale mode snf ignores it.",
    )  # fmt: skip
    rescale_mode: str = choice(
        FULL,
        (FULL, PARTIAL, SNF),
        label="Rescale mode",
        help="full: contrast is measured on the final result. partial: on the positive prediction with this guidance "
        "alone. snf: no rescale; each spot follows either CFG or this guidance, whichever has more to say there.",
    )
    start: float = window_start()
    end: float = window_end()
    passes: str = passes_choice()

    @property
    def query_sigma(self) -> float:
        """The blur of the queries; 0 where attention is not blurred at all."""
        return {PAG: 0.0, SEG: self.blur_sigma, SEG_MEAN: _MEAN_QUERY}[self.mode]


def faded_scale(scale: float, adaptive_scale: float, timestep: float) -> float:
    """s' of the module's formula, for a training timestep 0 to 999."""
    return max(scale - scale * adaptive_scale**4 * (1000 - timestep), 0.0)


def rescaled(g: Tensor, cond: Tensor, denoised: Tensor, rho: float, mode: str) -> Tensor:
    """g' of the module's formula, x0 space [B, C, h, w]; std over everything but the batch."""
    if rho == 0:
        return g
    std, wanted = _std((denoised if mode == FULL else cond) + g), _std(cond)
    ratio = torch.where(std > 0, wanted / std, torch.ones_like(std))
    return g * (rho * ratio + (1 - rho))


def _std(x: Tensor) -> Tensor:
    return x.std(dim=tuple(range(1, x.ndim)), correction=0, keepdim=True)


def salient(first: Tensor, second: Tensor) -> Tensor:
    """Saliency-adaptive noise fusion: per element the one of two changes [B, C, h, w] that is the more salient."""
    return torch.where(_saliency(second) > _saliency(first), second, first)


def _saliency(change: Tensor) -> Tensor:
    blurred = gaussian_blur(change.abs(), 1.0, radius=1)
    return blurred.flatten(2).softmax(dim=-1).view_as(change)


def smoothed_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, size: Size, sigma: float) -> Tensor:
    """SEG's attention for q, k, v [B, N, heads * d]: queries blurred over their map of `size` (h, w), N = h * w.

    With an infinite sigma all queries are the same, so their attention is computed once; N is then free.
    """
    if sigma == _MEAN_QUERY:
        mean = q.mean(dim=1, keepdim=True, dtype=working_dtype(q)).to(q.dtype)
        return attend(mean, k, v, heads).expand_as(q)
    return attend(gaussian_blur(q.mT.unflatten(-1, size), sigma).flatten(2).mT, k, v, heads)


class PagPatch(Patch, Guidance, PerturbedAttention):
    def __init__(self, settings: PagSettings, run: Run, layers: tuple[AttentionLayer, ...]) -> None:
        super().__init__()
        self._settings = settings
        self._run = run
        self._layers = frozenset(layers)
        self._names = layer_names(layers, run.model.unet) if run.model.unet else ""
        self._window = settings.window(run)
        self._warned = False

    @property
    def sigma_begin(self) -> float:
        """The highest noise level at which it may act; the scale is largest there."""
        return min(self._window.upper, self._run.sigma_first)

    def effective_scale(self, sigma: float) -> float:
        """The scale at a noise level; 0 outside the window."""
        if sigma not in self._window:
            return 0.0
        timestep = self._run.model.schedule.timestep(sigma)
        return faded_scale(self._settings.scale, self._settings.adaptive_scale, timestep)

    def perturbs(self, call: Call) -> bool:
        return self.effective_scale(call.sigma) > 0

    def perturbs_in(self, layer: AttentionLayer) -> bool:
        return layer in self._layers

    def perturb(self, projections: Projections, place: Place) -> Tensor:
        """The weak attention. A layer whose tokens another extension reduced, in a way that this mode cannot follow,
        keeps its plain attention: the picture is drawn, with less guidance, and the log says so."""
        weaken = self._identity if self._settings.mode == PAG else self._smoothed
        out = weaken(projections, place)
        if out is None:
            self._warn(place)
            return attend(projections.q, projections.k, projections.v, place.heads)
        self.fired += 1
        return out

    def _identity(self, projections: Projections, place: Place) -> Tensor | None:
        # Queries and keys are not touched where the tokens are as expected, so they are never computed.
        v = projections.v
        fits = v.shape[1] == place.tokens or v.shape[1] == projections.q.shape[1]
        return v if fits else None

    def _smoothed(self, projections: Projections, place: Place) -> Tensor | None:
        q, sigma = projections.q, self._settings.query_sigma
        if q.shape[1] != place.tokens and sigma != _MEAN_QUERY:
            return None
        return smoothed_attention(q, projections.k, projections.v, place.heads, place.size, sigma)

    def _warn(self, place: Place) -> None:
        if not self._warned:
            log.warning("PAG leaves %s alone: another extension reduced its tokens", place.layer)
            self._warned = True

    def after_mix(self, denoised: Tensor, raw: Predictions) -> Tensor:
        scale = self.effective_scale(raw.call.sigma)
        if raw.perturbed is None or scale == 0:
            return denoised
        g = scale * (raw.cond - raw.perturbed)
        if self._settings.rescale_mode != SNF:
            return denoised + rescaled(g, raw.cond, denoised, self._settings.rescale, self._settings.rescale_mode)
        if raw.uncond is None:  # no CFG to choose from
            return denoised + g
        return raw.uncond + salient(denoised - raw.uncond, g)

    def describe(self) -> str:
        sigmas = f"from sigma {self.sigma_begin:.4g} to {self._window.lower:.4g}"
        return f"{self._settings.mode} in {self._names}, scale {self._settings.scale:g}, {sigmas}"


def begin(settings: PagSettings, run: Run) -> PagPatch:
    """The patch for one run. Raises `Refusal` on a model without UNet blocks or without a chosen block."""
    unet = unet_of(run, "PAG changes UNet attention")
    try:
        layers = resolve_blocks(parse_blocks(settings.blocks), unet)
    except LookupError as error:
        raise Refusal(f"Blocks: {error} in {run.model.family}") from None
    if settings.scale == 0:
        raise Rest("scale 0 changes nothing")
    if settings.mode == SEG and settings.blur_sigma == 0:
        raise Rest("SEG blur sigma 0 changes nothing")
    patch = PagPatch(settings, run, layers)
    if patch.effective_scale(patch.sigma_begin) == 0:
        raise Rest(f"adaptive scale {settings.adaptive_scale:g} has faded it out before it begins")
    return patch


def curve(settings: PagSettings, run: Run) -> Curve:
    """The effective scale at every step of a run."""
    window, timestep = settings.window(run), run.model.schedule.timestep
    values = [
        faded_scale(settings.scale, settings.adaptive_scale, timestep(sigma)) if sigma in window else 0.0
        for sigma in run.sigmas
    ]
    phases = tuple(["guided" if value > 0 else "off" for value in values])
    return Curve(tuple(values), phases, low=0.0, high=max(1.0, settings.scale), caption="guidance scale")


TECHNIQUE = Technique(
    name="pag",
    title="PAG / SEG",
    family="Guidance",
    summary="Makes shapes and structure more coherent by moving away from a prediction made with weakened attention.",
    source="Perturbed-Attention Guidance (Ahn et al. 2024); Smoothed Energy Guidance (Hong 2024)",
    twins=("PerturbedAttentionGuidance", "Perturbed-Attention"),
    settings=PagSettings,
    begin=begin,
    presets={
        "PAG": PagSettings(),
        "PAG, fading": PagSettings(adaptive_scale=0.15),
        "PAG, light": PagSettings(scale=1.5, end=0.6),
        "PAG, less contrast": PagSettings(rescale=0.7),
        "SEG, mean query": PagSettings(mode=SEG_MEAN),
        "SEG, sigma 10": PagSettings(mode=SEG),
        "SDXL, deep layers": PagSettings(blocks="d2.2-9"),
    },
    curve=curve,
    cost="+50 % time",
)
