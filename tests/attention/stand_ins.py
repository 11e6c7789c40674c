"""Patches for tests of the sites of attention."""

from lib_hires.sites import PerturbedAttention
from lib_hires.technique import Patch
from lib_hires.topology import MIDDLE


class Perturbing(Patch, PerturbedAttention):
    def perturbs(self, call):
        return True

    def perturbs_in(self, layer):
        return layer.side == MIDDLE

    def perturb(self, projections, place):
        assert projections.v.shape[1] == place.size[0] * place.size[1], "perturbed rows meet whole maps"
        return 100 * projections.v  # a middle block of random weights is faint
