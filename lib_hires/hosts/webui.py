"""What A1111 and the Forge family share: a run is one call of the pass's own sampler function.

`attach` wraps the function of the sampler that the host made for this pass. While it runs, the pass's denoiser carries
a wrapped forward; the host's cfg_denoiser callback opens a call (it comes after a possible refiner switch and before
the UNet), and the forward's `finally` closes it. All of it lives on objects that the host throws away, and is taken
off again when the sampler function returns or raises.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from lib_hires.generation import Generation
from lib_hires.hosts import masks, others
from lib_hires.hosts.instance import instance_attribute
from lib_hires.hosts.level import Level
from lib_hires.hosts.pass_schedule import PassSchedule
from lib_hires.model_sampling import ModelSampling
from lib_hires.plan import Plan, make_plan, schedules
from lib_hires.registry import BY_NAME
from lib_hires.run import FIRST_PASS, HIRES_PASS, IMG2IMG_PASS, Call, ModelFacts, Run, Size, Start
from lib_hires.samplers import Sampler
from lib_hires.sites import (
    Ending,
    MaskBlend,
    NoisyLatent,
    PerturbedAttention,
    RecordedAttention,
    Schedule,
    SelfAttention,
)

log = logging.getLogger("hires_plus")

_ORIGINAL = "hires_plus_original"
_RUN = "hires_plus_run"


class _Ended(Exception):
    """A patch ended the run. Leaves the sampler through the denoiser and is caught where the run began."""

    def __init__(self, latent: Any) -> None:
        self.latent = latent


class HostAdapter(Protocol):
    """What differs between the hosts."""

    name: str

    def model_facts(self, sd_model: Any) -> ModelFacts: ...

    def unet_identity(self, sd_model: Any) -> Any:
        """Changes when the refiner, or another extension, swaps the network in the middle of a run."""

    def call_sigma(self, params: Any, facts: ModelFacts) -> float:
        """Noise level (VE scaling) of a cfg_denoiser callback."""

    def counts_timesteps(self, denoiser: Any) -> bool:
        """Whether samplers hand this denoiser training timesteps with VP latents, and get eps (DDIM, PLMS, UniPC)."""

    def sigmas(self, sampler: Any, arguments: Mapping[str, Any], facts: ModelFacts) -> tuple[float, ...]:
        """Noise levels of a run, from the arguments of the sampler function."""

    def other_attention(self, sd_model: Any) -> list[str]:
        """What other extensions have put on the network's self-attention, and who acts then, for people."""

    def installation(self, sd_model: Any, plan: Plan) -> Callable[[Call, Any], Any]:
        """Prepare a plan on the current model; returns a function that opens a call (with the callback's parameters)
        as a context manager."""

    def scheduled(self, p: Any, sampling: ModelSampling) -> AbstractContextManager[None]:
        """While it is open, the pass's sampler works with this prediction type and these noise levels. Raises
        `Refusal` where the host cannot do that."""

    def start_latent(self, p: Any, steps: int | None, x: Any, noise: Any, sampling: ModelSampling) -> Any:
        """The noisy latent x that a pass with a picture behind it starts from, where the host has noised it by its own
        table; `noise` is the unit noise that it did it with."""


def attach(p: Any, generation: Generation, x: Any = None, noise: Any = None) -> None:
    """Make the pass that is about to be sampled a run; x and noise are the host's latent and noise for it.

    Idempotent: Forge calls the hook twice before a hires pass.
    """
    if not generation.selection:
        return
    sampler = p.sampler
    original = getattr(sampler.func, _ORIGINAL, sampler.func)
    # a pass from noise alone has no picture behind it: there x is the noise itself
    start = None if x is None or noise is None or _pass_name(p) == FIRST_PASS else Start(x, noise)
    schedule = _attach_schedule(p, generation, x, original) if schedules(generation.current) else None
    spent = False

    @functools.wraps(original)  # hosts read the function's signature to decide what to pass
    def run_sampler(model: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal spent, start
        if sampler.func is run_sampler:
            sampler.func = original
        # another extension may have wrapped this wrapper, and call it inside a run of ours or in a later batch
        if spent or hasattr(sampler.model_wrap_cfg, _RUN):
            return original(model, x, *args, **kwargs)
        spent = True
        # by name, however they came: some samplers take n or a range, and some callers pass sigmas by position
        arguments = inspect.signature(original).bind_partial(model, x, *args, **kwargs).arguments | kwargs
        told = Sampler(original.__name__, float(arguments.get("eta") or 0), float(arguments.get("s_churn") or 0))
        adapter = adapter_for(p.sd_model)
        # this function refers to itself and waits for the garbage collector: the latents must not wait with it, or
        # those of all stages of a hires pass would add up
        begun, start = start, None
        if schedule and schedule.sampling and begun:
            x = adapter.start_latent(p, schedule.steps, x, begun.noise, schedule.sampling)
        try:
            with SamplingRun(adapter, p, generation, x, arguments, told, begun, schedule).active():
                generation.latent = original(model, x, *args, **kwargs)
        except _Ended as ended:
            generation.latent = ended.latent
        return generation.latent

    setattr(run_sampler, _ORIGINAL, original)
    sampler.func = run_sampler


def _attach_schedule(p: Any, generation: Generation, x: Any, function: Any) -> PassSchedule:
    """The schedule of a pass has to be in force before the sampler computes its noise levels."""
    cells = None if x is None else (int(x.shape[-2]), int(x.shape[-1]))  # x itself would outlive its pass here

    def prepared_run() -> Run:
        model = adapter_for(p.sd_model).model_facts(p.sd_model)
        levels = model.schedule.sigmas
        return Run(
            host=adapter_for(p.sd_model).name,
            pass_name=_pass_name(p),
            model=model,
            latent=cells or (p.height // 8, p.width // 8),
            sigmas=(float(levels[-1]), float(levels[0])),
            sampler=Sampler(function.__name__),
        )

    schedule = PassSchedule(
        generation.current,
        prepared_run,
        lambda sampling: adapter_for(p.sd_model).scheduled(p, sampling),
        p.sampler.model_wrap_cfg,
    )
    schedule.attach(p.sampler)
    return schedule


def on_cfg_denoiser(params: Any) -> None:
    """The host's callback before every UNet evaluation, registered once by the extension."""
    run: SamplingRun | None = getattr(params.denoiser, _RUN, None)
    if run is not None:
        run.open_call(params)


def adapter_for(sd_model: Any) -> HostAdapter:
    from lib_hires.hosts import a1111, forge  # each imports its own host's modules

    return forge.ADAPTER if hasattr(sd_model, "forge_objects") else a1111.ADAPTER


class SamplingRun:
    """One sampling run in a WebUI."""

    def __init__(
        self,
        adapter: HostAdapter,
        p: Any,
        generation: Generation,
        x: Any,
        arguments: Mapping[str, Any],
        sampler: Sampler,
        start: Start | None,
        schedule: PassSchedule | None = None,
    ) -> None:
        self._adapter = adapter
        self._p = p
        self._generation = generation
        self._latent: Size = (int(x.shape[-2]), int(x.shape[-1]))
        self._arguments = arguments
        self._sampler = sampler
        self._start = start
        self._schedule = schedule
        self._denoiser = p.sampler.model_wrap_cfg
        self._network: Any = None
        self._plan: Plan | None = None
        self._open: Callable[[Call, Any], Any] | None = None
        self._call = ExitStack()
        self._masked: masks.MaskedCall | None = None
        self._masking = ExitStack()
        self._broken = False

    @contextmanager
    def active(self) -> Iterator[None]:
        original_forward = self._denoiser.forward

        def forward(x: Any, sigma: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                self._guarded(lambda: self._change_latent(x, sigma))
                self._guarded(lambda: self._put_masks_on(x, sigma))
                out = original_forward(x, sigma, *args, **kwargs)
                if self._masked is not None:
                    out = self._masked.finish(out)
            finally:
                self._call.close()
                self._take_masks_off()
            self._end(x, sigma, out)
            return out

        with instance_attribute(self._denoiser, _RUN, self), instance_attribute(self._denoiser, "forward", forward):
            try:
                yield
                self._warn_unfired()
                if self._plan is not None and not self._broken:
                    self._generation.blends = self._plan.at(MaskBlend)
            finally:
                self._call.close()
                self._finish_plan()

    def open_call(self, params: Any) -> None:
        """Begin one denoiser call."""
        self._call.close()
        if self._masked is not None:
            self._masked.see(params)
        self._guarded(lambda: self._open_call(params))

    def _guarded(self, act: Callable[[], None]) -> None:
        """A defect of ours costs this run its techniques, told once, and not the picture."""
        if self._broken:
            return
        try:
            act()
        except Exception as error:
            self._broken = True
            self._call.close()
            log.exception("the techniques are off for the rest of this pass")
            for name in self._generation.current:
                self._generation.refused[BY_NAME[name].title] = f"internal error: {error}"

    def _change_latent(self, x: Any, sigma: Any) -> None:
        """The sampler goes on from its own tensor: what patches make of it is written back into it."""
        plan = self._current_plan()
        patches = plan.at(NoisyLatent)
        if not patches:
            return
        level, call = self._about(sigma, plan)
        before = changed = x.float() * level.factor
        for patch in patches:
            changed = patch.before_call(changed, call)
        if changed is not before:
            x.copy_(changed / level.factor)

    def _about(self, sigma: Any, plan: Plan) -> tuple[Level, Call]:
        """Where a call stands that a sampler makes at `sigma`, or at a timestep where its denoiser counts those."""
        level = float(sigma[0])
        if not self._adapter.counts_timesteps(self._denoiser):
            return Level(level, 1.0), Call(level, int(self._denoiser.step))
        level = plan.run.model.schedule.sigma(level)
        return Level(level, (1 + level**2) ** 0.5), Call(level, int(self._denoiser.step))

    def _end(self, x: Any, sigma: Any, out: Any) -> None:
        """Leave the sampler if a patch says so. What a denoiser returns is x0, or eps where it counts timesteps."""
        patches = self._plan.at(Ending) if self._plan is not None and not self._broken else []
        if not patches:
            return
        assert self._plan is not None
        level, call = self._about(sigma, self._plan)
        if any(patch.ends_after(call) for patch in patches):
            raise _Ended(level.denoised(x, out) if level.returns_eps else out)

    def _put_masks_on(self, x: Any, sigma: Any) -> None:
        """Before the host's forward: it may blend before its callback comes."""
        plan = self._current_plan()
        patches = plan.at(MaskBlend)
        if not patches:
            return
        level, call = self._about(sigma, plan)
        self._masked = masks.masked_call(self._denoiser, patches, x, call, level, self._start)
        if self._masked is not None:
            self._masking.enter_context(self._masked.open())

    def _take_masks_off(self) -> None:
        self._masked = None
        self._masking.close()

    def _open_call(self, params: Any) -> None:
        """Put the patches on."""
        plan = self._current_plan()
        if self._open is not None:
            call = Call(self._adapter.call_sigma(params, plan.run.model), int(self._denoiser.step))
            self._call.enter_context(self._open(call, params))

    def _current_plan(self) -> Plan:
        """Made at the run's first call, and again after the network was swapped."""
        network = self._adapter.unet_identity(self._p.sd_model)
        if self._plan is None or network is not self._network:
            self._begin_plan(network)
        assert self._plan is not None
        return self._plan

    def _begin_plan(self, network: Any) -> None:
        self._finish_plan()
        self._network = network
        prepared = self._schedule.plan if self._schedule else None
        self._plan = make_plan(self._generation.current, self._facts(), prepared)
        in_calls = any(not isinstance(patch, Schedule) for patch in self._plan.patches.values())
        self._open = self._adapter.installation(self._p.sd_model, self._plan) if in_calls else None
        if not self._plan.is_empty:
            log.info(self._plan.report())
        if any(self._plan.at(site) for site in (SelfAttention, PerturbedAttention, RecordedAttention)):
            for other in self._adapter.other_attention(self._p.sd_model):
                log.info(f"self-attention is also changed by another extension: {other}")

    def _facts(self) -> Run:
        model = self._adapter.model_facts(self._p.sd_model)
        if self._schedule:
            model = self._schedule.in_force(model)
        return Run(
            host=self._adapter.name,
            pass_name=_pass_name(self._p),
            model=model,
            latent=self._latent,
            sigmas=self._adapter.sigmas(self._p.sampler, self._arguments, model),
            seeds=tuple(int(seed) for seed in getattr(self._p, "seeds", None) or [0]),
            sampler=self._sampler,
            start=self._start,
            hires_follows=_pass_name(self._p) == FIRST_PASS and bool(self._p.enable_hr),
            stage=self._generation.stage,
            mask=masks.repaint_mask(self._p),
            other_scripts=others.scripts_on(self._p),
        )

    def _finish_plan(self) -> None:
        if self._plan is not None:
            self._generation.finish_run(self._plan)

    def _warn_unfired(self) -> None:
        for title in self._plan.unfired() if self._plan else []:
            log.warning(
                f"{title} is on but never acted in this pass: no step fell into its window, no size changed, another "
                "technique did it already, or there was no negative prompt to guide against (CFG scale 1)"
            )


def _pass_name(p: Any) -> str:
    if getattr(p, "is_hr_pass", False):
        return HIRES_PASS
    return FIRST_PASS if hasattr(p, "enable_hr") else IMG2IMG_PASS


def native_size(default_latent: int) -> Size:
    """Native latent size: the user's option (pixels; 0 = automatic) or the model family's own."""
    from modules import shared

    try:
        pixels = int(shared.opts.data.get("hires_plus_native_size", 0) or 0)
    except (TypeError, ValueError):  # an API request can set options to anything
        pixels = 0
    side = pixels // 8 if pixels >= 8 else default_latent
    return side, side


def planned_sigmas(arguments: Mapping[str, Any], to_sigma: Callable[[float], float]) -> tuple[float, ...]:
    """Noise levels that a sampler function was given: `sigmas`, `sigma_sched`, `timesteps` or a range."""
    for name in ("sigmas", "sigma_sched"):
        if arguments.get(name) is not None:
            return tuple(float(s) for s in arguments[name])
    if arguments.get("timesteps") is not None:
        return tuple(sorted((to_sigma(float(t)) for t in arguments["timesteps"]), reverse=True))
    return float(arguments["sigma_max"]), float(arguments["sigma_min"])
