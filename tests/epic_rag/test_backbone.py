"""The transformer: every family alike, padding that moves nothing, slots, projector and pooling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel

from epic_rag import ConfigError, EpicEncoder
from epic_rag.backbone import PROJECTORS, Backbone, Projector, ProjectorKind, hash_tensors, is_causal
from epic_rag.prompt import EncoderInput, PromptBuilder, collate
from tests.helpers.families import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    INSTRUCTION,
    TEXTS,
    TOKENIZER,
    by_input_ids,
    config,
    embed,
    encoder,
    encoder_of,
    transformer,
    unit_vectors,
)

# Equality with the model's own path, and of batches with single rows


@pytest.mark.parametrize("family", DECODERS)
def test_zero_shot_is_the_models_own_path(family: str) -> None:
    made = encoder(family)
    model = made.backbone.transformer
    for text in TEXTS:
        # Tokenised as one string: the pieces of the prompt must not show.
        query = by_input_ids(model, [*TOKENIZER(f"Instruct: {INSTRUCTION}\nQuery: {text}")["input_ids"], 0])[-1]
        document = by_input_ids(model, [*TOKENIZER(text)["input_ids"][:63], 0])[-1]
        np.testing.assert_allclose(made.encode_query(text, instruction=INSTRUCTION), query / query.norm(), atol=1e-5)
        np.testing.assert_allclose(made.encode_document(text), document / document.norm(), atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_zero_shot_is_the_mean_over_the_texts_own_tokens(family: str) -> None:
    made = encoder(family)
    model = made.backbone.transformer
    for text in TEXTS:
        ids = [*TOKENIZER(f"Instruct: {INSTRUCTION}\nQuery: {text}")["input_ids"], 0]
        before = len(TOKENIZER(f"Instruct: {INSTRUCTION}\nQuery:")["input_ids"])
        query = by_input_ids(model, ids)[before:].mean(dim=0)
        document = by_input_ids(model, [*TOKENIZER(text)["input_ids"][:63], 0]).mean(dim=0)
        np.testing.assert_allclose(made.encode_query(text, instruction=INSTRUCTION), query / query.norm(), atol=1e-5)
        np.testing.assert_allclose(made.encode_document(text), document / document.norm(), atol=1e-5)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize(
    ("family", "side"), [(name, "right") for name in FAMILIES] + [(name, "left") for name in DECODERS]
)
def test_batched_is_one_by_one(family: str, side: str, k: int) -> None:
    made = encoder(family)
    prefix = made.prompt.prefix(INSTRUCTION, num_slots=k)
    rows = made.prompt.queries(prefix, TEXTS)
    slots = unit_vectors(2 * k * len(rows)).split(2 * k) if k else [None] * len(rows)
    single = torch.cat([embed(made.backbone, [row], vectors) for row, vectors in zip(rows, slots, strict=True)])
    batched = embed(made.backbone, rows, torch.cat(slots) if k else None, side)
    torch.testing.assert_close(batched, single, atol=1e-5, rtol=0)
    # Vectors that were all alike would pass, whatever the padding did.
    assert (single @ single.T).fill_diagonal_(0).max() < 0.999


def test_left_padding_needs_the_positions_that_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder("gpt2")
    rows = made.prompt.documents(TEXTS)
    right = embed(made.backbone, rows)
    monkeypatch.setattr(made.backbone, "takes_positions", False)
    assert (embed(made.backbone, rows, side="left") - right).abs().max() > 1e-2


@pytest.mark.parametrize("family", DECODERS)
def test_left_padding_gives_the_same_through_the_encoder(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder(family)
    right = made.encode_query(TEXTS, instruction=INSTRUCTION)
    monkeypatch.setattr(made, "padding_side", "left")
    np.testing.assert_allclose(made.encode_query(TEXTS, instruction=INSTRUCTION), right, atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_left_padding_is_refused_for_bidirectional_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder(family)
    monkeypatch.setattr(made, "padding_side", "left")
    with pytest.raises(ConfigError, match=r"padding_side is 'left', but the model is bidirectional.*'right'"):
        made.encode_document(["a"])


# Slots


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slot_changes_the_vector(family: str) -> None:
    backbone = encoder(family).backbone
    row = encoder(family).prompt.queries(encoder(family).prompt.prefix(INSTRUCTION, num_slots=1), ["hello"])
    one, other, swapped = (
        embed(backbone, row, vectors)[0]
        for vectors in (unit_vectors(2), unit_vectors(2, seed=1), unit_vectors(2).flip(0))
    )
    for left, right in ((one, other), (one, swapped), (other, swapped)):
        assert (left - right).abs().max() > 1e-4


def seen_embeddings(backbone: Backbone, rows: list[EncoderInput], slots: torch.Tensor | None) -> torch.Tensor:
    """What the transformer is given as inputs_embeds."""
    seen: list[torch.Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert not args
        assert "input_ids" not in kwargs
        seen.append(kwargs["inputs_embeds"].clone())

    handle = backbone.transformer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        embed(backbone, rows, slots)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "bert"])
def test_slots_are_filled_on_the_output_of_the_embedding_module(family: str) -> None:
    backbone, prompt = encoder(family).backbone, encoder(family).prompt
    rows = prompt.queries(prompt.prefix(INSTRUCTION, num_slots=2), ["hello", "the quick brown fox"])
    batch = collate(rows, pad_id=1)
    vectors = unit_vectors(8)
    seen = seen_embeddings(backbone, rows, vectors)
    with torch.inference_mode():
        plain = backbone.transformer.get_input_embeddings()(batch.ids)
        filled = backbone.projector(vectors)
    is_slot = torch.zeros(batch.ids.shape, dtype=torch.bool)
    is_slot[batch.slot_rows, batch.slot_columns] = True
    assert is_slot.sum() == 8
    torch.testing.assert_close(seen[batch.slot_rows, batch.slot_columns], filled)
    torch.testing.assert_close(seen[~is_slot], plain[~is_slot])


def test_a_scale_inside_the_embedding_module_counts_for_the_slots() -> None:
    backbone = encoder("gemma2").backbone
    table = backbone.transformer.get_input_embeddings().weight.detach()
    norm = table.norm(dim=-1).mean() * 32**0.5  # Gemma multiplies by the root of its width
    projected = backbone.projector(unit_vectors(5)).norm(dim=-1)
    torch.testing.assert_close(projected, norm.expand(5), rtol=1e-2, atol=0)


def test_gradients_reach_the_slots_and_the_projector() -> None:
    backbone = Backbone(transformer(config("llama")))
    prompt = encoder("llama").prompt
    vectors = unit_vectors(2).requires_grad_()
    rows = prompt.queries(prompt.prefix(INSTRUCTION, num_slots=1), ["hello"])
    backbone(collate(rows, pad_id=1), vectors).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().min(dim=1).values.max() > 0
    for parameter in backbone.projector.parameters():
        assert parameter.grad is not None


# The projector


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_projector_starts_as_identity_times_the_norm(kind: ProjectorKind) -> None:
    vectors = unit_vectors(4)
    torch.testing.assert_close(Projector(kind, 32, 7.5)(vectors), 7.5 * vectors)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_an_untrained_projector_does_not_depend_on_the_moment(kind: ProjectorKind) -> None:
    first, second = (hash_tensors(Projector(kind, 32, 2.0).state_dict().items()) for _ in range(2))
    assert first == second


def test_the_projectors_differ_in_what_they_can_learn() -> None:
    sizes = {kind: sum(value.numel() for value in Projector(kind, 8, 1.0).parameters()) for kind in PROJECTORS}
    assert sizes == {"scale": 1, "linear": 8 * 8 + 8, "mlp": 1 + 2 * (8 * 8 + 8)}


# Settings


def test_pooling_follows_the_attention() -> None:
    assert {name: encoder(name).backbone.pooling for name in FAMILIES} == {
        **dict.fromkeys(DECODERS, "last"),
        **dict.fromkeys(ENCODERS, "mean"),
    }


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_pooling_by_hand(family: str, pooling: Any) -> None:
    model = encoder(family).backbone.transformer
    made = encoder_of(Backbone(model, pooling=pooling))
    states = by_input_ids(model, [*TOKENIZER(TEXTS[3])["input_ids"], 0])
    expected = {"last": states[-1], "mean": states.mean(dim=0), "cls": states[0]}[pooling]
    # In one batch with a longer text, so that there is padding to be left out.
    got = made.encode_document([TEXTS[2], TEXTS[3]])[1]
    np.testing.assert_allclose(got, expected / expected.norm(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "values", "causal"),
    [
        ("LlamaConfig", {}, True),
        ("GPT2Config", {}, True),
        ("BertConfig", {}, False),
        ("XLMRobertaConfig", {}, False),
        ("Gemma3TextConfig", {"use_bidirectional_attention": True}, False),
        ("Gemma3TextConfig", {}, True),
    ],
)
def test_attention_is_read_from_the_configuration(name: str, values: dict[str, Any], causal: bool) -> None:
    assert is_causal(getattr(transformers, name)(**values)) is causal


@pytest.mark.parametrize(("family", "room"), [("llama", 256), ("gpt2", 256), ("bert", 256), ("gemma3_images", 256)])
def test_the_most_positions(family: str, room: int) -> None:
    assert encoder(family).backbone.max_positions == room


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_positions_that_are_counted_from_the_padding_leave_less_room(family: str) -> None:
    backbone = encoder(family).backbone
    assert backbone.max_positions == 254
    full = EncoderInput(tuple([5] * 254))
    assert embed(backbone, [full]).shape == (1, 32)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        embed(backbone, [EncoderInput(tuple([5] * 255))])
    long = EpicEncoder(backbone, PromptBuilder(TOKENIZER, max_query_tokens=999, max_positions=backbone.max_positions))
    assert long.encode_query("a fox " * 999, instruction=INSTRUCTION).shape == (32,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pooling": "max"}, "Unknown pooling 'max'. Choose one of last, mean, cls"),
        ({"projector": "conv"}, "Unknown projector 'conv'. Choose one of scale, linear, mlp"),
    ],
)
def test_unknown_settings_list_the_known_ones(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backbone(encoder("llama").backbone.transformer, **values)


def test_models_that_cannot_be_encoders_are_refused() -> None:
    pair = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match=r"T5Model is an encoder-decoder.*Use a decoder LLM or a bidirectional"):
        Backbone(AutoModel.from_config(pair))
    narrow = transformers.AlbertConfig(
        vocab_size=50,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(ConfigError, match="AlbertModel has token embeddings of width 8 and states of width 16"):
        Backbone(AutoModel.from_config(narrow))


# Hashing


def test_a_hash_knows_names_shapes_and_values_and_no_order_or_width() -> None:
    tensors = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3])}
    first = hash_tensors(tensors.items())
    assert hash_tensors(reversed(list(tensors.items()))) == first
    assert hash_tensors({**tensors, "a": tensors["a"].half()}.items()) == first
    changed = [
        {**tensors, "a": torch.tensor([[1.0], [2.0]])},
        {**tensors, "a": torch.tensor([[1.0, 2.5]])},
        {**tensors, "b": torch.tensor([4])},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert first not in {hash_tensors(other.items()) for other in changed}
