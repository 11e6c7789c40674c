"""The frozen text encoder: CLIP's own tokens, the same numbers everywhere, captions well apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib_hires.hosts.bench import scenes, text

GOLDEN_EMBEDDING = [-0.2760876, -1.2128862, 0.4695384]
GOLDEN_NORM = [1.0379492, 1.1576607, 1.1124728]
PROMPTS = ["a red ring", "It's 42 élan, (magenta) diamonds!! under_score", "  Hello--world 3.5", ""]


@pytest.fixture(scope="module")
def encoder() -> text.TextEncoder:
    return text.TextEncoder()


def test_tokens_are_those_of_the_real_tokenizer(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    text.write_tokenizer(tmp_path)
    real = CLIPTokenizer.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        assert real(prompt, padding="max_length", truncation=True, max_length=77)["input_ids"] == text.tokenize(prompt)


def test_long_prompts_are_cut_to_77_tokens() -> None:
    numbers = text.tokenize("ring " * 100)
    assert len(numbers) == 77
    assert numbers[-1] == text.vocabulary()[text.END]


def test_encodings_are_deterministic_and_independent_of_the_batch(encoder: text.TextEncoder) -> None:
    together = encoder.encode(PROMPTS)
    alone = torch.cat([text.TextEncoder().encode([prompt]) for prompt in PROMPTS])
    assert together.shape == (len(PROMPTS), 77, text.HIDDEN_SIZE)
    assert torch.allclose(together, alone, atol=1e-5)


def test_parameters_have_known_values() -> None:
    """Golden numbers: a change here makes the trained weights worthless."""
    weights = text.text_state_dict()
    embedding = weights["text_model.embeddings.token_embedding.weight"]
    norm = weights["text_model.final_layer_norm.weight"]
    assert embedding[0, :3].tolist() == pytest.approx(GOLDEN_EMBEDDING, abs=1e-5)
    assert norm[:3].tolist() == pytest.approx(GOLDEN_NORM, abs=1e-5)


def test_the_encoding_has_no_zero_mean(encoder: text.TextEncoder) -> None:
    assert float(encoder.encode(PROMPTS).mean(dim=(1, 2)).abs().min()) > 0.01


def test_captions_differ_clearly_at_the_words_that_differ(encoder: text.TextEncoder) -> None:
    encodings = encoder.encode(list(scenes.CAPTIONS))
    norm = float(encodings.norm(dim=-1).mean())
    distance = (encodings[:, None] - encodings[None]).norm(dim=-1).amax(dim=-1) + 1e9 * torch.eye(len(encodings))
    assert float(distance.min()) > 0.3 * norm
