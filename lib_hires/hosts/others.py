"""Other extensions at work beside ours: what they have put on the self-attention of the network, and which are on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lib_hires.topology import self_attention_modules

_TILES = "__webui_hypertile_params"  # the attribute that the WebUI's HyperTile leaves on a layer
_ELSEWHERE = "acts in the layers and steps where no technique of this plugin does"
_MERGED = "has merged the tokens: techniques that need the whole map leave such layers to it"
_INSIDE = "serves the rows and maps that this plugin leaves as they are"


def on_modules(network: Any) -> list[str]:
    """Of an LDM UNet: methods of modules are replaced, and block classes swapped."""
    found = []
    if any(type(module).__name__ == "ToMeBlock" for module in network.modules()):
        found.append(f"token merging (ToMe) {_MERGED}")
    layers = list(self_attention_modules(network).values())
    tiled = [layer for layer in layers if getattr(getattr(layer, _TILES, None), "enabled", False)]
    if tiled:
        found.append(f"HyperTile {_ELSEWHERE}")
    replaced = (vars(layer)["forward"] for layer in layers if "forward" in vars(layer) and not hasattr(layer, _TILES))
    return found + [f"{name} {_ELSEWHERE}" for name in _names(replaced)]


def on_patcher(patcher: Any) -> list[str]:
    """Of a UNet patcher (Forge and its relatives): functions in its options."""
    options = patcher.model_options.get("transformer_options", {})
    patches, replaced = options.get("patches", {}), options.get("patches_replace", {}).get("attn1", {})
    merged = [f for f in patches.get("attn1_patch", []) if "tomesd" in _module(f)]
    found = [f"token merging (ToMe) {_MERGED}"] if merged else []
    others = [f for f in patches.get("attn1_patch", []) if f not in merged]
    return found + [f"{name} {_INSIDE}" for name in _names([*others, *replaced.values()])]


def scripts_on(p: Any) -> tuple[str, ...]:
    """Titles of the scripts of p that are always visible and switched on: by custom their first value says so."""
    arguments = list(getattr(p, "script_args", ()))
    scripts = getattr(getattr(p, "scripts", None), "alwayson_scripts", ())
    return tuple(script.title() for script in scripts if arguments[script.args_from : script.args_to][:1] == [True])


def _names(functions: Iterable[Any]) -> list[str]:
    """The modules that functions come from, each once: extensions are named by them."""
    return list(dict.fromkeys(_module(function) for function in functions))


def _module(function: Any) -> str:
    return str(getattr(function, "__module__", None) or type(function).__module__)
