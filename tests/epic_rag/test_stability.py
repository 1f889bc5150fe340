"""Fingerprints, vectors and chunk ids that must stay the same from one release to the next.

`tests/epic_rag/stability.json` holds the values. A change that moves one of them invalidates indexes and banks that people
have on disk. Run this file as a script to write the values again after such a change was meant:

    python tests/epic_rag/test_stability.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.demonstrations import built_in_banks
from epic_rag_chroma import ChromaIndexer

VALUES = Path(__file__).parent / "stability.json"
CHECKPOINTS = ("epic-minilm",)
# Demonstrations shown in each strategy. Eight texts do not fit into the 512 positions of epic-minilm.
STRATEGIES = {"task-vector": 8, "epic": 8, "text": 2}
# The first dimensions of each vector are enough to notice a change, and keep the file small.
DIMENSIONS = 12
TEXTS = (
    "how do I undo the last commit?",
    "git revert creates a new commit that undoes the changes of an earlier one.",
    "printer jams",
    "If paper is stuck, open the rear cover and pull it out slowly.",
    "def encode(texts): return model(texts)  # a function that turns texts into vectors",
    "What is the boiling point of water at an altitude of 3,000 m?",
    "",
    " leading and trailing blanks ",
    "Übergrößenträger überqueren Straßen",
    "数据库的索引是什么？",
    "नमस्ते दुनिया",
    "emoji \U0001f600 and a zero\u200bwidth space",
    "E7: the pump draws air. Open the tap until water flows.",
    "SELECT name FROM users WHERE id = 42;",
    "a",
    "the " * 300,
    "The quick brown fox jumps over the lazy dog.",
    "1.2.3 is not 2.1.3",
    "A claim that vaccines cause autism",
    "line one\nline two\n\nline four",
)
FILES = {
    "guide.md": "# Guide\n\n## Install\n\nRun the installer, then read the manual.\n\n## Remove\n\nDelete the folder.\n",
    "notes.txt": "Cats sleep most of the day.\nThey wake up for food.\n",
    "src/tool.py": "def encode(texts):\n    result = list(texts)\n    return result\n\n\nclass Tool:\n    pass\n",
    "page.html": "<html><body><h1>Title</h1><p>First paragraph.</p><table><tr><td>a</td><td>b</td></tr></table></body></html>",
    "data.csv": "name,price\nbread,2\nmilk,1\n",
    "settings.json": '{"port": 8400, "hosts": ["a", "b"]}',
    "long.txt": "".join(f"Sentence number {n} of a long text that needs more than one chunk. " for n in range(120)),
}


def vectors_of(name: str) -> dict[str, npt.NDArray[np.float32]]:
    """Vectors (20, dim) of the texts, by how they were encoded."""
    encoder = EpicEncoder.from_pretrained(name, device="cpu", dtype="float32")
    bank = DemonstrationBank.load("docs")
    found = {"document": encoder.encode_document(TEXTS), "zero-shot": encoder.encode_query(TEXTS)}
    for strategy, count in STRATEGIES.items():
        found[strategy] = encoder.encode_query(TEXTS, bank=bank, num_demonstrations=count, strategy=strategy)
    return found


def chunk_ids(folder: Path) -> list[str]:
    """Ids of the chunks of a small index, sorted."""
    for name, content in FILES.items():
        path = folder / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    with ChromaIndexer(folder / "files" / ".epic-rag") as indexer:
        indexer.index([folder / "files"])
        return sorted(hit.id for hit in indexer.query("text", k=100, mode="dense", collapse=False))


def measure() -> dict[str, Any]:
    """Compute all values."""
    encoders = {name: EpicEncoder.from_pretrained(name, device="cpu", dtype="float32") for name in CHECKPOINTS}
    with tempfile.TemporaryDirectory() as folder:
        ids = chunk_ids(Path(folder))
    return {
        "checkpoints": {name: encoder.fingerprint for name, encoder in encoders.items()},
        "banks": {name: DemonstrationBank.load(name).fingerprint for name in built_in_banks()},
        "chunks": ids,
        "vectors": {
            name: {
                kind: [[round(float(value), 4) for value in row[:DIMENSIONS]] for row in rows]
                for kind, rows in vectors_of(name).items()
            }
            for name in CHECKPOINTS
        },
    }


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(VALUES.read_text(encoding="utf-8"))
    return stored


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name: str, values: dict[str, Any]) -> None:
    encoder = EpicEncoder.from_pretrained(name, device="cpu", dtype="float32")
    assert encoder.fingerprint == values["checkpoints"][name]
    for kind, rows in vectors_of(name).items():
        np.testing.assert_allclose(rows[:, :DIMENSIONS], values["vectors"][name][kind], atol=2e-4, err_msg=kind)


def test_banks(values: dict[str, Any]) -> None:
    banks = {name: DemonstrationBank.load(name) for name in built_in_banks()}
    assert {name: bank.fingerprint for name, bank in banks.items()} == values["banks"]
    assert {bank.encoder_fingerprints for bank in banks.values()} == {tuple(values["checkpoints"].values())}


def test_chunk_ids(tmp_path: Path, values: dict[str, Any]) -> None:
    assert chunk_ids(tmp_path) == values["chunks"]


if __name__ == "__main__":
    VALUES.write_text(json.dumps(measure(), indent=None, separators=(",", ":")).replace("]],", "]],\n") + "\n")
