"""The namespace packages and the example script."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

from epic_rag import DemonstrationBank, EpicEncoder

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "docs" / "examples" / "llama_index_chroma.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llama_index_chroma_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hits(output: str) -> list[tuple[float, str]]:
    """Return (cosine, document) of every line with a hit."""
    return [(float(score), name) for score, name in re.findall(r"^    (-?\d\.\d{3})  (\S+)", output, re.MULTILINE)]


def test_namespace_packages() -> None:
    import llama_index.core
    import llama_index.vector_stores.chroma

    import llama_index.embeddings
    import llama_index.embeddings.epic
    import llama_index.retrievers
    import llama_index.retrievers.epic

    for package in (llama_index, llama_index.embeddings, llama_index.retrievers):
        assert package.__file__ is None, f"{package.__name__} is a regular package and hides other distributions"
    folder = ROOT / "integrations" / "llama_index"
    assert not list(folder.glob("__init__.py"))
    assert not list(folder.glob("*/__init__.py"))
    assert llama_index.embeddings.epic.__all__ == ["EpicEmbedding"]
    assert llama_index.retrievers.epic.__all__ == ["EpicRetriever", "to_search_filters"]


def test_example_as_a_program(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--model", str(tiny_checkpoint), "--question", "E7 again"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.splitlines()[0] == "7 chunks"
    assert "with 2 demonstrations" in shown.out
    assert len(hits(shown.out)) == 6


def test_example_prints_cosines(script: ModuleType, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--model", str(tiny_checkpoint), "--top-k", "7", "--question", "white crust"]) == 0
    found = hits(capsys.readouterr().out)
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    documents = encoder.encode_document(list(script.MANUAL.values()))
    bank = DemonstrationBank(script.DEMONSTRATIONS, task="docs")
    for shown, query in (
        (found[:7], encoder.encode_query("white crust", task="docs")),
        (found[7:], encoder.encode_query("white crust", bank=bank)),
    ):
        expected = sorted(zip((documents @ query).tolist(), script.MANUAL, strict=True), reverse=True)
        assert [name for _, name in shown] == [name for _, name in expected]
        assert [score for score, _ in shown] == pytest.approx([score for score, _ in expected], abs=1e-3)


def test_example_replaces_changed_documents(
    script: ModuleType, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes, pairs = tmp_path / "notes", tmp_path / "pairs.jsonl"
    notes.mkdir()
    (notes / "a.md").write_text("# Passports\n\nRenew at the town hall.\n")
    (notes / "b.txt").write_text("Bins are emptied on Tuesdays.\n")
    pairs.write_text(json.dumps({"query": "bike", "passage": "The bike is in the cellar."}) + "\n")
    arguments = [
        str(notes),
        "--model",
        str(tiny_checkpoint),
        "--index-dir",
        str(tmp_path / "index"),
        "--top-k",
        "9",
    ]
    arguments += ["--demonstrations", str(pairs), "--question", "passport"]

    assert script.main(arguments) == 0
    first = capsys.readouterr().out
    assert "with 1 demonstrations" in first
    assert script.main(arguments) == 0
    assert capsys.readouterr().out == first

    (notes / "b.txt").write_text("Bins are emptied on Fridays.\n")
    assert script.main(arguments) == 0
    changed = capsys.readouterr().out
    assert changed.splitlines()[0] == first.splitlines()[0]
    assert "Fridays" in changed
    assert "Tuesdays" not in changed


def test_crash_while_embedding_loses_no_document(
    script: ModuleType, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import chromadb
    from llama_index.core import Document

    from llama_index.embeddings.epic import EpicEmbedding

    embedding = EpicEmbedding(model=str(tiny_checkpoint))
    client = chromadb.PersistentClient(str(tmp_path))
    collection = script.open_collection(client, "documents", embedding)
    script.replace(client, collection, script.ingest([Document(text="old", id_="a")], embedding))

    def crash(texts: list[str], **settings: object) -> None:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(embedding.encoder, "encode_document", crash)
        with pytest.raises(MemoryError):
            script.replace(client, collection, script.ingest([Document(text="new", id_="a")], embedding))
    assert collection.get()["documents"] == ["old"]
    script.replace(client, collection, script.ingest([Document(text="new", id_="a")], embedding))
    assert collection.get()["documents"] == ["new"]


def test_example_refuses_a_collection_of_another_model(
    script: ModuleType,
    tiny_checkpoint: Path,
    other_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script.main(["--model", str(tiny_checkpoint), "--index-dir", str(tmp_path)]) == 0
    capsys.readouterr()
    assert script.main(["--model", str(other_checkpoint), "--index-dir", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: The stored vectors were made under")
    assert shown.err.count("\n") == 1
