"""A tiny random model of every family of transformers that the tests know, on one tokenizer."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from epic_rag import EpicEncoder
from epic_rag.backbone import Backbone
from epic_rag.prompt import EncoderInput, PromptBuilder, collate
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer()
INSTRUCTION = "Given a question, retrieve passages that answer it"
# Of very different lengths, so that a batch is mostly padding.
TEXTS = ["hello", "", "the quick brown fox jumps over the lazy dog " * 3, "def encode(texts): return model(texts)"]

SHAPE = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
# Narrower than the longest text, so that it takes part.
WINDOW = {**GROUPED, "head_dim": 8, "sliding_window": 8}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", WINDOW),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", WINDOW),
    "gemma3": ("Gemma3TextConfig", WINDOW),
    "phi3": ("Phi3Config", GROUPED),
    "gpt_neox": ("GPTNeoXConfig", SHAPE),
    # Learned absolute positions: with these a wrong position_ids shows.
    "gpt2": ("GPT2Config", {**SHAPE, "n_inner": 64}),
    # A text model inside a model of text and images: the settings lie one level deeper.
    "gemma3_images": (
        "Gemma3Config",
        {
            "text_config": WINDOW,
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
    ),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SHAPE),
    "roberta": ("RobertaConfig", SHAPE),
    "mpnet": ("MPNetConfig", SHAPE),
    "distilbert": ("DistilBertConfig", {**SHAPE, "hidden_dim": 64}),
    "modernbert": ("ModernBertConfig", {**SHAPE, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 0}),
}
FAMILIES = {**DECODERS, **ENCODERS}


def config(family: str, **changes: Any) -> PretrainedConfig:
    name, values = FAMILIES[family]
    made: PretrainedConfig = getattr(transformers, name)(**{**values, **changes})
    return made


def transformer(made: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModel.from_config(made)
    return model.eval()


def encoder_of(backbone: Backbone) -> EpicEncoder:
    builder = PromptBuilder(
        TOKENIZER, max_query_tokens=64, max_document_tokens=64, max_positions=backbone.max_positions
    )
    return EpicEncoder(backbone.eval(), builder)


@functools.cache
def encoder(family: str) -> EpicEncoder:
    """One encoder a family for the whole file; no test changes it for good."""
    return encoder_of(Backbone(transformer(config(family))))


def unit_vectors(count: int, dimension: int = 32, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(drawn, dim=-1)


@torch.inference_mode()
def embed(backbone: Backbone, rows: list[EncoderInput], slots: torch.Tensor | None = None, side: str = "right") -> Any:
    return backbone(collate(rows, pad_id=1, padding_side=side), slots)  # type: ignore[arg-type]


@torch.inference_mode()
def by_input_ids(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """(tokens, dim) states of a model that is called as its own documentation calls it."""
    given = torch.tensor([ids])
    states: torch.Tensor = model(input_ids=given, attention_mask=torch.ones_like(given)).last_hidden_state
    return states[0]
