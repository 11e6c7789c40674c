"""Stages of a hires pass in a WebUI, with a stand-in for its own pass: what is alive when the next one begins."""

import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lib_hires.generation import Generation
from lib_hires.hosts import hires_stages
from lib_hires.hosts.hires_stages import attach_stages
from lib_hires.techniques.hires.cascade import CascadeSettings

STAGES = 4


@pytest.fixture
def host(monkeypatch):
    package, shared = ModuleType("modules"), ModuleType("modules.shared")
    package.shared = shared
    shared.state = SimpleNamespace(interrupted=False, skipped=False, job_count=1)
    monkeypatch.setitem(sys.modules, "modules", package)
    monkeypatch.setitem(sys.modules, "modules.shared", shared)
    monkeypatch.setattr(hires_stages, "_native", lambda p: (512, 512))


class Processing:
    """txt2img: its hires pass makes latents and a list of decoded pictures, and notes which of earlier ones live."""

    enable_hr, hr_upscale_to_x, hr_upscale_to_y, n_iter = True, 32 * 2**STAGES, 32 * 2**STAGES, 1

    def __init__(self, generation):
        self._generation = generation
        self._made = []  # weak references to what each stage made
        self.alive = []  # numbers of the stages whose tensors live, when each stage begins

    def sample_hr_pass(self, samples, decoded, seeds, subseeds, strength, prompts):
        self.alive.append([number for number, made in enumerate(self._made) if any(ref() is not None for ref in made)])
        latent, picture = torch.zeros(1, 4, 8, 8), torch.zeros(3, 64, 64)
        self._generation.latent = latent
        self._made.append([weakref.ref(latent), weakref.ref(picture)])
        return [picture]


def test_a_stage_finds_only_the_one_before_alive(host, without_collector):
    generation = Generation({"cascade": CascadeSettings()})
    p = Processing(generation)
    attach_stages(p, generation)
    p.sample_hr_pass(torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 32, 32), [1], [1], 0.0, ["a red ring"])
    assert p.alive == [[], [0], [1], [2]]
