"""Hostile text files are read and split in linear time."""

from __future__ import annotations

import pytest

from epic_rag_chroma.chunking import chunk_document
from epic_rag_chroma.reading.reader import read_document


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


# Files that would take time in proportion to the square of their length, if a reader were careless.
HOSTILE = {
    "a.json": '{"a":[' * 60_000,
    "b.json": '"' + '\\"' * 100_000,
    "c.json": "[\n" * 30_000 + "]\n" * 30_000,
    "a.yaml": "".join(" " * (n % 300) + "k:\n" for n in range(20_000)),
    "a.xml": "<a>\n" * 30_000,
    "b.xml": "<!--" * 100_000 + "<a" * 100_000,
    "a.adoc": "```x\n" * 100_000,
    "b.adoc": "|===\n" * 100_000 + "====\n" * 50_001,
    "a.org": "#+begin_src\n" * 60_000,
    "a.tex": "\\begin{a}\n" * 60_000 + "\\section{\n" * 30_000,
    "a.rst": "=== ===\n" * 60_001 + "a::\n" * 50_000,
    "a.txt": "- a\n" * 100_000,
    "b.txt": "- a\n" + " - b\n" * 100_000,
    "a.csv": '"\n' * 40_001,
    "a.srt": "1\n00:00:01,000 --> 00:00:02,000\nx\n\n" * 40_000,
    "a.py": "(" * 20_000,
    "b.py": "def f():\n" * 20_000,
    "a.md": "> " * 5_000 + "a\n" + "- " * 2_000 + "b\n",
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_text_takes_linear_time(name: str) -> None:
    document = read_document(name, HOSTILE[name].encode())
    chunks = chunk_document(document, max_tokens=100, overlap=0, count_tokens=count_words)
    assert all(chunk.tokens <= 100 for chunk in chunks)
