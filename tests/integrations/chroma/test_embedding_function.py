"""`EpicEmbeddingFunction` in plain Chroma: documents, queries, and a configuration that finds the same model again."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import chromadb
import numpy as np
import pytest
import torch
from chromadb.utils.embedding_functions import known_embedding_functions

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.errors import BankError, CheckpointError, ConfigError, FingerprintError, PromptError, TaskError
from epic_rag.query_prompt import QUERY_STRATEGIES, QueryPrompt
from epic_rag_chroma import ChromaIndexer, EpicEmbeddingFunction
from tests.conftest import make_encoder
from tests.helpers.banks import embedded

DOCUMENTS = ["Cats sleep most of the day.", "Run the installer.", "Delete the folder."]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    with chromadb.PersistentClient(str(tmp_path / "chroma")) as made:  # type: ignore[attr-defined]
        yield made


def test_documents_are_bare_and_queries_prompted(tiny_encoder: EpicEncoder) -> None:
    function = EpicEmbeddingFunction(tiny_encoder, task="docs")
    np.testing.assert_allclose(function(DOCUMENTS), tiny_encoder.encode_document(DOCUMENTS), atol=1e-6)
    expected = tiny_encoder.encode_query(["cats"], task="docs")
    np.testing.assert_allclose(function.embed_query(["cats"]), expected, atol=1e-6)
    assert not np.allclose(function.embed_query(["cats"]), function(["cats"]))


def test_it_is_registered_and_says_what_chroma_asks(tiny_encoder: EpicEncoder) -> None:
    function = EpicEmbeddingFunction(tiny_encoder)
    assert known_embedding_functions["epic-rag"] is EpicEmbeddingFunction
    assert (function.name(), function.default_space()) == ("epic-rag", "cosine")
    assert "cosine" in function.supported_spaces()
    assert not function.is_legacy()


def test_the_configuration_is_plain_and_round_trips(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bank = DemonstrationBank([("q one", "p one"), ("q two", "p two")], instruction="Find it")
    embedded(bank, EpicEncoder.from_pretrained(tiny_checkpoint)).save(tmp_path / "bank")
    function = EpicEmbeddingFunction(tiny_checkpoint, bank=tmp_path / "bank", num_demonstrations=1, truncate_dim=16)
    config = json.loads(json.dumps(function.get_config()))
    assert set(config) == {"model", "task", "bank", "num_demonstrations", "truncate_dim", "fingerprint"}
    again = EpicEmbeddingFunction.build_from_config(config)
    assert again.get_config() == config
    for texts in (["cats"], DOCUMENTS):
        np.testing.assert_array_equal(again(texts), function(texts))
        np.testing.assert_array_equal(again.embed_query(texts), function.embed_query(texts))
    assert len(again(["x"])[0]) == 16


@pytest.mark.parametrize("strategy", QUERY_STRATEGIES)
def test_the_strategy_reaches_the_encoder_and_is_kept(tiny_checkpoint: Path, tmp_path: Path, strategy: Any) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    bank = embedded(DemonstrationBank([("q one", "p one"), ("q two", "p two")], instruction="Find it"), encoder)
    bank.save(tmp_path / "bank")
    function = EpicEmbeddingFunction(tiny_checkpoint, bank=tmp_path / "bank", strategy=strategy)
    config = json.loads(json.dumps(function.get_config()))
    assert config["strategy"] == strategy
    again = EpicEmbeddingFunction.build_from_config(config)
    assert again.get_config() == config
    expected = encoder.encode_query(["cats"], bank=bank, strategy=strategy)
    for each in (function, again):
        np.testing.assert_allclose(each.embed_query(["cats"]), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"task": "docs"}, QueryPrompt(task="docs")),
        ({"bank": "docs", "strategy": "none"}, QueryPrompt(bank="docs", num_demonstrations=0)),
        ({"task": "docs", "num_demonstrations": 4}, QueryPrompt(task="docs", bank="docs", num_demonstrations=4)),
        ({"bank": "docs", "strategy": "epic", "num_demonstrations": 2}, QueryPrompt(None, "docs", None, 2, "epic")),
    ],
)
def test_configurations_of_older_releases(tiny_checkpoint: Path, stored: dict[str, Any], expected: QueryPrompt) -> None:
    old = {"model": str(tiny_checkpoint), "task": None, "bank": None, "num_demonstrations": None, "fingerprint": None}
    function = EpicEmbeddingFunction.build_from_config({**old, "truncate_dim": None, **stored})
    vectors = EpicEncoder.from_pretrained(tiny_checkpoint).encode_query(["cats"], expected)
    np.testing.assert_allclose(function.embed_query(["cats"]), vectors, atol=1e-6)


def test_all_of_a_prompt_is_stored() -> None:
    prompt = QueryPrompt("docs", "docs", "Find it", 3, "text", "diverse")
    config = json.loads(json.dumps(EpicEmbeddingFunction("hub/m", prompt, fingerprint="f").get_config()))
    assert config == {"model": "hub/m", **vars(prompt), "truncate_dim": None, "fingerprint": "f"}
    assert EpicEmbeddingFunction.build_from_config(config).get_config() == config


def test_an_unknown_strategy_is_refused_at_once() -> None:
    with pytest.raises(PromptError, match="Unknown strategy 'best'"):
        EpicEmbeddingFunction(strategy=cast("Any", "best"))


def test_a_loaded_encoder_that_is_cut_is_found_again(tiny_checkpoint: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    function = EpicEmbeddingFunction(encoder, truncate_dim=16)
    assert encoder.truncate_dim is None  # the caller's is left alone
    again = EpicEmbeddingFunction.build_from_config(function.get_config())
    np.testing.assert_allclose(again(DOCUMENTS), function(DOCUMENTS), atol=1e-6)


def test_another_fingerprint_is_refused_when_the_model_is_loaded(tiny_checkpoint: Path, other_checkpoint: Path) -> None:
    config = EpicEmbeddingFunction(tiny_checkpoint).get_config()
    function = EpicEmbeddingFunction.build_from_config({**config, "model": str(other_checkpoint)})
    for call in (function, function.embed_query):
        with pytest.raises(FingerprintError, match=rf"fingerprint {config['fingerprint']}, .* has \w+\. "):
            call(["x"])
    with pytest.raises(FingerprintError):
        EpicEmbeddingFunction(EpicEncoder.from_pretrained(other_checkpoint), fingerprint=config["fingerprint"])


@pytest.mark.parametrize("text", ["foo", ""])
def test_one_text_is_not_taken_for_a_list_of_letters(tiny_encoder: EpicEncoder, text: Any) -> None:
    function = EpicEmbeddingFunction(tiny_encoder)
    for call in (function, function.embed_query):
        with pytest.raises(ConfigError, match="Pass a list"):
            call(text)


def test_a_long_document_is_read_to_its_end(tiny_encoder: EpicEncoder) -> None:
    texts = ["the quick brown fox " * 60 + end for end in ("jumps over the dog", "reads a window manual")]
    first, second = EpicEmbeddingFunction(tiny_encoder)(texts)
    assert not np.allclose(first, second, atol=1e-4)


def test_a_pickle_has_settings_and_no_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    bank = embedded(DemonstrationBank([("q one", "p one"), ("q two", "p two")], instruction="Find it"), encoder)
    bank.save(tmp_path / "bank")
    for function in (
        EpicEmbeddingFunction(tiny_checkpoint, bank=tmp_path / "bank", num_demonstrations=1, truncate_dim=16),
        EpicEmbeddingFunction(encoder, bank=tmp_path / "bank"),
    ):
        expected = function(DOCUMENTS), function.embed_query(["cats"])
        pickled = pickle.dumps(function)
        assert len(pickled) < 5000
        again = pickle.loads(pickled)
        np.testing.assert_allclose(again(DOCUMENTS), expected[0], atol=1e-5)
        np.testing.assert_allclose(again.embed_query(["cats"]), expected[1], atol=1e-5)
        assert again.get_config() == function.get_config()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_shares_the_model(copied: Any) -> None:
    encoder = make_encoder(seed=5)  # is in no folder
    function = EpicEmbeddingFunction(encoder, task="docs")
    again = copied({"function": function})["function"]
    assert again._loaded() is encoder
    np.testing.assert_allclose(again(DOCUMENTS), function(DOCUMENTS), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"task": "no-such-task"}, TaskError, "no-such-task"),
        ({"bank": "no-such-bank"}, BankError, "no-such-bank"),
        ({"bank": "docs", "num_demonstrations": 100_000}, PromptError, "Use at most"),
        ({"truncate_dim": 100_000}, ConfigError, "Choose 1 to 384"),
        ({"truncate_dim": 0}, ConfigError, "truncate_dim is 0"),
        ({"model": "some/hub-name", "truncate_dim": -1}, ConfigError, "truncate_dim is -1"),
        ({"model": "text"}, CheckpointError, "There is no checkpoint text"),
    ],
)
def test_settings_are_checked_at_construction(settings: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        EpicEmbeddingFunction(**settings)


def test_the_width_of_a_loaded_encoder_is_checked(tiny_encoder: EpicEncoder) -> None:
    with pytest.raises(ConfigError, match="Choose 1 to 32"):
        EpicEmbeddingFunction(tiny_encoder, truncate_dim=33)


def test_device_and_data_type_reach_the_model(tiny_checkpoint: Path, tiny_encoder: EpicEncoder) -> None:
    function = EpicEmbeddingFunction(tiny_checkpoint, device="cpu", dtype="bfloat16")
    assert function._loaded().dtype == torch.bfloat16
    assert {"device", "dtype"}.isdisjoint(function.get_config())  # they belong to the machine
    assert EpicEmbeddingFunction(tiny_checkpoint, dtype="float32")._loaded().dtype == torch.float32
    with pytest.raises(ConfigError, match="loaded already"):
        EpicEmbeddingFunction(tiny_encoder, device="cpu")


def test_an_instruction_replaces_the_tasks(tiny_encoder: EpicEncoder) -> None:
    function = EpicEmbeddingFunction(tiny_encoder, task="docs", instruction="Find the animal")
    expected = tiny_encoder.encode_query(["cats"], instruction="Find the animal")
    np.testing.assert_allclose(function.embed_query(["cats"]), expected, atol=1e-6)


def test_a_collection_whose_bank_is_gone_still_opens(client: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    embedded(DemonstrationBank([("q", "p")], instruction="Find it"), encoder).save(tmp_path / "bank")
    function = EpicEmbeddingFunction(tiny_checkpoint, bank=tmp_path / "bank")
    client.create_collection("docs", embedding_function=function).add(ids=["a"], documents=["x"])
    shutil.rmtree(tmp_path / "bank")
    opened = client.get_collection("docs")
    assert opened.get()["documents"] == ["x"]
    with pytest.raises(BankError):
        opened.query(query_texts=["x"], n_results=1)


def test_making_one_loads_nothing() -> None:
    function = EpicEmbeddingFunction("no-such/model", fingerprint="abc")
    assert function.get_config()["model"] == "no-such/model"
    assert not function.is_legacy()


def test_a_built_in_bank_is_not_taken_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("docs", "mine"):
        DemonstrationBank([("q", "p")]).save(tmp_path / name)
    # DemonstrationBank.load takes "docs" for the built-in one, too.
    assert EpicEmbeddingFunction(fingerprint="f", bank="docs").get_config()["bank"] == "docs"
    assert EpicEmbeddingFunction(fingerprint="f", bank="mine").get_config()["bank"] == str(tmp_path / "mine")


def test_what_a_configuration_cannot_keep_is_refused(tiny_encoder: EpicEncoder) -> None:
    bank: Any = DemonstrationBank([("q", "p")])
    with pytest.raises(ConfigError, match=r"bank\.save\(folder\)"):
        EpicEmbeddingFunction(tiny_encoder, bank=bank)
    with pytest.raises(ConfigError, match="unknown settings: colour"):
        EpicEmbeddingFunction.build_from_config({"colour": "red"})


def test_a_configuration_update_may_change_the_task_and_not_the_model(tiny_encoder: EpicEncoder) -> None:
    function = EpicEmbeddingFunction(tiny_encoder)
    config = function.get_config()
    function.validate_config_update(config, {**config, "task": "docs"})
    with pytest.raises(FingerprintError, match="The collection's vectors were made by"):
        function.validate_config_update(config, {**config, "fingerprint": "other"})


def test_a_collection_with_it(client: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    function = EpicEmbeddingFunction(tiny_checkpoint, task="docs")
    made = client.create_collection("docs", embedding_function=function)
    made.add(ids=["a", "b", "c"], documents=DOCUMENTS)
    assert made.configuration_json["hnsw"]["space"] == "cosine"
    expected = made.query(query_texts=["cats"], n_results=3)
    # opened by name alone: Chroma makes the function again, for every text, from the configuration
    opened = client.get_collection("docs")
    found = opened.query(query_texts=["cats"], n_results=3)
    assert (found["ids"], found["distances"]) == (expected["ids"], expected["distances"])
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    cosines = encoder.similarity(encoder.encode_query("cats", task="docs"), encoder.encode_document(DOCUMENTS))[0]
    by_id = dict(zip(found["ids"][0], found["distances"][0], strict=True))
    for row, cosine in zip("abc", cosines, strict=True):
        assert 1 - by_id[row] == pytest.approx(float(cosine), abs=1e-4)


def test_the_model_is_loaded_once(client: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from epic_rag_chroma import embedding_function

    embedding_function._load.cache_clear()
    load, calls = EpicEncoder.from_pretrained, []
    monkeypatch.setattr(EpicEncoder, "from_pretrained", lambda *a, **k: (calls.append(a), load(*a, **k))[1])
    made = client.create_collection("docs", embedding_function=EpicEmbeddingFunction(tiny_checkpoint))
    made.add(ids=["a"], documents=["x"])
    for _ in range(3):
        client.get_collection("docs").query(query_texts=["x"], n_results=1)
    assert len(calls) == 1


def test_a_conflict_is_judged_by_name_alone_and_caught_by_the_fingerprint(
    client: Any, tiny_checkpoint: Path, other_checkpoint: Path
) -> None:
    client.create_collection("docs", embedding_function=EpicEmbeddingFunction(tiny_checkpoint)).add(
        ids=["a"], documents=["x"]
    )
    # the trap: another model under the same name is let in
    wrong = client.get_collection("docs", embedding_function=EpicEmbeddingFunction(other_checkpoint))
    assert wrong.query(query_texts=["x"], n_results=1)["ids"] == [["a"]]
    # with the fingerprint that the collection keeps it is not
    kept = wrong.configuration_json["embedding_function"]["config"]["fingerprint"]
    checked = EpicEmbeddingFunction(other_checkpoint, fingerprint=kept)
    with pytest.raises(FingerprintError):
        client.get_collection("docs", embedding_function=checked).query(query_texts=["x"], n_results=1)


def test_threads_share_one_model(tiny_encoder: EpicEncoder) -> None:
    function = EpicEmbeddingFunction(tiny_encoder)
    texts = [[f"text {n} " * (n + 1)] for n in range(12)]
    expected = [function(each)[0] for each in texts]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.__setitem__(n, function(texts[n])[0])) for n in range(len(texts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, vector in enumerate(expected):
        np.testing.assert_allclose(found[number], vector, atol=1e-6)


def test_an_index_opens_with_plain_chroma(tmp_path: Path, docs: Path, tiny_checkpoint: Path) -> None:
    with ChromaIndexer(docs / ".epic-rag", encoder=EpicEncoder.from_pretrained(tiny_checkpoint)) as indexer:
        indexer.index([docs])
        mine = indexer.query("cats", k=4, mode="dense", collapse=False)
        with chromadb.PersistentClient(str(docs / ".epic-rag/chroma")) as client:  # type: ignore[attr-defined]
            found = client.get_collection("epic_rag").query(query_texts=["cats"], n_results=4)
    assert found["ids"][0] == [hit.id for hit in mine]
    assert [1 - distance for distance in found["distances"][0]] == pytest.approx([hit.score for hit in mine], abs=1e-5)
