"""A plan: the patches of one run, in order, and who does not act and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from lib_hires.registry import TECHNIQUES
from lib_hires.run import HIRES_PASS, IMG2IMG_PASS, Run
from lib_hires.settings import FIRST, HIRES, Settings
from lib_hires.sites import Guidance
from lib_hires.technique import Patch, Refusal, Rest, Technique

log = logging.getLogger("hires_plus")

Selection = Mapping[str, Settings]  # enabled techniques by name
Site = TypeVar("Site")

_TWICE = "{} is on as well and does the same: switch one of the two off"


@dataclass
class Plan:
    """Everything that was decided for one run."""

    run: Run
    patches: dict[str, Patch] = field(default_factory=dict)  # by technique name, in registry order
    refused: dict[str, str] = field(default_factory=dict)  # title: reason
    resting: dict[str, str] = field(default_factory=dict)

    def at(self, site: type[Site]) -> list[Site]:
        """The patches that act at a site, in order."""
        return [patch for patch in self.patches.values() if isinstance(patch, site)]

    @property
    def is_empty(self) -> bool:
        """Whether nobody was asked to act in this run (a cascade divides the pass and has nothing to do inside)."""
        return not (self.patches or self.refused or self.resting)

    def report(self) -> str:
        """One log line: what is applied, with resolved noise levels and blocks, and what is not and why."""
        titles = {technique.name: technique.title for technique in TECHNIQUES}
        parts = [f"{titles[name]}: {patch.describe()}" for name, patch in self.patches.items()]
        parts += [f"{title} WARNING: {warning}" for title, warning in self.warnings().items()]
        parts += [f"{title} rests: {reason}" for title, reason in self.resting.items()]
        parts += [f"{title} REFUSED: {reason}" for title, reason in self.refused.items()]
        height, width = self.run.latent
        where = ", ".join(filter(None, (self.run.pass_name, self.run.stage, self.run.model.family)))
        return f"[{where}, latent {width}x{height}] " + "; ".join(parts)

    def warnings(self) -> dict[str, str]:
        """What may spoil the picture, by title."""
        told = {t.title: self._warning(t, self.patches[t.name]) for t in TECHNIQUES if t.name in self.patches}
        return {title: warning for title, warning in told.items() if warning}

    def _warning(self, technique: Technique, patch: Patch) -> str:
        twins = [title for title in self.run.other_scripts if title.startswith(technique.twins)]
        return "; ".join([*filter(None, [patch.warning()]), *map(_TWICE.format, twins)])

    def unfired(self) -> list[str]:
        """Titles of techniques that were planned and never acted."""
        return [t.title for t in TECHNIQUES if t.name in self.patches and not self.patches[t.name].fired]


def make_plan(selection: Selection, run: Run, prepared: Plan | None = None) -> Plan:
    """Begin every enabled technique for this run. Never raises: a technique that fails here is refused.

    `prepared` is what `prepare_plan` made of the techniques of the schedule, which act already.
    """
    plan = Plan(run)
    for technique in TECHNIQUES:
        if technique.name not in selection or technique.begin is None:
            continue
        if technique.schedules and prepared is not None:
            _take_over(technique, prepared, plan)
        else:
            _begin(technique, technique.begin, selection[technique.name], plan)
    return plan


def prepare_plan(selection: Selection, run: Run) -> Plan:
    """Begin the enabled techniques that change the schedule; the run has the model's own range of noise levels."""
    plan = Plan(run)
    for technique in TECHNIQUES:
        if technique.schedules and technique.name in selection and technique.begin is not None:
            _begin(technique, technique.begin, selection[technique.name], plan)
    return plan


def schedules(selection: Selection) -> bool:
    """Whether anything enabled changes the schedule."""
    return any(technique.schedules for technique in TECHNIQUES if technique.name in selection)


def _take_over(technique: Technique, prepared: Plan, plan: Plan) -> None:
    if technique.name in prepared.patches:
        plan.patches[technique.name] = prepared.patches[technique.name]
    for told, known in ((plan.refused, prepared.refused), (plan.resting, prepared.resting)):
        if technique.title in known:
            told[technique.title] = known[technique.title]


def _begin(technique: Technique, begin: Callable[..., Patch], settings: Settings, plan: Plan) -> None:
    try:
        _check_pass(settings, plan.run)
        problem = settings.problem()
        if problem:
            raise Refusal(problem)
        patch = begin(settings, plan.run)
        if isinstance(patch, Guidance) and plan.run.model.no_guidance_reason:
            raise Refusal(f"{plan.run.model.no_guidance_reason}: switch {technique.title} off for this model")
        plan.patches[technique.name] = patch
    except Rest as rest:
        plan.resting[technique.title] = str(rest)
    except Refusal as refusal:
        plan.refused[technique.title] = str(refusal)
    except Exception as error:  # a defect of ours must cost the user one technique, not the picture
        log.exception("%s could not start", technique.title)
        plan.refused[technique.title] = f"internal error: {error}"


def _check_pass(settings: Settings, run: Run) -> None:
    wanted = getattr(settings, "passes", None)
    if wanted is None or run.pass_name == IMG2IMG_PASS:
        return
    if wanted == FIRST and run.pass_name == HIRES_PASS:
        raise Rest("set to the first pass only")
    if wanted == HIRES and run.pass_name != HIRES_PASS:
        raise Rest("set to the hires pass only")
