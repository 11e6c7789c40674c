"""Model sampling: what the loaded model is taken to predict, and at which noise levels, for one generation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lib_hires.model_sampling import (
    ModelSampling,
    flow_schedule,
    has_zero_snr,
    model_sampling,
    shift_for_size,
    zero_terminal_snr,
)
from lib_hires.noise import NoiseSchedule
from lib_hires.run import EPS, FLOW, IMG_TO_IMG, LCM, X0, ModelFacts, Run, V
from lib_hires.settings import Settings, choice, number, passes_choice
from lib_hires.sites import Schedule
from lib_hires.technique import Patch, Refusal, Rest, Technique

AUTO, ON, OFF = "Auto", "On", "Off"
PREDICTIONS = {"eps": EPS, "v": V, "x0": X0, "LCM": LCM, "img_to_img": IMG_TO_IMG}
OWN, VALUE, RESOLUTION = "Model's own", "Value", "From resolution"


@dataclass(frozen=True)
class ModelSamplingSettings(Settings):
    prediction: str = choice(
        AUTO, (AUTO, *PREDICTIONS),
        label="Prediction type",
        help="What the model's output means. Auto: what the WebUI takes it for. A v-prediction model that gives noise "
        "or burnt colours wants v; a model with a Latent Consistency LoRA wants LCM, the LCM sampler and few steps.",
    )  # fmt: skip
    zero_snr: str = choice(
        AUTO, (AUTO, ON, OFF),
        label="Zero-terminal SNR",
        help="On: the first step starts from pure noise, so pictures can be really dark or bright. For v-prediction "
        "models that were trained with it. Off: the noise levels of plain Stable Diffusion. Auto: as the WebUI has it.",
    )  # fmt: skip
    shift: str = choice(
        OWN, (OWN, VALUE, RESOLUTION),
        label="Shift",
        help="Flow models only (SD3, Flux). Value: the number below. From resolution: larger pictures get a higher "
        "shift, as Flux does it.",
    )  # fmt: skip
    shift_value: float = number(
        3.0, 0.01, 100.0, 0.01,
        label="Shift value",
        help="For Shift = Value. Higher: more of the steps go into composition, fewer into detail. 1 shifts nothing; "
        "SD3 was made for 3, AuraFlow for 1.73.",
    )  # fmt: skip
    base_shift: float = number(
        0.5, 0.0, 5.0, 0.01,
        label="Base shift",
        help="For Shift = From resolution: logarithm of the shift at 256 x 256.",
    )  # fmt: skip
    max_shift: float = number(
        1.15, 0.0, 5.0, 0.01,
        label="Max shift",
        help="For Shift = From resolution: logarithm of the shift at 1024 x 1024; larger pictures get more.",
    )  # fmt: skip
    passes: str = passes_choice()


class ModelSamplingPatch(Patch, Schedule):
    def __init__(self, sampling: ModelSampling, warning: str = "") -> None:
        super().__init__()
        self._sampling = sampling
        self._warning = warning

    def model_sampling(self) -> ModelSampling:
        self.fired += 1
        return self._sampling

    def describe(self) -> str:
        levels, prediction = self._sampling.levels, self._sampling.prediction
        shift = f" shift {self._sampling.shift:.4g}," if prediction == FLOW else ""
        return f"{prediction},{shift} sigma {levels[-1]:.6g} to {levels[0]:.4g} in {len(levels)} levels"

    def warning(self) -> str:
        return self._warning


def begin(settings: ModelSamplingSettings, run: Run) -> ModelSamplingPatch:
    """The patch for one pass.

    Raises `Rest` where the model is so already, and `Refusal` where the model has no such setting or the combination
    has no result.
    """
    if run.model.prediction == FLOW:
        return ModelSamplingPatch(_flow(settings, run))
    if settings.shift != OWN:
        raise Refusal(f"{run.model.family} is no flow model and has no shift: set Shift to {OWN}")
    sampling = _discrete(settings, run.model)
    return ModelSamplingPatch(sampling, _warning(settings, run))


def _discrete(settings: ModelSamplingSettings, model: ModelFacts) -> ModelSampling:
    prediction = PREDICTIONS.get(settings.prediction, model.prediction)
    schedule = _table(settings.zero_snr, model)
    if prediction == model.prediction and schedule is model.schedule:
        raise Rest(f"the model has prediction type {prediction} and these noise levels already")
    if prediction in (EPS, LCM) and has_zero_snr(schedule):
        raise Refusal(
            f"prediction type {prediction} is undefined at zero SNR, where noise is all there is: set Zero-terminal "
            f"SNR to {OFF}, or Prediction type to v"
        )
    return model_sampling(prediction, schedule)


def _table(zero_snr: str, model: ModelFacts) -> NoiseSchedule:
    """The model's own object where nothing is to change."""
    if zero_snr == AUTO or has_zero_snr(model.schedule) == (zero_snr == ON):
        return model.schedule
    if zero_snr == ON:
        return zero_terminal_snr(model.schedule)
    if model.trained_schedule is None or has_zero_snr(model.trained_schedule):
        raise Refusal(f"the noise levels of this model without zero SNR are unknown: set Zero-terminal SNR to {AUTO}")
    return model.trained_schedule


def _flow(settings: ModelSamplingSettings, run: Run) -> ModelSampling:
    if settings.prediction != AUTO or settings.zero_snr != AUTO:
        raise Refusal(
            f"{run.model.family} is a flow model, which has neither prediction type nor zero SNR to choose: set both "
            f"to {AUTO}"
        )
    if settings.shift == OWN:
        raise Rest(f"Shift is set to {OWN}")
    shift = settings.shift_value
    if settings.shift == RESOLUTION:
        shift = shift_for_size(run.latent, settings.base_shift, settings.max_shift)
    own = run.model.schedule.sigmas
    schedule = flow_schedule(shift, len(own))
    if np.allclose(schedule.sigmas, own, rtol=1e-5, atol=0):
        raise Rest(f"the model's own shift is {shift:.4g} already")
    return replace(ModelSampling(FLOW, schedule), shift=shift)


def _warning(settings: ModelSamplingSettings, run: Run) -> str:
    kind = PREDICTIONS.get(settings.prediction)
    if kind == LCM and run.sampler.name and not any(word in run.sampler.name.lower() for word in ("lcm", "tcd")):
        return "prediction type LCM is made for the LCM sampler: with another one pictures are blurred or grainy"
    if kind in (X0, IMG_TO_IMG):
        return f"nothing tells whether this model predicts {kind}: if the picture is noise or grey, it does not"
    return ""


TECHNIQUE = Technique(
    name="model_sampling",
    title="Model sampling",
    family="Schedule",
    summary="Tells the WebUI for one generation what the model predicts and at which noise levels: v-prediction, "
    "zero-terminal SNR, LCM, or the shift of SD3 and Flux. Use it when a checkpoint gives noise or burnt pictures.",
    source="Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al. 2023); Latent Consistency Models "
    "(Luo et al. 2023); Scaling Rectified Flow Transformers (Esser et al. 2024)",
    twins=("Advanced Model Sampling",),
    settings=ModelSamplingSettings,
    begin=begin,
    schedules=True,
    presets={
        "v-prediction": ModelSamplingSettings(prediction="v"),
        "v-prediction, zero SNR": ModelSamplingSettings(prediction="v", zero_snr=ON),
        "Latent Consistency": ModelSamplingSettings(prediction="LCM"),
        "Flux's shift": ModelSamplingSettings(shift=RESOLUTION),
        "Shift 3": ModelSamplingSettings(shift=VALUE),
    },
)
