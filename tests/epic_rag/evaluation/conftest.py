"""Encoder with given vectors, and tiny evaluation sets on disk."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag.query_prompt import QueryPrompt


@dataclass(frozen=True)
class Call:
    """One call of the encoder."""

    role: str
    texts: tuple[str, ...]
    instruction: str | None = None
    demonstrations: tuple[tuple[str, str], ...] = ()
    strategy: str | None = None


@dataclass
class WrittenEncoder:
    """Encoder with given vectors, scaled to length 1, and a list of its calls."""

    vectors: Mapping[str, Sequence[float]]
    fingerprint: str = "written"
    with_demonstrations: Mapping[str, Sequence[float]] | Callable[[str, Any], Sequence[float]] | None = None
    calls: list[Call] = field(default_factory=list)

    @property
    def dimension(self) -> int:
        return len(next(iter(self.vectors.values())))

    def encode_query(
        self,
        texts: Sequence[str],
        prompt: QueryPrompt | None = None,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        assert prompt is not None
        bank = prompt.resolve_bank()
        items = bank.demonstrations[: prompt.num_demonstrations] if bank is not None else ()
        shown = tuple((item.query, item.passage) for item in items)
        given = prompt.resolve_instruction(bank, "the default")
        self.calls.append(Call("query", tuple(texts), given, shown, prompt.strategy))
        if shown and callable(self.with_demonstrations):
            return _unit([self.with_demonstrations(text, shown) for text in texts])
        source = self.with_demonstrations if shown and self.with_demonstrations is not None else self.vectors
        assert not callable(source)
        return _unit([source[text] for text in texts])

    def encode_document(
        self, texts: Sequence[str], *, batch_size: int | None = None, show_progress: bool = False
    ) -> Any:
        self.calls.append(Call("document", tuple(texts)))
        return _unit([self.vectors[text] for text in texts])


def _unit(rows: Sequence[Sequence[float]]) -> Any:
    vectors = np.array(rows, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def written() -> type[WrittenEncoder]:
    """The class of encoders with written vectors."""
    return WrittenEncoder


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write JSON lines, gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def jsonl() -> Callable[[Path, Iterable[Mapping[str, object]]], Path]:
    """The writer of JSON lines."""
    return write_jsonl


RETRIEVAL_VECTORS = {
    # d1, d2 and d3 stand at 0, 30 and 60 degrees
    "Alpha first": (1.0, 0.0),
    "second": (0.866, 0.5),
    "third": (0.5, 0.866),
    "ask one": (1.0, -0.1),  # d1, d2, d3
    "ask two": (0.62, 0.78),  # at 51.5 degrees: d3, d2, d1
    "unjudged": (1.0, 0.0),
}


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """A folder with one tiny set of each kind."""
    root = tmp_path / "sets"
    folder = root / "library"
    documents = [("d1", "Alpha", "first"), ("d2", "", "second"), ("d3", "", "third")]
    write_jsonl(
        folder / "corpus.jsonl.gz", [{"_id": id_, "title": title, "text": text} for id_, title, text in documents]
    )
    queries = [("q1", "ask one"), ("q2", "ask two"), ("q3", "unjudged")]
    write_jsonl(folder / "queries.jsonl.gz", [{"_id": id_, "text": text} for id_, text in queries])
    (folder / "qrels").mkdir()
    qrels = "query-id\tcorpus-id\tscore\nq1\td2\t1\nq2\td1\t2\nq2\td3\t1\n"
    (folder / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")

    (root / "likeness").mkdir()
    pairs = [("a1", "b1", 0.5), ("a2", "b2", 1.5), ('a"3', "b3", 3.0), ("a4", "b4", 5.0)]
    lines = ["sentence1\tsentence2\tscore\tgenre", *(f"{a}\t{b}\t{score}\tx" for a, b, score in pairs)]
    (root / "likeness" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    train = [{"text": f"{label} train {number}", "label": label} for label in ("pay", "lost") for number in range(10)]
    test = [{"text": f"{label} test {number}", "label": label} for label in ("pay", "lost") for number in range(2)]
    write_jsonl(root / "requests" / "train.jsonl.gz", train)
    write_jsonl(root / "requests" / "test.jsonl", test)

    topics = [{"text": f"topic {label} text {number}", "label": label} for label in (3, 7) for number in range(20)]
    write_jsonl(root / "topics" / "clustering.jsonl.gz", topics)

    candidates = [
        {"query": "ask one", "positive": ["second", "Alpha first"], "negative": ["third"]},
        {"query": "ask two", "positive": ["second"], "negative": ["third", "Alpha first"]},
    ]
    write_jsonl(root / "candidates" / "reranking.jsonl.gz", candidates)
    (root / "empty").mkdir()
    (root / "README.md").write_text("not a set\n", encoding="utf-8")
    return root
