"""A prompt that is computed once gives the vectors of a prompt that is computed every time."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.backbone import Backbone
from epic_rag.prefix_cache import CachedPrefix, PrefixCache, can_cache, pack_rows
from tests.conftest import make_encoder
from tests.helpers.banks import embedded
from tests.helpers.families import DECODERS, INSTRUCTION, TEXTS, config, encoder_of, transformer

PAIRS = [(f"question {number} about the fox", f"the dog {number} says hello") for number in range(6)]
WIDE = {"sliding_window": 256}
# Families whose window is narrower than the prompts here must not use the cache; with a wide one they do.
CASES = [(family, {}) for family in DECODERS if family != "gemma3_images"] + [
    (family, WIDE) for family in ("mistral", "gemma2", "gemma3")
]


def both(encoder: EpicEncoder, texts: Any, **options: Any) -> tuple[Any, Any]:
    """The vectors with the cache (twice, so that the second time it is used) and without."""
    encoder.prefix_cache = PrefixCache()
    first = encoder.encode_query(texts, **options)
    np.testing.assert_array_equal(encoder.encode_query(texts, **options), first)
    cached = len(encoder.prefix_cache)
    encoder.prefix_cache = None
    return cached, (first, encoder.encode_query(texts, **options))


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(("family", "changes"), CASES, ids=[f"{name}{'-wide' if more else ''}" for name, more in CASES])
def test_every_family_gives_the_same_vectors(family: str, changes: dict[str, Any], pooling: Any) -> None:
    encoder = encoder_of(Backbone(transformer(config(family, **changes)), pooling=pooling))
    bank = embedded(DemonstrationBank(PAIRS, instruction=INSTRUCTION), encoder)
    narrow = getattr(encoder.backbone.transformer.config, "sliding_window", None) == 8
    for options in (
        {"bank": bank, "num_demonstrations": 4},
        {"bank": bank, "num_demonstrations": 4, "selection": "nearest"},
        {"bank": bank, "num_demonstrations": 2, "strategy": "text"},
        {"instruction": INSTRUCTION},
    ):
        cached, (one, other) = both(encoder, TEXTS, **options)
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert (cached == 0) == narrow, options


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_implementation_does_not_matter(attention: str) -> None:
    encoder = make_encoder()
    encoder.backbone.transformer.set_attn_implementation(attention)
    bank = embedded(DemonstrationBank(PAIRS, instruction=INSTRUCTION), encoder)
    cached, (one, other) = both(encoder, TEXTS, bank=bank)
    assert cached
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_half_precision_stays_near(tiny_encoder: EpicEncoder) -> None:
    encoder = copy.deepcopy(tiny_encoder)
    encoder.backbone.to(torch.bfloat16)
    bank = embedded(DemonstrationBank(PAIRS, instruction=INSTRUCTION), encoder)
    _, (one, other) = both(encoder, TEXTS, bank=bank)
    assert (one * other).sum(axis=1).min() > 0.999


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="abcdef ", max_size=60), min_size=1, max_size=9),
    k=st.integers(0, 6),
    batch_size=st.none() | st.integers(1, 4),
    each=st.booleans(),
)
def test_any_batch_gives_the_same_vectors(texts: list[str], k: int, batch_size: int | None, each: bool) -> None:
    encoder = make_encoder()
    if each:
        encoder.prompt.template = type(encoder.prompt.template)(demonstration_instructions="each", separators="none")
    bank = embedded(DemonstrationBank(PAIRS, instruction=INSTRUCTION), encoder)
    _, (one, other) = both(encoder, texts, bank=bank, num_demonstrations=k, batch_size=batch_size)
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.fixture
def encoder() -> EpicEncoder:
    return make_encoder()


def test_queries_share_one_prompt(encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = embedded(DemonstrationBank(PAIRS, instruction=INSTRUCTION), encoder)
    cache = encoder.prefix_cache = PrefixCache()
    widths: list[tuple[int, ...]] = []
    forward = encoder.backbone.transformer.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        widths.append(tuple(options["inputs_embeds"].shape[:2]))
        return forward(*arguments, **options)

    monkeypatch.setattr(encoder.backbone.transformer, "forward", counted)
    prompt = len(encoder.prompt.prefix(INSTRUCTION, num_slots=6).ids)
    encoder.encode_query(["one", "two and three"], bank=bank)
    encoder.encode_query("four", bank=bank)
    assert widths[0] == (1, prompt)  # once, for both calls
    assert len(widths) == 3
    own = [len(row.ids) for row in encoder.prompt.queries(encoder.prompt.prefix(INSTRUCTION), ["one", "two and three"])]
    assert widths[1] == (1, sum(own) - 2 * len(encoder.prompt.prefix(INSTRUCTION).ids))  # one pack, no padding
    assert len(cache) == 1


def test_other_vectors_weights_and_texts_are_other_prompts(encoder: EpicEncoder) -> None:
    cache = encoder.prefix_cache
    assert cache is not None
    bank = embedded(DemonstrationBank(PAIRS, instruction=INSTRUCTION), encoder)
    before = encoder.encode_query("a fox", bank=bank)
    encoder.encode_query("a fox", bank=embedded(DemonstrationBank(PAIRS[::-1], instruction=INSTRUCTION), encoder))
    encoder.encode_query("a fox", bank=bank, num_demonstrations=3)
    made = len(cache)
    with torch.no_grad():
        for parameter in encoder.backbone.parameters():
            parameter.mul_(1.5)  # as an optimiser does: nobody says so
    after = encoder.encode_query("a fox", bank=bank)
    assert len(cache) == made + 1
    assert not np.allclose(before, after, atol=1e-3)
    encoder.invalidate_caches()
    assert len(cache) == 0


def entry(length: int) -> CachedPrefix:
    return CachedPrefix((torch.zeros(1, 1, length, 4),), (torch.zeros(1, 1, length, 4),), length)


def test_the_cache_is_bounded_by_number_and_by_memory(encoder: EpicEncoder) -> None:
    cache = PrefixCache(max_entries=3)
    for number in range(5):
        assert cache.get(encoder.backbone, [5, 6, number]) is not None
    assert len(cache) == 3
    size = cache.nbytes // 3
    kept = cache.get(encoder.backbone, [5, 6, 4])
    assert cache.get(encoder.backbone, [5, 6, 4]) is kept
    small = PrefixCache(max_bytes=2 * size)
    for number in range(5):
        small.get(encoder.backbone, [5, 6, number])
    assert len(small) == 2
    none = PrefixCache(max_bytes=size - 1)
    assert none.get(encoder.backbone, [5, 6, 7]) is not None
    assert len(none) == 0


def test_memory_is_that_of_one_row_of_keys_and_values(encoder: EpicEncoder) -> None:
    found = PrefixCache().get(encoder.backbone, list(range(10)))
    settings_ = encoder.backbone.transformer.config
    heads = getattr(settings_, "num_key_value_heads", settings_.num_attention_heads)
    width = settings_.hidden_size // settings_.num_attention_heads
    assert found is not None
    assert found.nbytes == settings_.num_hidden_layers * 2 * heads * 10 * width * 4


def test_threads_share_a_cache(encoder: EpicEncoder) -> None:
    bank = embedded(DemonstrationBank(PAIRS, instruction=INSTRUCTION), encoder)
    prefixes = [encoder.prompt.prefix(f"find {number}").ids for number in range(6)]
    expected = [PrefixCache().get(encoder.backbone, ids) for ids in prefixes]
    cache = PrefixCache(max_entries=4)

    def ask(number: int) -> bool:
        found = cache.get(encoder.backbone, prefixes[number % 6])
        other = expected[number % 6]
        assert found is not None
        assert other is not None
        return all(torch.equal(a, b) for a, b in zip(found.keys, other.keys, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))
    assert len(cache) <= 4
    # A forward pass joins its own copy: what is kept is as it was.
    vectors = encoder.encode_query(["a", "b"], bank=bank)
    np.testing.assert_array_equal(encoder.encode_query(["a", "b"], bank=bank), vectors)


def test_copies_and_pickles_start_empty(encoder: EpicEncoder) -> None:
    cache = PrefixCache(max_entries=5, max_bytes=1000)
    cache.get(encoder.backbone, [1, 2])
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (len(other), other.max_entries, other.max_bytes) == (0, 5, 1000)


def test_bidirectional_models_have_no_prompt_to_keep(tiny_bidirectional_encoder: EpicEncoder) -> None:
    assert not can_cache(tiny_bidirectional_encoder.backbone, 10)
    cached, (one, other) = both(tiny_bidirectional_encoder, TEXTS, instruction=INSTRUCTION)
    assert cached == 0
    np.testing.assert_array_equal(one, other)
    tiny_bidirectional_encoder.prefix_cache = PrefixCache()


@pytest.mark.parametrize(
    ("lengths", "tokens", "rows", "expected"),
    [
        ([], 4, None, []),
        ([1, 2, 3], 3, None, [[0, 1], [2]]),
        ([9, 1], 3, None, [[0], [1]]),
        ([1, 1, 1], 9, 2, [[0, 1], [2]]),
    ],
)
def test_packs(lengths: list[int], tokens: int, rows: int | None, expected: list[list[int]]) -> None:
    assert pack_rows(lengths, tokens, rows) == expected


def test_memory_that_runs_out_halves_a_pack(encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    from epic_rag import batching

    expected = encoder.encode_query(TEXTS, instruction=INSTRUCTION)
    packed = batching.embed_packed
    tried = []

    def scarce(backbone: Any, prefix: Any, rows: Any, vectors: Any) -> Any:
        tried.append(sum(map(len, rows)))
        if tried[-1] > 2:
            raise MemoryError
        return packed(backbone, prefix, rows, vectors)

    monkeypatch.setattr(batching, "embed_packed", scarce)
    np.testing.assert_allclose(encoder.encode_query(TEXTS, instruction=INSTRUCTION), expected, atol=1e-6)
    assert tried == [4, 2, 2]
