"""The schedule of one pass: in force while the pass's own sampler works, and off when it returns or raises.

The sampler computes its noise levels in its methods `sample` and `sample_img2img`, before it calls the function that is
a run. So these two methods of the sampler object are wrapped; the wrapper takes itself off when it is called.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from lib_hires.hosts.instance import instance_attribute
from lib_hires.model_sampling import ModelSampling
from lib_hires.plan import Plan, Selection, prepare_plan
from lib_hires.registry import BY_NAME
from lib_hires.run import ModelFacts, Run
from lib_hires.sites import Schedule
from lib_hires.technique import Refusal

log = logging.getLogger("hires_plus")

_METHODS = ("sample", "sample_img2img")
_TAKE_OFF = "hires_plus_take_off"


class PassSchedule:
    """`run` gives the facts of the pass and model at hand, `put` puts a schedule into force until it is closed.

    `plan` says what was decided, `sampling` what is in force, and `steps` is what the host told its sampler.
    """

    def __init__(
        self,
        selection: Selection,
        run: Callable[[], Run],
        put: Callable[[ModelSampling], AbstractContextManager[None]],
        denoiser: Any,
    ) -> None:
        self._selection = selection
        self._run = run
        self._put = put
        self._denoiser = denoiser
        self._in_force = ExitStack()
        self.plan: Plan | None = None
        self.sampling: ModelSampling | None = None
        self.steps: int | None = None

    def attach(self, sampler: Any) -> None:
        """Make the sampler's next pass have this schedule, instead of one that was attached and never used."""
        for name in _METHODS:
            take_off = getattr(getattr(sampler, name, None), _TAKE_OFF, None)
            if take_off:
                take_off()
        attached = ExitStack()
        for name in _METHODS:
            if hasattr(sampler, name):
                wrapper = self._around(getattr(sampler, name), attached)
                attached.callback(_take_off, sampler, name, wrapper, vars(sampler).get(name))
                setattr(sampler, name, wrapper)

    def _around(self, original: Callable[..., Any], attached: ExitStack) -> Callable[..., Any]:
        spent = False

        @functools.wraps(original)
        def sample(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            attached.close()
            if spent:  # another extension kept this wrapper
                return original(*args, **kwargs)
            spent = True
            self.steps = kwargs.get("steps")
            with self._active():
                return original(*args, **kwargs)

        setattr(sample, _TAKE_OFF, attached.close)
        return sample

    def in_force(self, model: ModelFacts) -> ModelFacts:
        """The model's facts with the prediction type and noise levels that it is sampled with."""
        if self.sampling is None:
            return model
        return replace(model, prediction=self.sampling.prediction, schedule=self.sampling.schedule)

    @contextmanager
    def _active(self) -> Iterator[None]:
        update = getattr(self._denoiser, "update_inner_model", None)

        def update_inner_model() -> None:
            """The host's own, after a refiner switch: it makes its denoiser anew for the other model."""
            self._in_force.close()
            assert update is not None
            update()
            self._begin()

        with ExitStack() as stack:
            stack.callback(self._end)
            self._begin()
            if update is not None:
                stack.enter_context(instance_attribute(self._denoiser, "update_inner_model", update_inner_model))
            yield

    def _begin(self) -> None:
        """A defect of ours costs the pass its schedule, and not the picture."""
        self.plan, self.sampling = None, None
        try:
            self.plan = prepare_plan(self._selection, self._run())
            self._put_on(self.plan)
        except Exception as error:
            log.exception("the schedule could not be changed")
            self._in_force.close()
            if self.plan is not None:
                self._refuse(self.plan, f"internal error: {error}")

    def _put_on(self, plan: Plan) -> None:
        for patch in plan.at(Schedule):
            try:
                sampling = patch.model_sampling()
                self._in_force.enter_context(self._put(sampling))
                self.sampling = sampling
            except Refusal as refusal:
                self._refuse(plan, str(refusal))

    def _refuse(self, plan: Plan, reason: str) -> None:
        for name in list(plan.patches):
            plan.refused[BY_NAME[name].title] = reason
        plan.patches.clear()
        self.sampling = None

    def _end(self) -> None:
        self._in_force.close()
        self.sampling = None


def _take_off(sampler: Any, name: str, wrapper: Any, before: Any) -> None:
    if vars(sampler).get(name) is not wrapper:  # another extension has wrapped it; a spent wrapper does nothing
        return
    if before is None:
        delattr(sampler, name)
    else:
        setattr(sampler, name, before)
