"""Batches by length and token budget, and what happens when memory runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag import ConfigError, EpicEncoder
from epic_rag.backbone import Backbone
from epic_rag.batching import BatchOptions, embed, is_out_of_memory, token_batches
from epic_rag.prompt import Batch
from tests.helpers.banks import embedded

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
TEXTS = [f"{'a longer text ' * (n % 4)}number {n}" for n in range(13)]

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1099511627776 bytes. Error code 12 (Cannot allocate memory)"
)


class Limited:
    """Stands in for a backbone's forward: raises for batches above a number of rows."""

    def __init__(self, backbone: Backbone, rows: int, error: BaseException) -> None:
        self.forward = backbone.forward
        self.rows = rows
        self.error = error
        self.sizes: list[int] = []

    def __call__(self, batch: Batch, slots: torch.Tensor | None = None) -> torch.Tensor:
        self.sizes.append(len(batch.ids))
        if len(batch.ids) > self.rows:
            raise self.error
        return self.forward(batch, slots)


@PROPERTY
@given(
    lengths=st.lists(st.integers(0, 300), max_size=60),
    max_tokens=st.integers(1, 1000),
    max_rows=st.none() | st.integers(1, 10),
)
def test_every_row_once_within_the_caps_longest_first(
    lengths: list[int], max_tokens: int, max_rows: int | None
) -> None:
    batches = token_batches(lengths, max_tokens=max_tokens, max_rows=max_rows)
    flat = [row for batch in batches for row in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[row] for row in flat] == sorted(lengths, reverse=True)
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
        assert max_rows is None or len(batch) <= max_rows


@PROPERTY
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), max_tokens=st.integers(1, 1000))
def test_batches_are_as_full_as_the_order_allows(lengths: list[int], max_tokens: int) -> None:
    batches = token_batches(lengths, max_tokens=max_tokens)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > max_tokens


def test_rows_of_one_length_keep_their_order() -> None:
    assert token_batches([5, 5, 9, 5], max_tokens=10) == [[2], [0, 1], [3]]
    assert token_batches([], max_tokens=10) == []


@pytest.mark.parametrize(("max_tokens", "max_rows"), [(0, None), (-1, None), (10, 0), (10, -3)])
def test_a_cap_below_one_is_refused(max_tokens: int, max_rows: int | None) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        token_batches([1], max_tokens=max_tokens, max_rows=max_rows)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(CPU_MESSAGE)], ids=str
)
def test_out_of_memory_halves_the_batch(
    tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    whole = tiny_encoder.encode_document(TEXTS)
    limited = Limited(tiny_encoder.backbone, rows=3, error=error)
    monkeypatch.setattr(tiny_encoder.backbone, "forward", limited)
    halved = tiny_encoder.encode_document(TEXTS)
    assert limited.sizes == [13, 6, 3, 3, 7, 3, 4, 2, 2]
    np.testing.assert_allclose(halved, whole, atol=1e-5)


def test_halving_keeps_slots_with_their_rows(tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = [("a question", "an answer"), ("another question", "another answer")]
    from epic_rag import DemonstrationBank

    built = embedded(DemonstrationBank(bank), tiny_encoder)

    def encode() -> np.ndarray:
        return tiny_encoder.encode_query(TEXTS, bank=built, num_demonstrations=1, selection="nearest")

    whole = encode()
    limited = Limited(tiny_encoder.backbone, rows=2, error=torch.OutOfMemoryError())
    monkeypatch.setattr(tiny_encoder.backbone, "forward", limited)
    np.testing.assert_allclose(encode(), whole, atol=1e-5)
    assert max(limited.sizes) == 13


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("out of memory is only mentioned here"),
        ValueError("wrong"),
        IndexError("index out of range in self"),
    ],
    ids=str,
)
def test_no_other_error_shrinks_a_batch(
    tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    limited = Limited(tiny_encoder.backbone, rows=3, error=error)
    monkeypatch.setattr(tiny_encoder.backbone, "forward", limited)
    with pytest.raises(type(error)) as caught:
        tiny_encoder.encode_document(TEXTS)
    assert caught.value is error
    assert limited.sizes == [13]
    assert not is_out_of_memory(error)


def test_one_row_that_does_not_fit_says_so(tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = Limited(tiny_encoder.backbone, rows=0, error=torch.OutOfMemoryError("no room"))
    monkeypatch.setattr(tiny_encoder.backbone, "forward", limited)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        tiny_encoder.encode_document(TEXTS[:4])
    assert limited.sizes == [4, 2, 1]


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("max_rows", [None, 1, 5])
def test_the_batches_decide_no_vector(tiny_encoder: EpicEncoder, max_tokens: int, max_rows: int | None) -> None:
    rows = tiny_encoder.prompt.documents(TEXTS)
    vectors = embed(tiny_encoder.backbone, rows, None, BatchOptions(1, max_tokens, max_rows=max_rows))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, tiny_encoder.encode_document(TEXTS), atol=1e-5)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_one_is_refused(tiny_encoder: EpicEncoder, size: int) -> None:
    with pytest.raises(ConfigError, match=f"batch_size is {size}. Pass 1 or more"):
        tiny_encoder.encode_document(["a"], batch_size=size)


def test_a_progress_bar_only_when_asked(tiny_encoder: EpicEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_encoder.encode_document(TEXTS)
    assert capsys.readouterr() == ("", "")
    tiny_encoder.encode_document(TEXTS, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "13/13" in err
