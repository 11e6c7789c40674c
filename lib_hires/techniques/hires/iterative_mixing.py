"""Iterative mixing: the upscaled picture stays mixed into the sample while the large picture forms.

With z the reference (the clean latent that the pass begins from), n the host's own noise for it, and w the reference's
share at a noise level (see blending.py), one of two forms acts at every step:

    latent space        x  <- w z'(sigma) + (1 - w) x,   z' = z + sigma n, or (1 - sigma) z + sigma n for a flow model
    denoised space      x0 <- w z + (1 - w) x0

The first is the papers': before the model is called, on the latent that the sampler goes on from. It needs a sampler
that goes on from that very latent. The second acts on the result of a call, so it holds for every sampler, also those
that add noise. Either runs inside the host's sampler: its history and its noise stay its own, and it ends at sigma 0.

ComfyUI's node runs one-step samplings instead, each adding noise once more, with independent noise per level: hence its
grain, which the clean-up passes of its users remove. Of its later version the Perlin masks and the rewind are left out.
The masks let patches of the picture go without the reference, at random: the detail map does so where it helps, and a
painted map where the user wants it. Rewind noises again and repeats part of the run, which is what Restart samplers do,
in every host.

References: DemoFusion (Du et al. 2024), FreeScale (Qiu et al. 2025), ComfyUI's Iterative Mixing nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lib_hires.blending import ADDITION, COSINE, FUNCTIONS, SCHEDULES, BlendingSchedule, Share, blended
from lib_hires.blur import gaussian_blur
from lib_hires.detail_map import between, detail_map
from lib_hires.painted_map import grey_range, stretched
from lib_hires.progress import AXES, STEP, TIMESTEP, position_in
from lib_hires.resize import map_size
from lib_hires.run import FLOW, Call, Run, Start
from lib_hires.settings import Settings, choice, number, painting, passes_choice, toggle
from lib_hires.sites import Guidance, NoisyLatent, Predictions
from lib_hires.stages import HIRES_FAMILY
from lib_hires.technique import Curve, Patch, Rest, Technique
from lib_hires.unsampler import NoisedReference, unsample

AUTO, LATENT, DENOISED = "Auto", "Latent", "Denoised"
SPACES = (AUTO, LATENT, DENOISED)
NO_MAP, AUTOMATIC, PAINTED = "None", "Automatic", "Painted"
MAPS = (NO_MAP, AUTOMATIC, PAINTED)
FOLLOWS, INVENTS, FREE = "follows the picture", "adds detail", "free"

_SAME_LEVEL = 1e-4  # relative; hosts hand noise levels over rounded


@dataclass(frozen=True)
class IterativeMixingSettings(Settings):
    alpha: float = number(
        2.0, 0.0, 20.0, 0.05,
        label="Alpha",
        help="How fast the model is let free. Lower keeps closer to the picture, higher invents more new detail: 0.5 "
        "is faithful, 2 FreeScale's and 3 DemoFusion's value. Linear ignores it.",
    )  # fmt: skip
    space: str = choice(
        AUTO, SPACES,
        label="Space",
        help=f"Where it mixes. {LATENT}: the noisy latent before each step, as in the papers; for samplers that add no "
        f"noise. {DENOISED}: what each step predicts; for every sampler. {AUTO} chooses by the sampler.",
    )  # fmt: skip
    schedule: str = choice(
        COSINE, SCHEDULES,
        label="Blending schedule",
        help="How the picture's share falls over the pass. Cosine is the papers'; Linear falls evenly; Logistic holds, "
        "then drops half way, the more suddenly the higher Alpha.",
    )  # fmt: skip
    function: str = choice(
        ADDITION, FUNCTIONS,
        label="Blending function",
        help="Addition is the papers'. Slerp follows the arc between both, which keeps contrast where they differ. "
        "Norm only gives the sample the picture's loudness first.",
    )  # fmt: skip
    progress: str = choice(
        TIMESTEP, AXES,
        label="Progress by",
        help="What the schedule, Start, Stop and Clamp count. Training timestep, the papers' choice, counts from pure "
        "noise, so a pass with less denoise begins further along. Step and Log sigma count the pass itself.",
    )  # fmt: skip
    start: float = number(
        0.0, 0.0, 1.0, 0.01,
        label="Start",
        help="Until this point the share is whole: the steps before it copy the picture.",
    )  # fmt: skip
    stop: float = number(
        1.0, 0.0, 3.0, 0.01,
        label="Stop",
        help="Where the schedule ends and mixing stops. Lower leaves the last part to the model alone; above 1 "
        "stretches the schedule, so that some of the picture is mixed in until the end.",
    )  # fmt: skip
    clamp: float = number(
        1.0, 0.0, 1.0, 0.01,
        label="Clamp",
        help="From this point on the share drops to the minimum at once. 1 switches it off.",
    )  # fmt: skip
    minimum: float = number(
        0.0, 0.0, 1.0, 0.01,
        label="Minimum share",
        help="The share never falls below this. Above 0 something of the upscaled picture is mixed in to the end.",
    )  # fmt: skip
    maximum: float = number(
        1.0, 0.0, 1.0, 0.01,
        label="Maximum share",
        help="The share that the schedule begins with. 0 switches mixing off.",
    )  # fmt: skip
    node_weights: bool = toggle(
        False,
        label="ComfyUI weights",
        help="Off: Alpha as in the papers. On: as in ComfyUI's node, where a higher Alpha keeps closer to the picture "
        "(its default is 2.4). Changes the cosine only.",
    )
    detail: str = choice(
        NO_MAP, MAPS,
        label="Detail map",
        help=f"{NO_MAP}: one Alpha everywhere. {AUTOMATIC}: Alpha where the picture has detail, and "
        '"Alpha elsewhere" where it is plain, so that skies and walls stay calm while hair and leaves grow finer. '
        f"{PAINTED}: you paint where.",
    )  # fmt: skip
    plain_alpha: float = number(
        0.5, 0.0, 20.0, 0.05,
        label="Alpha elsewhere",
        help=f"The other Alpha of a detail map: where the picture has little detail ({AUTOMATIC}), or where the map is "
        f"black ({PAINTED}).",
        formerly="Alpha of plain areas",
    )  # fmt: skip
    softness: float = number(
        2.0, 0.0, 32.0, 0.5,
        label="Map softness",
        help="How softly the detail map goes from one Alpha to the other, in latent cells (8 pixels each).",
    )  # fmt: skip
    painting: str = painting(
        shown_with=("detail", PAINTED),
        label="Painted map",
        help='White has "Alpha", black has "Alpha elsewhere", grey lies between. It is stretched over the picture of '
        "the pass; with Inpaint area Only masked, over the part that is cut out.",
    )
    normalize_fraction: float = number(
        0.0, 0.0, 1.0, 0.05,
        label="Normalize fraction",
        help="Experimental. Takes the mean of this share of the noisiest references off all of them, which removes a "
        "colour cast of the noise but shifts the picture's own brightness. 0 switches it off.",
    )  # fmt: skip
    passes: str = passes_choice()

    def problem(self) -> str | None:
        if self.minimum > self.maximum:
            return (
                f"minimum share {self.minimum:g} is above maximum share {self.maximum:g}, so mixing would grow instead "
                "of falling: lower Minimum share, or raise Maximum share"
            )
        if self.detail == PAINTED and not self.painting:
            return f"the painted map is empty: paint or upload one, or set Detail map to {NO_MAP} or {AUTOMATIC}"
        return None

    @property
    def alphas(self) -> tuple[float, ...]:
        """The ends of the alphas in use, that of the detail map's darkest part first; one where all are the same."""
        if self.detail == NO_MAP or self.alpha == self.plain_alpha:
            return (self.alpha,)
        greys = grey_range(self.painting) if self.detail == PAINTED else (0.0, 1.0)
        return tuple(between(self.plain_alpha, self.alpha, grey) for grey in dict.fromkeys(greys))

    def blending(self) -> BlendingSchedule:
        clamp = self.clamp if self.clamp < 1 else math.inf
        return BlendingSchedule(
            self.schedule, self.start, self.stop, clamp, self.minimum, self.maximum, self.node_weights
        )

    def acts_on_latent(self, run: Run) -> bool:
        return self.space == LATENT or (self.space == AUTO and run.sampler.keeps_latent)


class Shares:
    """The reference's share at every noise level of one run, for a number alpha or a map [B, 1, h, w]."""

    def __init__(self, settings: IterativeMixingSettings, run: Run, alpha: Share) -> None:
        self._blending = settings.blending()
        self._position = position_in(run, settings.progress)
        self._alpha = alpha

    def at(self, sigma: float) -> Share:
        return self._blending.share(self._position(sigma), self._alpha)


class MixingPatch(Patch):
    """What both spaces share: the noised reference, its share, and how they are blended."""

    def __init__(self, settings: IterativeMixingSettings, run: Run, start: Start) -> None:
        super().__init__()
        self._settings = settings
        self._run = run
        self._shares = Shares(settings, run, _alpha(settings, start))
        self._reference = _reference(settings, run, start)

    def _mixed(self, reference: Tensor, sample: Tensor, sigma: float) -> Tensor:
        mixed = blended(reference, sample, self._shares.at(sigma), self._settings.function)
        self.fired += mixed is not sample
        return mixed

    def describe(self) -> str:
        s, run = self._settings, self._run
        shares = Shares(s, run, s.alphas[-1])
        last = min((sigma for sigma in run.sigmas if sigma > 0), default=0.0)
        alpha = " to ".join(f"{alpha:g}" for alpha in s.alphas)
        return f"{s.schedule.lower()}, alpha {alpha}, share {shares.at(run.sigma_first):.2f} to {shares.at(last):.2f}"


class LatentMixingPatch(MixingPatch, NoisyLatent):
    """Mixes the noisy latent before a call.

    Samplers that do not keep it evaluate the model at levels of their own as well, on latents that they drop: those
    calls stay as they are, so that every step mixes once.
    """

    def __init__(self, settings: IterativeMixingSettings, run: Run, start: Start) -> None:
        super().__init__(settings, run, start)
        all_levels = run.sampler.keeps_latent or not run.lists_steps
        self._planned = () if all_levels else tuple({sigma for sigma in run.sigmas if sigma > 0})

    def before_call(self, x: Tensor, call: Call) -> Tensor:
        if self._planned and not any(abs(call.sigma - level) <= _SAME_LEVEL * level for level in self._planned):
            return x
        return self._mixed(self._reference.at(call.sigma), x, call.sigma)

    def describe(self) -> str:
        note = "" if self._run.sampler.keeps_latent else " (this sampler adds noise or looks ahead: Denoised suits it)"
        return f"{super().describe()}, mixed into the noisy latent{note}"


class DenoisedMixingPatch(MixingPatch, Guidance):
    """Mixes the denoised result of a call."""

    def after_mix(self, denoised: Tensor, raw: Predictions) -> Tensor:
        return self._mixed(self._reference.clean, denoised, raw.call.sigma)

    def describe(self) -> str:
        return f"{super().describe()}, mixed into the denoised result"


def _alpha(settings: IterativeMixingSettings, start: Start) -> Share:
    """A number where it is the same in every cell: a map of it would not give the very same bits."""
    if len(settings.alphas) == 1:
        return settings.alphas[0]
    return between(settings.plain_alpha, settings.alpha, _detail(settings, start.latent))


def _detail(settings: IterativeMixingSettings, latent: Tensor) -> Tensor:
    if settings.detail == AUTOMATIC:
        return detail_map(latent, settings.softness)
    return gaussian_blur(stretched(settings.painting, map_size(latent)), settings.softness).to(latent.device)


def _reference(settings: IterativeMixingSettings, run: Run, start: Start) -> NoisedReference:
    flow = run.model.prediction == FLOW
    fraction = settings.normalize_fraction
    return unsample(start.latent, start.noise, run.sigmas, flow=flow, normalize_fraction=fraction)


def begin(settings: IterativeMixingSettings, run: Run) -> MixingPatch:
    """The patch for one run. Raises `Rest` in a pass without a reference, and where the share is 0 throughout."""
    if run.start is None:
        raise Rest("only in hires or img2img passes: this one begins from noise alone, with no picture to mix in")
    # shares never rise
    if all(Shares(settings, run, alpha).at(run.sigma_first) == 0 for alpha in settings.alphas):
        raise Rest("the share of the picture is 0 in the whole pass: raise Maximum share, Stop or denoising strength")
    kind = LatentMixingPatch if settings.acts_on_latent(run) else DenoisedMixingPatch
    return kind(settings, run, run.start)


def curve(settings: IterativeMixingSettings, run: Run) -> Curve:
    """The reference's share at every step of a run, where Alpha holds: in detail, or where the map is white."""
    shares = Shares(settings, run, settings.alpha)
    values = tuple([float(shares.at(sigma)) for sigma in run.sigmas])
    phases = tuple([FREE if share == 0 else FOLLOWS if share >= 0.5 else INVENTS for share in values])
    return Curve(values, phases, low=0.0, high=1.0, caption="share of the picture")


TECHNIQUE = Technique(
    name="iterative_mixing",
    title="Iterative mixing",
    family=HIRES_FAMILY,
    summary="Keeps the composition of the small picture through Hires. fix or img2img at high denoising strength, and "
    "lets new detail grow: use it with a denoising strength of 0.7 to 1.",
    source="DemoFusion (Du et al. 2024), FreeScale (Qiu et al. 2025); ComfyUI Iterative Mixing nodes",
    settings=IterativeMixingSettings,
    begin=begin,
    presets={
        "FreeScale": IterativeMixingSettings(),
        "Faithful": IterativeMixingSettings(alpha=0.5),
        "Balanced": IterativeMixingSettings(alpha=1.0),
        "More detail (DemoFusion)": IterativeMixingSettings(alpha=3.0),
        "Detail where there is detail": IterativeMixingSettings(alpha=3.0, detail=AUTOMATIC),
        "ComfyUI node": IterativeMixingSettings(alpha=2.4, progress=STEP, node_weights=True),
    },
    curve=curve,
)
