"""A1111's attention applies hypernetworks to what it projects K and V from: they hold in rows that we attend too."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lib_hires.hosts import a1111
from lib_hires.run import PERTURBED, Call, Row
from lib_hires.sites import PerturbedAttention, SelfAttention
from lib_hires.technique import Patch
from tests.hosts import toy

UNET = toy.ToyUNet().eval().requires_grad_(False)
SD_MODEL = SimpleNamespace(model=SimpleNamespace(diffusion_model=UNET))


class Changing(Patch, SelfAttention):
    """Attends as the layer does."""

    def acts_at(self, place):
        return True


class Perturbing(Patch, PerturbedAttention):
    """Attends as the layer does."""

    def perturbs(self, call):
        return True

    def perturbs_in(self, layer):
        return True

    def perturb(self, projections, place):
        return toy.host_attention(projections.q, projections.k, projections.v, place.heads)


def apply_hypernetworks(loaded, context):
    return context * (1 + len(loaded)), context - len(loaded)


def host_forward(self, x, context=None):
    context_k, context_v = apply_hypernetworks(sys.modules["modules.shared"].loaded_hypernetworks, x)
    return self.to_out(toy.host_attention(self.to_q(x), self.to_k(context_k), self.to_v(context_v), self.heads))


@pytest.fixture(params=[[], ["one"]], ids=["none", "one"])
def loaded(request, monkeypatch):
    package, shared, folder = (ModuleType(name) for name in ("modules", "modules.shared", "modules.hypernetworks"))
    folder.hypernetwork = SimpleNamespace(apply_hypernetworks=apply_hypernetworks)
    package.shared, shared.loaded_hypernetworks = shared, request.param
    for module in (package, shared, folder):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(toy.SelfAttention, "forward", host_forward)
    return request.param


@pytest.mark.parametrize("patch", [Changing(), Perturbing()], ids=["changed", "perturbed"])
def test_they_act_wherever_we_attend(loaded, patch):
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 6, generator=g), torch.randn(2, 3, 5, generator=g)
    want = UNET(x, text)
    call = Call(2.0, 0, rows=(Row(PERTURBED, 0), Row(PERTURBED, 1)))
    with a1111.ADAPTER.installation(SD_MODEL, toy.plan_of(patch, UNET))(call, None):
        torch.testing.assert_close(UNET(x, text), want, rtol=1e-5, atol=1e-5)
