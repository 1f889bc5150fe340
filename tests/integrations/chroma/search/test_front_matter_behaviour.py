"""Front matter: it is metadata that queries filter by, and no text."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag_chroma import ChromaIndexer, Comparison, SearchFilters

FILES = {
    "a.md": '---\ntitle: "Pumps"\nstatus: published\ntags: [water, "old, new"]\nversion: 1.10\nweight: 9\n---\nClean the filter.\n',
    "b.md": "---\nstatus: draft\ntags:\n  - Water\n  - brass\nauthor:\n  name: Zoë\nweight: 10\ndate: 2024-03-05\n---\nOpen the tap.\n",
    "c.md": '+++\nstatus = "published"\ntags = ["brass"]\ndraft = false\ndate = 2023-11-30\n+++\nTurn the valve.\n',
    "d.txt": "No front matter here, the filter is a cloth.\n",
    "e.html": "---\nlayout: page\nstatus: published\n---\n<p>Replace the seal.</p>\n",
}


@pytest.fixture
def index(tmp_path: Path, tiny_encoder: EpicEncoder) -> ChromaIndexer:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    indexer = ChromaIndexer(tmp_path / ".epic-rag", encoder=tiny_encoder)
    indexer.index([tmp_path])
    return indexer


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("status=published", "ace"), ("status!=published", "bd"), ("tags=water", "ab"), ("tags=old, new", "a"),
        ("tags!=brass", "ade"), ("version=1.10", "a"), ("version=1.1", ""), ("author.name=Zoë", "b"),
        ("author.name=" + unicodedata.normalize("NFD", "Zoë"), "b"), ("weight>9", "b"), ("weight>=9", "ab"),
        ("date>=2024-01-01", "b"), ("date<2024-01-01", "c"), ("draft=false", "c"), ("layout=page", "e"), ("title=Pumps", "a"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_where(index: ChromaIndexer, where: str, found: str, mode: str) -> None:
    hits = index.query("filter", k=10, mode=mode, filters=SearchFilters((where,)), collapse=False)  # type: ignore[arg-type]
    assert sorted(hit.path[0] for hit in hits) == list(found)


def test_it_is_no_text(index: ChromaIndexer) -> None:
    assert index.query("published", mode="keyword") == []
    hits = index.query("clean filter", k=1, mode="keyword")
    assert [(hit.path, hit.text, hit.first_line, hit.heading_path) for hit in hits] == [
        ("a.md", "Clean the filter.", 8, ("Pumps",))
    ]


def test_misspelt_key(index: ChromaIndexer) -> None:
    with pytest.raises(ConfigError, match=r"Cannot filter by 'statsu'\. The keys of this index are .*status"):
        index.query("filter", filters=SearchFilters(("statsu=published",)))


def test_changed_front_matter(index: ChromaIndexer, tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text(path.read_text().replace("published", "archived"))
    report = index.index([tmp_path])
    assert (report.changed, report.chunks_embedded) == (1, 0)
    assert [hit.path for hit in index.query("filter", filters=SearchFilters(("status=archived",)))] == ["a.md"]


@pytest.mark.parametrize("operator", ["==", "in", "text_match"])
def test_unicode_forms_of_paths(operator: str) -> None:
    value: str | tuple[str, ...] = ("Übersicht.md",) if operator == "in" else "Übersicht.md"
    for form in ("NFC", "NFD"):
        row = {"path": unicodedata.normalize(form, "Übersicht.md")}
        assert Comparison("path", operator, value).matches(row)  # type: ignore[arg-type]
        assert not Comparison("path", operator, value).matches({"path": "Ubersicht.md"})  # type: ignore[arg-type]
