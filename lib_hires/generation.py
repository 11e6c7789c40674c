"""What one generation was asked to do, and what came of it: from the request to the infotext."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lib_hires.plan import Plan
from lib_hires.run import FIRST_PASS, Run
from lib_hires.settings import Settings
from lib_hires.sites import MaskBlend


@dataclass
class Generation:
    """One generation of pictures: all passes of one batch count share it.

    `selection` is what the user switched on, `notes` what had to be repaired or ignored in the request. The hosts add
    what happened: techniques that `acted` in some pass, and the reason of each one that was refused or had nothing to
    do in some pass.
    """

    selection: Mapping[str, Settings] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    acted: set[str] = field(default_factory=set)  # technique names
    refused: dict[str, str] = field(default_factory=dict)  # technique title: reason
    rested: dict[str, str] = field(default_factory=dict)  # likewise
    blends: list[MaskBlend] = field(default_factory=list)  # of the pass just sampled, for its last blend and overlay
    warned: dict[str, str] = field(default_factory=dict)  # technique title: what may spoil the picture
    in_stage: Mapping[str, Settings] | None = None  # what is on in the stage of the hires pass that is running
    stage: str = ""  # which one, for people
    first: Run | None = None  # the last first pass
    latent: Any = None  # what the last run returned

    @property
    def current(self) -> Mapping[str, Settings]:
        """What is on in the next run."""
        return self.selection if self.in_stage is None else self.in_stage

    def finish_run(self, plan: Plan) -> None:
        """Take over what one run did. Called at the end of every run, also of one that broke off."""
        if plan.run.pass_name == FIRST_PASS:
            self.first = plan.run
        self.acted |= {name for name, patch in plan.patches.items() if patch.fired}
        self.refused |= plan.refused
        self.rested |= plan.resting
        self.warned |= plan.warnings()
