"""A frozen random CLIP text model with the real CLIP tokenizer, rebuilt from names and seeds instead of stored.

Nothing about it is trained: cross attention learns to read whatever distinct vectors the words get. Every tensor comes
from a generator seeded by the parameter's own name, so the result does not depend on the transformers version, and a
real WebUI that loads the assembled checkpoint computes the same encodings.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import itertools
import json
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN_SIZE = 64
LAYERS = 2
HEADS = 4
TOKENS = 77
VOCABULARY_SIZE = 49408
START, END = "<|startoftext|>", "<|endoftext|>"
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
SEED = 2024

CLIP_CONFIG: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 2 * HIDDEN_SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": TOKENS,
    "vocab_size": VOCABULARY_SIZE,
    "projection_dim": HIDDEN_SIZE,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
    "torch_dtype": "float32",
}


# ------------------------------------------------------------------------------------------------------ tokenizer


def find_bpe_file() -> Path:
    """The merge list that the packages `clip` and `open_clip` carry; they are located, never imported."""
    for package in ("clip", "open_clip"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / BPE_FILE).is_file():
                return Path(folder) / BPE_FILE
    raise FileNotFoundError(f"{BPE_FILE}: install clip-anytorch (no dependencies needed) for CLIP's vocabulary")


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte, in the order that numbers CLIP's first tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@functools.cache
def merges() -> tuple[tuple[str, str], ...]:
    """CLIP's BPE merges, most frequent first."""
    lines = gzip.decompress(find_bpe_file().read_bytes()).decode("utf-8").split("\n")
    count = VOCABULARY_SIZE - 2 * 256 - 2
    return tuple(tuple(line.split()) for line in lines[1 : 1 + count])  # type: ignore[misc]


@functools.cache
def vocabulary() -> dict[str, int]:
    """Token to number: bytes, bytes that end a word, merges, start and end."""
    letters = list(byte_alphabet().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges()] + [START, END]
    return {token: number for number, token in enumerate(tokens)}


@functools.cache
def _merge_ranks() -> dict[tuple[str, str], int]:
    return {pair: rank for rank, pair in enumerate(merges())}


def split_word(word: str) -> list[str]:
    """Apply the BPE merges to one word, best-ranked pair first."""
    alphabet, ranks = byte_alphabet(), _merge_ranks()
    parts = [alphabet[byte] for byte in word.encode("utf-8")]
    parts[-1] += "</w>"
    while len(parts) > 1:
        pairs = list(itertools.pairwise(parts))
        best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[best] not in ranks:
            break
        parts[best : best + 2] = ["".join(pairs[best])]
    return parts


def tokenize(text: str) -> list[int]:
    """Turn a prompt into 77 token numbers: start, words, end, padded with end as SD 1.x hosts do."""
    words = re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+", text.lower())
    numbers = [vocabulary()[part] for word in words for part in split_word(word)][: TOKENS - 2]
    end = vocabulary()[END]
    return [vocabulary()[START], *numbers] + [end] * (TOKENS - 1 - len(numbers))


def write_tokenizer(folder: Path) -> None:
    """Write the folder from which `CLIPTokenizer` and `CLIPTextModel` load offline."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    tokenizer = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1))
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG, indent=1))


# ----------------------------------------------------------------------------------------------------- text model


def plain_name(name: str) -> str:
    """A parameter's name without the prefix that some transformers versions put in front."""
    return name.removeprefix("text_model.")


def random_parameter(name: str, shape: torch.Size) -> Tensor:
    """The frozen value of one parameter, from a generator seeded by its plain name.

    Words dominate positions so that attention finds them anywhere in a prompt. LayerNorms are off (1, 0) because
    hosts divide by the encoding's mean, which a plain last LayerNorm makes zero.
    """
    generator = torch.Generator().manual_seed(SEED + zlib.crc32(plain_name(name).encode()))
    noise = torch.randn(shape, generator=generator)
    if "embedding" in name:
        return noise * (0.3 if "position" in name else 1.0)
    if "layer_norm" in name or "layernorm" in name:
        return 0.1 * noise + (1.0 if name.endswith("weight") else 0.1)
    if noise.dim() == 2:
        return noise / shape[1] ** 0.5
    return 0.02 * noise


def build_text_model() -> nn.Module:
    """Build transformers' `CLIPTextModel` with the frozen random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    options = {k: v for k, v in CLIP_CONFIG.items() if k not in ("architectures", "model_type", "torch_dtype")}
    model = CLIPTextModel(CLIPTextConfig(**options)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_parameter(name, parameter.shape))
    return model.eval().requires_grad_(False)


def text_state_dict() -> dict[str, Tensor]:
    """The text model's weights under the names that SD 1.x checkpoints use after `cond_stage_model.transformer.`."""
    parameters = build_text_model().named_parameters()
    weights = {"text_model." + plain_name(name): value.detach().clone() for name, value in parameters}
    weights["text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    return weights


class TextEncoder:
    """Encodes prompts as SD 1.x hosts do at clip skip 1: the last hidden state after the final LayerNorm."""

    def __init__(self) -> None:
        self.model = build_text_model()

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Encode prompts to (B,77,C)."""
        tokens = torch.tensor([tokenize(prompt) for prompt in prompts])
        return self.model(input_ids=tokens).last_hidden_state
