"""`benchmarks/models.py`: vectors are those of sentence-transformers, for replicas of published models."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_common import Bar
from models import LIMIT, compare, measure, parser
from replicas import REPLICAS, TEXTS, Replica
from transformers import AutoModel

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.demonstrations import Demonstration
from epic_rag.errors import CheckpointError, ConfigError, PromptError, RemoteModelError
from epic_rag_chroma import NO_CHROMA, ChromaIndexer, EpicEmbeddingFunction
from llama_index.embeddings.epic import EpicEmbedding


def replica(name: str, folder: Path) -> Path:
    """Build the replica whose name holds `name`."""
    [found] = [each for each in REPLICAS if name in each.name]
    place = folder / found.name.rsplit("/", 1)[-1]
    found.build(place)
    return place


def legacy(folder: Path) -> Path:
    """Rewrite a folder's files as releases of sentence-transformers up to 5 wrote them."""
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128, "do_lower_case": false}')
    file = folder / "1_Pooling" / "config.json"
    mode = {"mean": "mean_tokens", "cls": "cls_token"}[json.loads(file.read_text())["pooling_mode"]]
    file.write_text(json.dumps({"word_embedding_dimension": 32, f"pooling_mode_{mode}": True}))
    return folder


@pytest.mark.parametrize("model", REPLICAS, ids=lambda model: model.name.rsplit("/", 1)[-1])
def test_vectors_are_those_of_sentence_transformers(model: Replica, tmp_path: Path) -> None:
    found = compare(model, tmp_path)
    assert found.query < LIMIT
    assert found.document < LIMIT


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "all-mpnet-base-v2", "all-distilroberta-v1"])
def test_a_folder_without_prompts_is_run_natively_with_the_same_vectors(name: str, tmp_path: Path) -> None:
    folder = legacy(replica(name, tmp_path))
    native = EpicEncoder.from_pretrained(folder)
    library = EpicEncoder.from_pretrained(folder, backend="sentence-transformers")
    assert native.external is None
    assert library.external is not None
    np.testing.assert_allclose(native.encode_query(TEXTS), library.encode_query(TEXTS), atol=LIMIT)
    np.testing.assert_allclose(native.encode_document(TEXTS), library.encode_document(TEXTS), atol=LIMIT)


def test_prompts_of_a_family_by_the_folders_name(tmp_path: Path) -> None:
    folder = legacy(replica("multilingual-e5-small", tmp_path))
    encoder = EpicEncoder.from_pretrained(folder)
    plain = EpicEncoder.from_pretrained(folder, backend="native")
    assert encoder.external is not None
    assert (encoder.external.query_prompt, encoder.external.document_prompt) == ("query: ", "passage: ")
    np.testing.assert_allclose(encoder.encode_query("a text"), plain.encode_document("query: a text"), atol=LIMIT)
    sources = {fact.name: fact.source for fact in encoder.describe()}
    assert sources["query prompt"].startswith("guessed from its name")


def test_an_instruction_replaces_that_of_an_instruct_model_and_no_other(tmp_path: Path) -> None:
    qwen = EpicEncoder.from_pretrained(replica("Qwen3", tmp_path))
    bge = EpicEncoder.from_pretrained(replica("bge-small", tmp_path))
    assert not np.allclose(qwen.encode_query("text"), qwen.encode_query("text", instruction="Find code"), atol=1e-4)
    np.testing.assert_array_equal(bge.encode_query("text"), bge.encode_query("text", instruction="Find code"))


@pytest.mark.parametrize("name", ["bge-small", "Qwen3", "potion", "embeddinggemma"])
def test_index_query_and_demonstrations(name: str, tmp_path: Path) -> None:
    folder = replica(name, tmp_path / "models")
    docs = tmp_path / "docs"
    docs.mkdir()
    for number in range(4):
        (docs / f"{number}.md").write_text(f"# Topic {number}\n\nText about topic {number} and word{number}.\n")
    # One pair: with more, pairs of a random model would be recognised as unrelated and do nothing.
    bank = DemonstrationBank([Demonstration("topic one", "Text about topic 1")])
    with ChromaIndexer(tmp_path / "index", encoder=EpicEncoder.from_pretrained(folder), chroma=NO_CHROMA) as indexer:
        indexer.index([docs])
        plain = indexer.query("word3", mode="dense", k=4)
        moved = indexer.query("word3", mode="dense", k=4, bank=bank)
        reader = indexer.query("word3", mode="dense", k=4, bank=bank, strategy="reader")
    assert {hit.path for hit in plain} == {hit.path for hit in moved} == {hit.path for hit in reader}
    assert [hit.cosine for hit in plain] != [hit.cosine for hit in moved]
    with ChromaIndexer(tmp_path / "index", chroma=NO_CHROMA) as again:
        assert again.index([docs]).chunks_embedded == 0
        assert [hit.path for hit in again.query("word3", mode="dense", k=4)] == [hit.path for hit in plain]


def test_strategies_that_need_a_checkpoint_are_refused(tmp_path: Path) -> None:
    encoder = EpicEncoder.from_pretrained(replica("bge-small", tmp_path))
    bank = DemonstrationBank([Demonstration("q", "d")])
    with pytest.raises(PromptError, match="Use 'task-vector' or 'reader'"):
        encoder.encode_query("text", bank=bank, strategy="epic")
    with pytest.raises(ConfigError, match="backend='native'"):
        encoder.save_pretrained(tmp_path / "saved")
    with pytest.raises(PromptError, match="not a string"):
        encoder.encode_query(["a", None])  # type: ignore[list-item]


def test_fingerprint_depends_on_weights_and_prompts_and_not_on_the_place(tmp_path: Path) -> None:
    folder = replica("arctic", tmp_path / "a")
    first = EpicEncoder.from_pretrained(folder).fingerprint
    moved = folder.rename(tmp_path / "snowflake-arctic-embed-m-v1.5")
    assert EpicEncoder.from_pretrained(moved).fingerprint == first
    (moved / "README.md").write_text("A model card.\n")
    assert EpicEncoder.from_pretrained(moved).fingerprint == first
    settings = moved / "config_sentence_transformers.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "prompts": {"query": "find: "}}))
    assert EpicEncoder.from_pretrained(moved).fingerprint != first


def test_widths_and_lengths(tmp_path: Path) -> None:
    folder = replica("layer norm", tmp_path)
    assert EpicEncoder.from_pretrained(folder).dimension == 20
    encoder = EpicEncoder.from_pretrained(folder, truncate_dim=8, max_document_tokens=16)
    assert encoder.encode_document(["a", "b"]).shape == (2, 8)
    long = "word " * 100
    np.testing.assert_allclose(encoder.encode_document(long), encoder.encode_document(long + "more"), atol=1e-6)
    assert EpicEncoder.from_pretrained(folder, max_document_tokens=1000).max_document_tokens == 128
    with pytest.raises(ConfigError, match="Pass 1 or more"):
        EpicEncoder.from_pretrained(folder, max_document_tokens=0)


def test_llama_index_and_chroma(tmp_path: Path) -> None:
    folder = replica("Qwen3", tmp_path)
    encoder = EpicEncoder.from_pretrained(folder)
    embedding = EpicEmbedding(model=str(folder))
    function = EpicEmbeddingFunction(model=str(folder))
    for texts in (["one text"], TEXTS[2:4]):
        expected = encoder.encode_document(texts)
        np.testing.assert_allclose(embedding.get_text_embedding_batch(texts), expected, atol=LIMIT)
        np.testing.assert_allclose(function(texts), expected, atol=LIMIT)
    np.testing.assert_allclose(embedding.get_query_embedding("a"), encoder.encode_query("a"), atol=LIMIT)
    np.testing.assert_allclose(function.embed_query(["a"])[0], encoder.encode_query("a"), atol=LIMIT)
    again = pickle.loads(pickle.dumps(embedding))
    np.testing.assert_allclose(again.get_query_embedding("a"), encoder.encode_query("a"), atol=LIMIT)
    copied = copy.copy(encoder)
    np.testing.assert_allclose(copied.encode_query("a"), encoder.encode_query("a"), atol=LIMIT)


def test_a_long_text_is_embedded_in_windows(tmp_path: Path) -> None:
    encoder = EpicEncoder.from_pretrained(replica("bge-small", tmp_path))
    long = "Stop the server and copy the files back. " * 40
    whole, cut = encoder.encode_document(long, long_texts="windows"), encoder.encode_document(long)
    assert not np.allclose(whole, cut, atol=1e-3)


def test_names_for_chroma(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported.parent)
    expected = EpicEncoder.from_pretrained(exported).encode_document("a")
    function = EpicEmbeddingFunction(model=f"onnx:{exported.name}")
    np.testing.assert_allclose(function(["a"])[0], expected, atol=LIMIT)
    assert function.get_config()["model"] == f"onnx:{exported}"
    with pytest.raises(CheckpointError, match="There is no checkpoint nowhere"):
        EpicEmbeddingFunction(model="onnx:nowhere")
    with pytest.raises(RemoteModelError, match="does not answer"):
        EpicEmbeddingFunction(model="ollama:tiny@http://127.0.0.1:9")(["a"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replica with its transformer as an ONNX file as well, with other names and numbers of dimensions than usual."""
    folder = replica("bge-small", tmp_path_factory.mktemp("onnx"))
    model = AutoModel.from_pretrained(folder).eval()
    ids = torch.randint(5, 100, (2, 7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    (folder / "onnx").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (),
            folder / "onnx" / "model.onnx",
            kwargs=given,
            input_names=list(given),
            output_names=["last_hidden_state"],
            dynamo=True,
            dynamic_shapes={name: {0: "batch", 1: "tokens"} for name in given},
            external_data=False,
            verbose=False,
        )
    return folder


def test_an_onnx_file_gives_the_same_vectors(exported: Path, tmp_path: Path) -> None:
    torch_model = EpicEncoder.from_pretrained(exported)
    onnx_model = EpicEncoder.from_pretrained(f"onnx:{exported}")
    named = EpicEncoder.from_pretrained(f"onnx:{exported}@onnx/model.onnx")
    for encode in ("encode_query", "encode_document"):
        expected = getattr(torch_model, encode)(TEXTS)
        np.testing.assert_allclose(getattr(onnx_model, encode)(TEXTS), expected, atol=LIMIT)
        np.testing.assert_allclose(getattr(named, encode)(TEXTS), expected, atol=LIMIT)
    assert EpicEncoder.from_pretrained(named.source).fingerprint == named.fingerprint
    bare = shutil.copytree(exported, tmp_path / "bge-small-en-v1.5")
    (bare / "model.safetensors").unlink()
    alone = EpicEncoder.from_pretrained(bare)
    np.testing.assert_allclose(alone.encode_query(TEXTS), onnx_model.encode_query(TEXTS), atol=LIMIT)
    assert EpicEncoder.from_pretrained(alone.source).fingerprint == alone.fingerprint


def test_an_onnx_file_that_is_not_there(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"It has onnx/model.onnx; name one after @"):
        EpicEncoder.from_pretrained(f"onnx:{exported}@onnx/other.onnx")
    with pytest.raises(CheckpointError, match="It has none"):
        EpicEncoder.from_pretrained(f"onnx:{replica('mpnet', tmp_path)}")


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(parser().parse_args(["--only", "static-retrieval", "--output", str(tmp_path)])) == 0
    assert "static-retrieval-mrl-en-v1" in capsys.readouterr().out
    assert not Bar("largest difference", 2 * LIMIT, LIMIT, True).met


@pytest.mark.parametrize("name", ["onnx", "potion", "bge-small"])
def test_a_reader_is_trained_for_a_folder_and_changes_no_document(
    name: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import epic_rag.training.reader_training as module
    from epic_rag_cli.main import run

    options = module.ReaderTrainingOptions(rows=60, episodes=8, largest=16, steps=10)
    monkeypatch.setattr(module, "ReaderTrainingOptions", lambda: options)
    if name == "onnx":
        folder = tmp_path / "alone"
        shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    else:
        folder = replica(name, tmp_path)
    pairs = tmp_path / "pairs.jsonl"
    rows = ({"query": f"term {number}", "positive": f"what {number} means"} for number in range(60))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = EpicEncoder.from_pretrained(folder)
    before = (encoder.reader.kind, encoder.fingerprint, encoder.query_fingerprint)
    assert run(["train", "reader", "--model", str(folder), "--data", str(pairs)]) == 0
    trained = EpicEncoder.from_pretrained(folder)
    assert trained.external is not None
    assert (before[0], trained.reader.kind) == ("universal", "trained")
    assert trained.fingerprint == before[1]
    assert trained.query_fingerprint != before[2]
    np.testing.assert_array_equal(trained.encode_document(TEXTS), encoder.encode_document(TEXTS))


def test_code_of_a_folder_runs_only_if_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = replica("bge-small", tmp_path)
    plain = EpicEncoder.from_pretrained(folder).encode_document("a text")
    (folder / "shift.py").write_text(
        "import torch\n\n\nclass Shift(torch.nn.Module):\n"
        "    @classmethod\n    def load(cls, *_, **__):\n        return cls()\n\n"
        "    def forward(self, features, **_):\n"
        "        features['sentence_embedding'] = features['sentence_embedding'].roll(1, -1)\n"
        "        return features\n"
    )
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "", "type": "shift.Shift"})
    (folder / "modules.json").write_text(json.dumps(modules))
    for names in ("", "BAAI/bge-small-en-v1.5", f"{folder}-2"):
        monkeypatch.setenv("EPIC_RAG_TRUST_REMOTE_CODE", names)
        with pytest.raises(CheckpointError, match="put its name into EPIC_RAG_TRUST_REMOTE_CODE"):
            EpicEncoder.from_pretrained(folder)
    trusted = EpicEncoder.from_pretrained(folder, trust_remote_code=True)
    np.testing.assert_allclose(trusted.encode_document("a text"), np.roll(plain, 1), atol=LIMIT)
    monkeypatch.setenv("EPIC_RAG_TRUST_REMOTE_CODE", f"other/model, {folder}")
    named = EpicEncoder.from_pretrained(folder)
    np.testing.assert_array_equal(named.encode_document("a text"), trusted.encode_document("a text"))
