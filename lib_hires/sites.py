"""Sites: the places in a host where a technique may act. A closed list; a new site is a change to every host.

A technique's patch derives from the sites that it uses and overrides the methods it needs. Hosts ask a plan who is
`at` a site, and never who the technique is. docs/architecture.md lists the sites that are still to come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lib_hires.model_sampling import ModelSampling
from lib_hires.run import Call, Row, Size
from lib_hires.topology import AttentionLayer, ConvLayer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, k, v) -> out, each [B, N, heads * d]


class FeatureMaps:
    """Feature maps [B, C, h, w] entering or leaving a UNet block, and the skip that an output block meets."""

    def input_block(self, h: Tensor, index: int, call: Call) -> Tensor:
        """The map that leaves input block `index`, before it is stored as a skip: changes the skip too."""
        return h

    def after_skip(self, h: Tensor, index: int, call: Call) -> Tensor:
        """The same map after the skip was stored: changes only what goes deeper."""
        return h

    def grow(self, h: Tensor, size: Size, index: int, call: Call) -> Tensor | None:
        """Bring `h` to the size of the skip that output block `index` joins it with. None: not mine."""
        return None

    def join(self, h: Tensor, skip: Tensor, index: int, call: Call) -> tuple[Tensor, Tensor]:
        """The map and the skip [B, C', h, w] that output block `index` is about to concatenate, after `grow`; the skip
        carries its ControlNet residual. A patch that changes nothing returns the very tensors it was given."""
        return h, skip


class Convolutions:
    """How far apart the taps of a convolution lie. Factors of several patches multiply."""

    def dilates_in(self, layer: ConvLayer) -> bool:
        """Whether it may ever act on this convolution; the others are not touched."""
        raise NotImplementedError

    def dilation(self, layer: ConvLayer, size: Size, call: Call) -> float:
        """The factor for a map of `size` (h, w) that this convolution is about to see. 1: as it is; never below."""
        raise NotImplementedError


@dataclass(frozen=True)
class Predictions:
    """What the model predicted in one call, before anybody changed it. Tensors are x0 (denoised) [B, C, h, w], float32.

    `x` is the noisy latent: x0 + sigma noise (VE), or (1 - sigma) x0 + sigma noise for a flow model. `uncond` is None
    where there is no guidance (CFG scale 1, or a step in which the host or a technique skipped it). `scale` is the CFG
    scale in force times the weights of composed prompts, a number or [B, 1, 1, 1]. `perturbed` is the prediction that
    a `PerturbedAttention` asked for. `predict(x, kind)` is one more evaluation, at another noisy latent and this
    call's noise level, with the prompts of COND or UNCOND.
    """

    x: Tensor
    cond: Tensor
    uncond: Tensor | None
    scale: float | Tensor
    call: Call
    perturbed: Tensor | None
    predict: Callable[[Tensor, str], Tensor]


class Guidance:
    """From the raw predictions to the denoised result: changes before and after the host mixes cond and uncond.

    The host's mix is uncond + scale (cond - uncond). Patches act in registry order; `raw` always holds what the model
    predicted, whatever earlier patches changed. A patch that does nothing returns the very tensors it was given.
    """

    def skips_uncond(self, call: Call) -> bool:
        """True where this call needs no uncond prediction: it is then left out where the host can."""
        return False

    def before_mix(self, cond: Tensor, uncond: Tensor, raw: Predictions) -> tuple[Tensor, Tensor]:
        """The (cond, uncond) to be mixed. Not called where there is no uncond."""
        return cond, uncond

    def after_mix(self, denoised: Tensor, raw: Predictions) -> Tensor:
        """The denoised result."""
        return denoised


@dataclass(frozen=True)
class Place:
    """One self-attention in one call, for the rows at hand.

    `size` is the true (h, w) of its tokens [B, h*w, C], row major. `rows` are the rows at hand where they were picked
    for what they predict, else empty. `seed` is that of their picture where a patch draws random numbers
    (`SelfAttention.draws_at`), else of the batch's first. Another extension may have changed the number of tokens:
    compare before reshaping to `size`.
    """

    layer: AttentionLayer
    size: Size
    heads: int
    call: Call
    rows: tuple[Row, ...] = ()
    seed: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens the layer has unless another extension changed it."""
        return self.size[0] * self.size[1]


class Projections:
    """Queries, keys and values [B, N, heads * d] of a layer, each made when it is first asked for."""

    def __init__(self, q: Callable[[], Tensor], k: Callable[[], Tensor], v: Callable[[], Tensor]) -> None:
        self._make = {"q": q, "k": k, "v": v}
        self._made: dict[str, Tensor] = {}

    def _get(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = self._make[name]()
        return self._made[name]

    @property
    def q(self) -> Tensor:
        return self._get("q")

    @property
    def k(self) -> Tensor:
        return self._get("k")

    @property
    def v(self) -> Tensor:
        return self._get("v")


class SelfAttention:
    """Changes self-attention: the tokens that K and V are made of, and the attention itself.

    It never meets perturbed rows in a perturbed layer, nor a layer whose attention is recorded: there attention is
    plain. Patches act in registry order. A patch leaves sources alone that another one reduced already, and attends
    plainly (`inner`) where it meets fewer keys than it expects.
    """

    def may_act(self, layer: AttentionLayer, call: Call) -> bool:
        """Whether it might act in this layer, before sizes are known; where nobody might, no module is touched."""
        return True

    def acts_at(self, place: Place) -> bool:
        """Whether it acts here. Where nobody does, the host's own attention runs."""
        raise NotImplementedError

    def draws_at(self, place: Place) -> bool:
        """Whether what it does here depends on random numbers. They go by a picture's own seed (`place.seed`), so that
        no picture depends on its batch mates: pictures of other seeds are then served one after another."""
        return False

    def sources(self, key_source: Tensor, value_source: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """The tokens [B, M, C] that K and V are projected from; they come as [B, h*w, C] unless others changed them."""
        return key_source, value_source

    def attend(self, q: Tensor, k: Tensor, v: Tensor, place: Place, inner: Attend) -> Tensor:
        """The attention of q [B, h*w, heads * d] to k, v [B, M, heads * d], before the output projection.

        `inner` is the next attention. It takes any rows and any number of tokens, such as windows folded into rows.
        """
        return inner(q, k, v)


class Schedule:
    """What the model's output means, and the noise levels that it is asked at, for a whole pass.

    Such a patch begins before the sampler has its noise levels, so it sees a run that has the model's range only. Hosts
    put what it says into force until the sampler returns; windows and guidance of all techniques go by it.
    """

    def model_sampling(self) -> ModelSampling:
        raise NotImplementedError


class NoisyLatent:
    """The noisy latent just before a call; what it becomes there is what a sampler goes on from, if it keeps latents
    (`samplers.Sampler.keeps_latent`)."""

    def before_call(self, x: Tensor, call: Call) -> Tensor:
        """x [B, C, h, w], float32: x0 + sigma noise (VE), or (1 - sigma) x0 + sigma noise for a flow model. A patch
        that does nothing returns the very tensor it was given."""
        return x


class Ending:
    """When a run ends before its last step; its result is then what the last call predicted (x0)."""

    def ends_after(self, call: Call) -> bool:
        raise NotImplementedError


class MaskBlend:
    """The mask of an inpainting run: what may change in a call, at the end, and in the finished picture.

    Masks are soft, in 0..1, 1 = repaint. Patches act in registry order, each on what the last one returned. A patch
    that changes nothing returns the very tensor it was given, and the host blends as it would without it.
    """

    def in_force(self, mask: Tensor, call: Call) -> Tensor:
        """The mask [B or 1, C or 1, h, w] for this call: where it is 0 the latent is held at that of the picture."""
        return mask

    def at_end(self, mask: Tensor) -> Tensor:
        """The mask by which the run's finished latent is blended with that of the picture, shaped likewise."""
        return mask

    def shown(self, mask: Tensor, usual: Tensor) -> Tensor:
        """How much of the new picture each pixel of the result shows, the rest is the original: 0..1, [H, W].

        `mask` is the mask in pixels, exact up to 0.5 (a host may have cut off what lies above); `usual` is what the
        host would show. Asked after the run. Never less than `usual`."""
        return usual


class PerturbedAttention:
    """One more prediction of cond, made with perturbed self-attention in some layers. One such patch per plan."""

    def perturbs(self, call: Call) -> bool:
        """Whether this call needs the perturbed prediction."""
        raise NotImplementedError

    def perturbs_in(self, layer: AttentionLayer) -> bool:
        raise NotImplementedError

    def perturb(self, projections: Projections, place: Place) -> Tensor:
        """What the attention of the perturbed rows returns, [B, N, heads * d], before the output projection."""
        raise NotImplementedError


class RecordedAttention:
    """Looks at the attention of the uncond rows, and changes nothing.

    A UNet evaluation without uncond rows shows its cond rows instead. Hosts may spread one call over several
    evaluations, and order pictures and composed prompts as they like, so both kinds can come in one call, and one kind
    more than once: `place.rows` says what each row predicts, and for which picture.
    """

    def records(self, call: Call) -> bool:
        """Whether it looks at this call."""
        raise NotImplementedError

    def records_in(self, layer: AttentionLayer) -> bool:
        raise NotImplementedError

    def record(self, projections: Projections, place: Place) -> None:
        raise NotImplementedError
