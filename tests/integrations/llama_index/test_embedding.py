"""EpicEmbedding: vectors, fields, round trips, and its use by LlamaIndex itself."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_index.core import Document, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.storage.kvstore import SimpleKVStore
from pydantic import ValidationError

from epic_rag import (
    BankError,
    CheckpointError,
    DemonstrationBank,
    EpicEncoder,
    FingerprintError,
    PromptError,
    TaskError,
    checkpoints,
)
from epic_rag.query_prompt import QUERY_STRATEGIES
from epic_rag.tasks import get_task
from llama_index.embeddings.epic import EpicEmbedding
from llama_index.embeddings.epic._cache import RoleKeyedCache
from tests.helpers.banks import embedded

TEXTS = ["To install the package, run pip.", "A brown fox.", "def encode(texts): return texts", "x" * 300]
PAIRS = [
    ("how do I undo this", "To undo a step, press Ctrl+Z."),
    ("where are settings", "Settings lie in a file."),
]


@pytest.fixture
def bank() -> DemonstrationBank:
    return DemonstrationBank(PAIRS, instruction="Given a question, retrieve passages that answer it")


def test_vectors_are_unit_length_lists_of_floats(embedding: EpicEmbedding) -> None:
    vector = embedding.get_query_embedding("a fox")
    assert len(vector) == embedding.encoder.dimension
    assert all(type(value) is float for value in vector)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)


def test_a_long_text_is_read_to_its_end_and_reported_once(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedding = EpicEmbedding(model=str(tiny_checkpoint))
    long = "the quick brown fox " * 60
    first, second = embedding.get_text_embedding_batch([long + "jumps over the dog", long + "reads a window manual"])
    assert not np.allclose(first, second, atol=1e-4)
    count = embedding.encoder.count_tokens([long + "jumps over the dog"])[0]
    (record,) = caplog.records
    assert f"{count} tokens" in record.getMessage()
    assert "reads 128 at a time" in record.getMessage()


def test_a_cached_vector_of_a_cut_text_is_not_used(tiny_checkpoint: Path) -> None:
    """Earlier versions stored the vector of a text's beginning under the text."""
    long, short = "the quick brown fox " * 60, "a fox"
    store = SimpleKVStore()
    embedding = EpicEmbedding(model=str(tiny_checkpoint), embeddings_cache=store)
    before = RoleKeyedCache(store)
    wrong = [[1.0] + [0.0] * 31] * 2
    before.store_vectors("document", embedding.document_fingerprint, [long, short], wrong)
    vectors = embedding.get_text_embedding_batch([long, short])
    assert vectors[1] == wrong[1]
    assert np.allclose(vectors[0], embedding.encoder.encode_document(long, long_texts="windows"), atol=1e-6)
    assert embedding.get_text_embedding_batch([long, short]) == vectors


def test_vectors_equal_the_encoders(embedding: EpicEmbedding, bank: DemonstrationBank) -> None:
    encoder = embedding.encoder
    expected = encoder.encode_document(TEXTS, long_texts="windows")
    assert np.allclose(embedding.get_text_embedding_batch(TEXTS), expected, atol=1e-6)
    assert np.allclose(embedding.get_text_embedding(TEXTS[0]), encoder.encode_document(TEXTS[0]), atol=1e-6)
    adapted = embedding.with_bank(bank)
    assert np.allclose(adapted.get_query_embedding("a fox"), encoder.encode_query("a fox", bank=bank), atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_batches_keep_order_and_values(tiny_checkpoint: Path, batch: int) -> None:
    embedding = EpicEmbedding(model=str(tiny_checkpoint), embed_batch_size=batch)
    one_by_one = [embedding.get_text_embedding(text) for text in TEXTS]
    assert np.allclose(embedding.get_text_embedding_batch(TEXTS), one_by_one, atol=1e-5)
    assert embedding.get_text_embedding_batch([]) == []


def test_async_equals_sync(embedding: EpicEmbedding) -> None:
    async def embed() -> tuple[list[float], list[float], list[list[float]]]:
        return (
            await embedding.aget_query_embedding("a fox"),
            await embedding.aget_text_embedding("a fox"),
            await embedding.aget_text_embedding_batch(TEXTS),
        )

    query, text, texts = asyncio.run(embed())
    assert np.allclose(query, embedding.get_query_embedding("a fox"), atol=1e-6)
    assert np.allclose(text, embedding.get_text_embedding("a fox"), atol=1e-6)
    assert np.allclose(texts, embedding.get_text_embedding_batch(TEXTS), atol=1e-6)


@pytest.mark.parametrize("text", ["", " ", "\u00e9\u4e2d\U0001f98a", "word " * 5000])
def test_unusual_texts(embedding: EpicEmbedding, text: str) -> None:
    for vector in (embedding.get_query_embedding(text), embedding.get_text_embedding(text)):
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-4)


def test_demonstrations_change_queries_only(embedding: EpicEmbedding, bank: DemonstrationBank) -> None:
    adapted = embedding.with_bank(bank)
    assert not np.allclose(adapted.get_query_embedding("a fox"), embedding.get_query_embedding("a fox"), atol=1e-3)
    assert adapted.get_text_embedding("a fox") == embedding.get_text_embedding("a fox")
    assert adapted.fingerprint != embedding.fingerprint
    assert adapted.document_fingerprint == embedding.document_fingerprint == embedding.encoder.fingerprint


def test_with_bank_object_folder_none(embedding: EpicEmbedding, bank: DemonstrationBank, tmp_path: Path) -> None:
    embedded(bank, embedding.encoder).save(tmp_path / "bank")
    from_object = embedding.with_bank(bank)
    from_folder = embedding.with_bank(tmp_path / "bank")
    assert from_folder.fingerprint == from_object.fingerprint
    assert from_folder.bank == str(tmp_path / "bank")
    assert from_folder.get_query_embedding("a fox") == from_object.get_query_embedding("a fox")
    assert from_object.with_bank(None).fingerprint == embedding.fingerprint
    assert from_object.encoder is embedding.encoder


def test_number_and_selection_reach_the_encoder(embedding: EpicEmbedding, bank: DemonstrationBank) -> None:
    one = embedding.with_bank(bank, num_demonstrations=1)
    expected = embedding.encoder.encode_query("a fox", bank=bank, num_demonstrations=1)
    assert np.allclose(one.get_query_embedding("a fox"), expected, atol=1e-6)
    nearest = embedding.with_bank(bank, num_demonstrations=1, selection="nearest")
    expected = embedding.encoder.encode_query("settings", bank=bank, num_demonstrations=1, selection="nearest")
    assert np.allclose(nearest.get_query_embedding("settings"), expected, atol=1e-6)


def test_strategy_reaches_the_encoder(embedding: EpicEmbedding, bank: DemonstrationBank) -> None:
    for strategy in QUERY_STRATEGIES:
        adapted = embedding.with_bank(bank, strategy=strategy)
        expected = embedding.encoder.encode_query("a fox", bank=bank, strategy=strategy)
        assert np.allclose(adapted.get_query_embedding("a fox"), expected, atol=1e-6)
        again = EpicEmbedding.from_dict(adapted.to_dict())
        assert (again.strategy, again.fingerprint) == (strategy, adapted.fingerprint)
        assert adapted.document_fingerprint == embedding.document_fingerprint
        assert adapted.for_documents().strategy is None
        assert adapted.with_bank(bank).strategy is None


def test_task_is_an_instruction(embedding: EpicEmbedding, bank: DemonstrationBank) -> None:
    by_task = embedding.model_copy(update={"task": "docs"})
    by_words = embedding.model_copy(update={"instruction": get_task("docs").instruction})
    assert by_task.get_query_embedding("a fox") == by_words.get_query_embedding("a fox")
    expected = embedding.encoder.encode_query("a fox", task="docs", bank=bank)
    assert np.allclose(by_task.with_bank(bank).get_query_embedding("a fox"), expected, atol=1e-6)


def test_symmetric_bank(embedding: EpicEmbedding) -> None:
    bank = DemonstrationBank(PAIRS, instruction="Retrieve texts with the same meaning", symmetric=True)
    adapted = embedding.with_bank(bank)
    assert adapted.symmetric
    assert np.allclose(adapted.get_text_embedding("a fox"), adapted.get_query_embedding("a fox"), atol=1e-6)
    assert adapted.document_fingerprint == adapted.fingerprint


def test_symmetric_task(tiny_checkpoint: Path) -> None:
    embedding = EpicEmbedding(model=str(tiny_checkpoint), task="sts")
    assert np.allclose(embedding.get_text_embedding("a fox"), embedding.get_query_embedding("a fox"), atol=1e-6)


def test_settings_reach_the_encoder(tiny_checkpoint: Path) -> None:
    embedding = EpicEmbedding(
        model=str(tiny_checkpoint),
        max_query_tokens=16,
        max_document_tokens=24,
        truncate_dim=8,
        dtype="bfloat16",
        device="cpu",
    )
    assert embedding.encoder.max_query_tokens == 16
    assert embedding.encoder.max_document_tokens == 24
    assert embedding.encoder.dtype == torch.bfloat16
    assert len(embedding.get_query_embedding("a fox")) == 8


def test_model_name_is_accepted_for_model(tiny_checkpoint: Path) -> None:
    by_alias = EpicEmbedding(model_name=str(tiny_checkpoint))
    assert by_alias.model == str(tiny_checkpoint)
    assert by_alias.model_name == by_alias.encoder.name
    # from_dict(data, model=...) passes both: the explicit one wins over the stored display name
    assert EpicEmbedding(model=str(tiny_checkpoint), model_name="gone").model == str(tiny_checkpoint)


def test_default_model_is_stored_by_name(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / checkpoints.DEFAULT_CHECKPOINT)
    monkeypatch.setattr(checkpoints, "_SHIPPED", tmp_path)
    embedding = EpicEmbedding()
    assert embedding.model == checkpoints.DEFAULT_CHECKPOINT  # a name, not a folder: it can be sent elsewhere
    assert EpicEmbedding.from_dict(embedding.to_dict()).fingerprint == embedding.fingerprint
    assert embedding.for_documents().encoder is embedding.encoder


def test_objects_for_text_fields(tiny_checkpoint: Path) -> None:
    embedding = EpicEmbedding.from_dict(
        {"model": tiny_checkpoint, "dtype": torch.float32, "device": torch.device("cpu")}
    )
    assert (embedding.model, embedding.dtype, embedding.device) == (str(tiny_checkpoint), "float32", "cpu")


# -- fingerprints -----------------------------------------------------------------------------------------------------


def fingerprints(embedding: EpicEmbedding) -> tuple[str | None, str]:
    return embedding.fingerprint, embedding.document_fingerprint


def test_fingerprint_is_stable(tiny_checkpoint: Path) -> None:
    first, second = (EpicEmbedding(model=str(tiny_checkpoint)) for _ in range(2))
    assert fingerprints(first) == fingerprints(second)


@pytest.mark.parametrize(
    ("change", "documents_too"),
    [
        ({"task": "docs"}, False),
        ({"instruction": "Retrieve"}, False),
        ({"instruction": ""}, False),
        ({"bank": DemonstrationBank(PAIRS)}, False),
        ({"bank": DemonstrationBank(PAIRS), "num_demonstrations": 1}, False),
        ({"bank": DemonstrationBank(PAIRS), "selection": "nearest"}, False),
        ({"bank": DemonstrationBank(PAIRS[:1])}, False),
        ({"truncate_dim": 16}, True),
        ({"max_document_tokens": 32}, True),
    ],
)
def test_fingerprint_changes_with_vectors(
    embedding: EpicEmbedding, change: dict[str, object], documents_too: bool
) -> None:
    changed = embedding.model_copy(update=change)
    assert changed.fingerprint != embedding.fingerprint
    assert (changed.document_fingerprint != embedding.document_fingerprint) == documents_too


def test_fingerprints_are_distinct(embedding: EpicEmbedding) -> None:
    bank = DemonstrationBank(PAIRS)
    variants = [
        {},
        {"bank": bank},
        {"bank": bank, "num_demonstrations": 1},
        {"bank": bank, "num_demonstrations": 0},
        {"bank": bank, "strategy": "task-vector"},
        {"bank": bank, "strategy": "text"},
        {"bank": bank, "instruction": "Retrieve"},
        {"bank": DemonstrationBank(PAIRS[::-1])},
        {"bank": DemonstrationBank(PAIRS, instruction="Find")},
        {"task": "docs"},
        {"task": "qa"},
        {"instruction": "Retrieve"},
    ]
    seen = [embedding.model_copy(update=variant).fingerprint for variant in variants]
    assert len(set(seen)) == len(variants)


def test_fingerprint_ignores_dtype(embedding: EpicEmbedding) -> None:
    assert fingerprints(embedding.model_copy(update={"dtype": "bfloat16"})) == fingerprints(embedding)


def test_check_documents(embedding: EpicEmbedding, other_checkpoint: Path) -> None:
    embedding.check_documents(embedding.with_bank(DemonstrationBank(PAIRS)).document_fingerprint)
    stored = EpicEmbedding(model=str(other_checkpoint)).document_fingerprint
    with pytest.raises(FingerprintError, match=rf"under {stored}.*has {embedding.document_fingerprint}\. .*embed"):
        embedding.check_documents(stored)
    with pytest.raises(FingerprintError, match="under None"):
        embedding.check_documents(None)


# -- round trips ------------------------------------------------------------------------------------------------------


def round_trips(embedding: EpicEmbedding) -> list[EpicEmbedding]:
    return [
        EpicEmbedding.from_dict(embedding.to_dict()),
        EpicEmbedding.from_json(embedding.to_json()),
        pickle.loads(pickle.dumps(embedding)),
        copy.deepcopy(embedding),
        copy.copy(embedding),
        embedding.model_copy(),
        EpicEmbedding.model_validate(embedding.model_dump()),
    ]


@pytest.mark.parametrize("with_bank", [False, True])
def test_round_trips(embedding: EpicEmbedding, bank: DemonstrationBank, with_bank: bool) -> None:
    original = embedding.with_bank(bank) if with_bank else embedding
    expected = original.get_query_embedding("a fox")
    for copied in round_trips(original):
        assert copied.get_query_embedding("a fox") == expected
        assert copied.to_dict() == original.to_dict()
        assert copied.document_fingerprint == original.document_fingerprint


def test_to_dict_is_plain_data(embedding: EpicEmbedding, bank: DemonstrationBank) -> None:
    data = json.loads(json.dumps(embedding.with_bank(bank).to_dict()))
    assert data["class_name"] == EpicEmbedding.class_name() == "EpicEmbedding"
    assert data["bank"]["demonstrations"] == [{"query": query, "passage": passage} for query, passage in PAIRS]
    assert data["fingerprint"].startswith(embedding.encoder.fingerprint)
    assert {
        *("model", "task", "bank", "instruction", "num_demonstrations", "selection", "strategy", "fingerprint"),
        *("max_query_tokens", "max_document_tokens", "device", "dtype", "truncate_dim", "embed_batch_size"),
    } <= data.keys()


def test_json_schema(embedding: EpicEmbedding) -> None:
    assert "fingerprint" in EpicEmbedding.model_json_schema()["properties"]


def test_pickle_holds_no_weights(embedding: EpicEmbedding) -> None:
    before = dict(embedding.__dict__)
    assert len(pickle.dumps(embedding)) < 5_000
    assert embedding.__dict__ == before


def test_unpicklable_callback_manager(embedding: EpicEmbedding, caplog: pytest.LogCaptureFixture) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    handler.connection = threading.Lock()  # type: ignore[attr-defined]
    manager = CallbackManager([handler])
    embedding.callback_manager = manager
    copied = pickle.loads(pickle.dumps(embedding))
    assert "callback_manager" in caplog.text
    assert embedding.callback_manager is manager
    assert copied.callback_manager.handlers == []
    assert copied.get_text_embedding("a fox") == embedding.get_text_embedding("a fox")


def test_copies_share_the_weights(embedding: EpicEmbedding, bank: DemonstrationBank) -> None:
    for copied in (
        copy.deepcopy(embedding),
        copy.copy(embedding),
        embedding.with_bank(bank),
        embedding.for_documents(),
    ):
        assert copied.encoder is embedding.encoder


def test_from_encoder(tiny_checkpoint: Path, bank: DemonstrationBank) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint, truncate_dim=16, max_query_tokens=64)
    embedding = EpicEmbedding.from_encoder(encoder, bank=bank)
    assert embedding.encoder is encoder
    again = EpicEmbedding.from_dict(embedding.to_dict())
    assert again.encoder is not encoder
    assert again.get_query_embedding("a fox") == embedding.get_query_embedding("a fox")


def test_from_encoder_that_its_source_does_not_give(tiny_checkpoint: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint, num_layers=1)
    data = EpicEmbedding.from_encoder(encoder).to_dict()
    with pytest.raises(FingerprintError):
        EpicEmbedding.from_dict(data)


# Settings that version 0.1.0 stored, and what they are now.
OLD: list[tuple[dict[str, object], dict[str, object]]] = [
    ({"task": "docs", "num_demonstrations": 4}, {"task": "docs", "bank": "docs", "num_demonstrations": 4}),
    ({"task": "sts", "num_demonstrations": 4}, {"task": "sts", "bank": "sts", "num_demonstrations": 4}),
    ({"bank": "qa", "strategy": "none"}, {"bank": "qa", "num_demonstrations": 0}),
    ({"bank": "sts", "strategy": "none"}, {"bank": "sts", "num_demonstrations": 0}),
    (
        {"bank": "qa", "selection": "nearest-early", "num_demonstrations": 2},
        {"bank": "qa", "selection": "nearest", "num_demonstrations": 2},
    ),
]


@pytest.mark.parametrize(("old", "new"), OLD)
def test_stored_settings_of_earlier_versions(
    embedding: EpicEmbedding, old: dict[str, object], new: dict[str, object]
) -> None:
    expected = embedding.model_copy(update=new)
    stored = {**embedding.to_dict(), **old, "fingerprint": f"{embedding.encoder.fingerprint}-00000000"}
    if "task" in old:
        stored["fingerprint"] = expected.fingerprint  # the same as then, see below; a symmetric task compares it
    pickled = embedding.__getstate__()
    pickled["__dict__"].update({name: stored[name] for name in (*old, "fingerprint")})
    pickled["__pydantic_private__"] = {"_bank": None, "_settled": False}
    unpickled = EpicEmbedding.__new__(EpicEmbedding)
    unpickled.__setstate__(pickled)
    for loaded in (EpicEmbedding.from_dict(stored), unpickled):
        assert loaded.get_query_embedding("a fox") == expected.get_query_embedding("a fox")
        assert loaded.get_text_embedding("a fox") == expected.get_text_embedding("a fox")
        assert loaded.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "2aed44f5"),
        ({"task": "docs"}, "cbf63554"),
        ({"task": "docs", "bank": "docs", "num_demonstrations": 4}, "3aac8a1b"),
        ({"task": "sts", "bank": "sts", "num_demonstrations": 4}, "75ff6032"),
        ({"bank": "qa", "strategy": "text", "num_demonstrations": 14}, "5a6a60d5"),
        ({"instruction": "Find", "bank": "code", "selection": "diverse", "num_demonstrations": 14}, "1cf0b0c5"),
    ],
)
def test_query_fingerprints_are_those_of_version_0_1(
    embedding: EpicEmbedding, fields: dict[str, object], expected: str
) -> None:
    assert str(embedding.model_copy(update=fields).fingerprint).partition("-")[2] == expected


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_misspelt_argument(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValidationError, match="num_demonstration"):
        EpicEmbedding(model=str(tiny_checkpoint), num_demonstration=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(("field", "value"), [("bank", "qa"), ("fingerprint", "x"), ("embeddings_cache", None)])
def test_fields_are_frozen(embedding: EpicEmbedding, field: str, value: object) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(embedding, field, value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "/no/such/folder"}, CheckpointError, "/no/such/folder"),
        ({"task": "nonsense"}, TaskError, "nonsense"),
        ({"bank": "/no/such/bank"}, BankError, "/no/such/bank"),
        ({"bank": {"queries": []}}, BankError, "queries"),
        ({"bank": DemonstrationBank(PAIRS), "num_demonstrations": 3}, PromptError, "3.*2"),
        ({"num_demonstrations": 3}, PromptError, "no bank"),
        ({"task": "docs", "num_demonstrations": 3}, PromptError, "no bank"),
        ({"num_demonstrations": -1}, ValidationError, "greater than or equal to 0"),
        ({"selection": "best"}, ValidationError, "selection"),
        ({"selection": "nearest-early"}, ValidationError, "selection"),
        ({"strategy": "best"}, ValidationError, "strategy"),
        ({"strategy": "none"}, ValidationError, "strategy"),
        ({"embeddings_cache": {}}, TypeError, "BaseKVStore"),
    ],
)
def test_mistakes_raise_at_construction(
    tiny_checkpoint: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        EpicEmbedding(**{"model": str(tiny_checkpoint), **change})  # type: ignore[arg-type]


# -- LlamaIndex uses it -----------------------------------------------------------------------------------------------


def test_vector_store_index_and_retriever(embedding: EpicEmbedding, bank: DemonstrationBank, tmp_path: Path) -> None:
    documents = [Document(text=text, id_=str(number)) for number, text in enumerate(TEXTS)]
    index = VectorStoreIndex.from_documents(documents, embed_model=embedding)
    hits = index.as_retriever(similarity_top_k=2, embed_model=embedding.with_bank(bank)).retrieve("a fox")
    query = embedding.with_bank(bank).get_query_embedding("a fox")
    scores = np.asarray(embedding.get_text_embedding_batch(TEXTS)) @ np.asarray(query)
    best = np.argsort(-scores)[:2]
    assert [hit.node.get_content() for hit in hits] == [TEXTS[row] for row in best]
    assert [hit.score for hit in hits] == pytest.approx(scores[best].tolist(), abs=1e-5)

    index.storage_context.persist(str(tmp_path))
    stored = load_index_from_storage(StorageContext.from_defaults(persist_dir=str(tmp_path)), embed_model=embedding)
    assert len(stored.as_retriever(similarity_top_k=2).retrieve("a fox")) == 2


def test_async_retriever(embedding: EpicEmbedding) -> None:
    index = VectorStoreIndex.from_documents([Document(text=text) for text in TEXTS], embed_model=embedding)
    retriever = index.as_retriever(similarity_top_k=1)
    assert asyncio.run(retriever.aretrieve("a fox"))[0].text == retriever.retrieve("a fox")[0].text


def test_several_devices(tiny_checkpoint: Path) -> None:
    model = str(tiny_checkpoint)
    embedding = EpicEmbedding.from_dict({"model": model, "device": ["cpu", torch.device("cpu")]})
    assert embedding.device == "cpu,cpu"
    again = pickle.loads(pickle.dumps(embedding))
    wrapped = EpicEmbedding.from_encoder(embedding.encoder)
    for other in (embedding, again, wrapped, EpicEmbedding.from_dict(embedding.to_dict())):
        assert (other.device, len(other.encoder.devices)) == ("cpu,cpu", 2)
        assert other.fingerprint == EpicEmbedding(model=model, device="cpu").fingerprint
        assert len(other.get_text_embedding("text")) == 32
