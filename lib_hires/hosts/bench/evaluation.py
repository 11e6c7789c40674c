"""One UNet evaluation of cond and uncond, plain or with a technique: to be timed, or counted without being computed.

Counting happens on the meta device, where tensors have shapes and no values: a picture of 1024 px with SD 1.5's own
width takes a second and no memory, and the result depends on no machine and no load.

* `operations`: floating-point operations of matrix products and convolutions, attention as its two products.
* `peak_bytes`: the most bytes that tensors made during the evaluation held at once, weights and inputs left out. It is
  what an allocator counts as in use; scratch space inside a kernel is not seen. Attention counts as fused, as all
  hosts have it by default: its result and no matrix of scores.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lib_hires.hosts.bench import webui_ldm
from lib_hires.hosts.bench.model import LATENT_FACTOR, NATIVE_SIZE, UNET_CONFIG, build_unet
from lib_hires.hosts.ldm_unet import HookedUnet
from lib_hires.noise import NoiseSchedule
from lib_hires.plan import Plan, make_plan
from lib_hires.run import FIRST_PASS, Call, ModelFacts, Run, Size
from lib_hires.settings import Settings
from lib_hires.topology import unet_topology

Patched = Callable[[], AbstractContextManager[None]]

BATCH = 2
# Elapsed fraction of the evaluation that is looked at: inside every default window, and near the default peak time.
MOMENT = 0.3
META = "meta"


@dataclass(frozen=True)
class Network:
    """A UNet of SD 1.5's block layout, and the latent size that counts as its native one."""

    width: int
    heads: int
    native: Size
    context_dim: int = UNET_CONFIG["context_dim"]

    def build(self) -> Any:
        layout = {"channel_mult": [1, 2, 4, 4], "model_channels": self.width, "num_heads": self.heads}
        return build_unet(UNET_CONFIG | layout | {"context_dim": self.context_dim}).eval().requires_grad_(False)


_BENCH_NATIVE = NATIVE_SIZE // LATENT_FACTOR
SD15 = Network(320, 8, (64, 64), context_dim=768)
SD15_AT_04 = Network(128, 4, (_BENCH_NATIVE, _BENCH_NATIVE))
SD15_AT_02 = Network(64, 2, SD15.native)  # heads of 32 to 128 channels, SD 1.5 has 40 to 160


class Evaluation:
    """A network and one input: cond and uncond in one batch, at a square latent."""

    def __init__(self, network: Network, side: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self._network = network
        self.latent = (side, side)
        with torch.device(device):
            self.unet = network.build()
            self._x = torch.randn(BATCH, 4, side, side).to(dtype)
            self._t = torch.full((BATCH,), 900.0)
            self._context = torch.randn(BATCH, 77, network.context_dim).to(dtype)
        webui_ldm.install()
        if dtype != torch.float32:
            _run_in(self.unet, dtype)

    @torch.inference_mode()
    def __call__(self, patched: Patched = nullcontext) -> Tensor:
        with patched():
            out: Tensor = self.unet(self._x, self._t, context=self._context)
            return out

    def held(self) -> list[Tensor]:
        """What is there before and after: weights and inputs."""
        return [*self.unet.parameters(), *self.unet.buffers(), self._x, self._t, self._context]

    def with_technique(self, name: str, settings: Settings) -> Patched:
        plan, call = self.plan(name, settings)
        unet = HookedUnet(self.unet, plan)

        @contextmanager
        def patched() -> Iterator[None]:
            with unet.open(call):
                yield

        return patched

    def plan(self, name: str, settings: Settings) -> tuple[Plan, Call]:
        schedule = NoiseSchedule.scaled_linear()
        facts = ModelFacts("SD 1.x (bench)", self._network.native, schedule, unet_topology(self.unet))
        run = Run("bench", FIRST_PASS, facts, self.latent, (schedule.sigma_max, 0.0))
        return make_plan({name: settings}, run), Call(run.sigma_at(MOMENT), 0)


def _run_in(unet: Any, dtype: torch.dtype) -> None:
    """As hosts run a UNet in half precision: all but the norms of residual blocks, which compute in float32."""
    unet.to(dtype).dtype = dtype
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm) and type(module) is not nn.GroupNorm:
            module.float()
    unet.time_embed.register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))


def operations(evaluation: Evaluation, patched: Patched = nullcontext) -> int:
    """Floating-point operations of one evaluation on the meta device."""
    # the counter knows matrix products, not the fused attention kernel of every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        evaluation(patched)
    return counter.get_total_flops()


def peak_bytes(evaluation: Evaluation, patched: Patched = nullcontext) -> int:
    """The most bytes held at once by tensors made during one evaluation on the meta device."""
    with _FusedAttention(), LiveBytes(evaluation.held()) as live:
        evaluation(patched)
    return live.peak


class _FusedAttention(TorchFunctionMode):
    """Attention in one kernel. On the meta device torch would take the form with all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, _, v = args[:3]
        batch, heads, tokens, _ = q.shape
        # fused kernels lay the heads of a token side by side: joining them is then no copy
        return q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages on a device that operations made and that are still referred to, and their peak."""

    def __init__(self, held: Iterable[Tensor], device: str = META) -> None:
        super().__init__()
        self._device = device
        self._known = {tensor.untyped_storage()._cdata for tensor in held}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device:
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
