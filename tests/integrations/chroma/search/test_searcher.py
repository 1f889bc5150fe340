"""Searching an index: modes, fusion, filters, near-duplicates and reranking, against brute force over its rows."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag import EpicEncoder
from epic_rag.errors import CheckpointError, ConfigError
from epic_rag.query_prompt import QueryPrompt
from epic_rag_chroma import ChromaIndexer, Hit, SearchFilters, SearchRequest, parse_filters
from epic_rag_chroma.errors import IndexMismatchError
from epic_rag_chroma.search import reranking
from epic_rag_chroma.search.fusion import fuse
from epic_rag_chroma.search.index_reader import CHROMA_FROM_CHUNKS, IndexReader
from epic_rag_chroma.search.searcher import Searcher
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.keyword_index import KeywordsUnavailableError
from epic_rag_chroma.store.paths import DATABASE_FILE
from tests.helpers.model_files import save_cross_encoder

TOPICS = ("cats", "dogs", "birds", "fish", "bees", "trees", "stones", "rivers")
VERBS = ("sleep", "run", "sing", "swim", "work", "grow", "lie", "flow")
QUERY = "where do cats sleep and fish swim"


def corpus() -> dict[str, str]:
    files = {}
    for number, topic in enumerate(TOPICS):
        sections = [
            f"## {topic.title()} {verb}\n\n{topic.title()} {verb} in place {number}{at}, as everybody knows by now.\n"
            for at, verb in enumerate(VERBS)
        ]
        files[f"guide/{topic}.md"] = f"# On {topic}\n\n" + "\n".join(sections)
    for number, verb in enumerate(VERBS):
        files[f"src/{verb}.py"] = f"def {verb}_all(cats, fish):\n    return {number}\n"
    return files


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: EpicEncoder) -> Iterator[ChromaIndexer]:
    folder = tmp_path_factory.mktemp("corpus")
    for name, text in corpus().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with ChromaIndexer(folder / ".epic-rag", encoder=tiny_encoder) as indexer:
        assert indexer.index([folder]).skipped == ()
        yield indexer


@pytest.fixture(scope="module")
def truth(index: ChromaIndexer, tiny_encoder: EpicEncoder, rows: Callable[[Path], Any]) -> dict[str, tuple[Any, ...]]:
    """Id -> text, metadata, cosine with the query: by brute force, through a client of Chroma's own."""
    vector = tiny_encoder.encode_query(QUERY)
    return {
        row: (text, metadata, float(np.asarray(of_row, dtype=np.float32) @ vector))
        for row, (text, metadata, of_row) in rows(path_of(index).parent).items()
    }


def by_cosine(truth: dict[str, tuple[Any, ...]]) -> list[str]:
    return sorted(truth, key=lambda row: (-round(truth[row][2], 5), row))


def ids(hits: Sequence[Hit]) -> list[str]:
    return [hit.id for hit in hits]


def path_of(index: ChromaIndexer) -> Path:
    return Path(index.status().index_dir) / DATABASE_FILE


def bm25_of(index: ChromaIndexer) -> dict[str, float]:
    with closing(IndexDatabase.open_reading(path_of(index))) as database:
        return dict(database.match(QUERY, 10_000))


def test_dense_mode(index: ChromaIndexer, truth: dict[str, tuple[Any, ...]]) -> None:
    hits = index.query(QUERY, k=20, mode="dense", collapse=False)
    assert [hit.rank for hit in hits] == list(range(1, 21))
    best = sorted((found[2] for found in truth.values()), reverse=True)[:20]
    assert [hit.score for hit in hits] == pytest.approx(best, abs=1e-5)
    for hit in hits:
        text, metadata, cosine = truth[hit.id]
        assert (hit.text, hit.path, hit.kind, hit.lang) == (text, metadata["path"], metadata["kind"], metadata["lang"])
        assert hit.score == hit.cosine == pytest.approx(cosine, abs=1e-5)
        assert (hit.bm25, hit.rerank_score, hit.duplicates) == (None, None, ())


def test_keyword_mode_loads_no_model(index: ChromaIndexer) -> None:
    def never() -> EpicEncoder:
        raise AssertionError("a model was asked for")

    expected = bm25_of(index)
    with ChromaIndexer(path_of(index).parent, encoder=never) as reader:
        hits = reader.query(QUERY, k=500, mode="keyword", collapse=False)
    assert ids(hits) == list(expected)
    for hit in hits:
        assert hit.score == hit.bm25 == expected[hit.id]
        assert hit.cosine is None
    assert "cats" in hits[0].text.lower()


def test_hybrid_mode(index: ChromaIndexer, truth: dict[str, tuple[Any, ...]]) -> None:
    expected = bm25_of(index)
    dense = [(hit.id, hit.score) for hit in index.query(QUERY, k=100, mode="dense", collapse=False)]
    hits = index.query(QUERY, k=30, mode="hybrid", collapse=False)
    with closing(IndexDatabase.open_reading(path_of(index))) as database:
        attainable = database.attainable(database.parsed(QUERY))
    fused = fuse(dense, list(expected.items())[:100], attainable)[:30]
    assert [hit.id for hit in hits] == [row_id for row_id, _ in fused]
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in fused], abs=1e-5)
    assert hits == index.query(QUERY, k=30, collapse=False)  # the default
    for hit in hits:
        assert hit.cosine == pytest.approx(truth[hit.id][2], abs=1e-5)
        assert hit.document_id == truth[hit.id][1]["doc_id"]
        assert hit.bm25 == expected.get(hit.id)


def searcher_of(index: ChromaIndexer, *, chroma_from_chunks: int = CHROMA_FROM_CHUNKS, **settings: Any) -> Searcher:
    folder = path_of(index).parent
    return Searcher(folder, IndexReader(folder, chroma_from_chunks=chroma_from_chunks), **settings)


def test_hits_of_one_ranking_get_the_scores_of_the_other(
    index: ChromaIndexer, truth: dict[str, tuple[Any, ...]], tiny_encoder: EpicEncoder
) -> None:
    searcher = searcher_of(index, fusion_depth=3)
    (hits,) = searcher.search([QUERY], SearchRequest(k=6, collapse=False), tiny_encoder.encode_query)
    dense = by_cosine(truth)
    assert {hit.id for hit in hits} - set(dense[:12])
    assert all(hit.cosine == pytest.approx(truth[hit.id][2], abs=1e-5) for hit in hits)
    expected = bm25_of(index)
    assert all(hit.bm25 == expected.get(hit.id) for hit in hits)


FILTERS = [
    parse_filters(["lang=python"], [], None),
    parse_filters(["lang!=python"], [], None),
    parse_filters(["first_line>=20", "kind=markdown"], [], None),
    parse_filters([], ["guide/**"], None),
    parse_filters([], ["guide/cats.md", "sleep.py"], None),
    parse_filters(["heading_path=On bees > Bees sing"], [], None),
    parse_filters([], [], "7d"),
    parse_filters(["lang=python"], ["guide/**"], None),
    parse_filters([], [], "2100-01-01"),
]


def holds(filters: SearchFilters, metadata: dict[str, Any]) -> bool:
    if filters.since is not None:
        return filters.since.year < 2100
    path = metadata["path"]
    if filters.paths and not (path.startswith("guide/") if filters.paths[0] == "guide/**" else path in PATHS):
        return False
    return all(
        {
            "lang=python": path.endswith(".py"),
            "lang!=python": path.endswith(".md"),
            "first_line>=20": metadata["first_line"] >= 20,
            "kind=markdown": path.endswith(".md"),
            "heading_path=On bees > Bees sing": metadata["heading_path"] == "On bees > Bees sing",
        }[condition]
        for condition in filters.where
    )


PATHS = {"guide/cats.md", "src/sleep.py"}


@pytest.mark.parametrize("filters", FILTERS, ids=[str(number) for number in range(len(FILTERS))])
@pytest.mark.parametrize("chroma_from_chunks", [CHROMA_FROM_CHUNKS, 1], ids=["exact", "chroma"])
@pytest.mark.parametrize("k", [1, 7, 500])
def test_filters_are_exact(
    index: ChromaIndexer,
    truth: dict[str, tuple[Any, ...]],
    tiny_encoder: EpicEncoder,
    filters: SearchFilters,
    chroma_from_chunks: int,
    k: int,
) -> None:
    searcher = searcher_of(index, chroma_from_chunks=chroma_from_chunks)
    allowed = {row for row, (_, metadata, _) in truth.items() if holds(filters, metadata)}

    def ask(mode: Any) -> list[Hit]:
        request = SearchRequest(k=k, mode=mode, filters=filters, collapse=False)
        return searcher.search([QUERY], request, tiny_encoder.encode_query)[0]

    dense = ask("dense")
    best = sorted((truth[row][2] for row in allowed), reverse=True)[:k]
    assert set(ids(dense)) <= allowed
    assert [hit.score for hit in dense] == pytest.approx(best, abs=1e-5)
    by_bm25 = [row for row in bm25_of(index) if row in allowed]
    assert ids(ask("keyword")) == by_bm25[:k]
    hybrid = ask("hybrid")
    assert set(ids(hybrid)) <= allowed
    assert len(hybrid) == min(k, len(allowed))


def test_unknown_filters_fail(index: ChromaIndexer) -> None:
    with pytest.raises(ConfigError, match="Cannot filter by 'colour'"):
        index.query(QUERY, filters=SearchFilters(("colour=red",)))


def test_query_many_encodes_once(
    index: ChromaIndexer, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [QUERY, "bees work", "stones", QUERY]
    one_by_one = [index.query(text, k=4) for text in texts]
    calls: list[list[str]] = []
    encode = EpicEncoder.encode_query

    def counted(self: EpicEncoder, given: list[str], *options: Any) -> Any:
        calls.append(list(given))
        return encode(self, given, *options)

    monkeypatch.setattr(EpicEncoder, "encode_query", counted)
    together = index.query_many(texts, k=4)
    assert calls == [texts]
    assert [ids(hits) for hits in together] == [ids(hits) for hits in one_by_one]
    for mine, others in zip(together, one_by_one, strict=True):
        assert [hit.score for hit in mine] == pytest.approx([hit.score for hit in others], abs=1e-5)
    assert index.query_many([]) == []
    assert index.query_many(["zebra", ""], mode="keyword") == [[], []]
    assert len(calls) == 1


def test_request_and_settings_are_equivalent(index: ChromaIndexer) -> None:
    prompt = QueryPrompt(instruction="Find cats")
    request = SearchRequest(prompt, k=3, mode="dense", filters=parse_filters(["kind=markdown"], [], None))
    expected = index.query(QUERY, request)
    assert index.query(QUERY, k=3, mode="dense", filters=request.filters, instruction="Find cats") == expected
    assert index.query(QUERY, k=3, mode="dense", filters=request.filters, prompt=prompt) == expected
    assert index.query(QUERY, request.with_settings(instruction=None)) != expected


def test_embedded_replaces_the_query_among_the_vectors(index: ChromaIndexer, tiny_encoder: EpicEncoder) -> None:
    settings: dict[str, Any] = {"k": 5, "mode": "dense", "collapse": False}
    vectors = tiny_encoder.encode_query(["bees work", "stones lie"])
    alone, averaged = index.query("bees work", **settings), index.query("", embedded=vectors.mean(axis=0), **settings)

    found = index.query_many(
        ["bees work", "x", "y", "z"],
        embedded=[None, "bees work", ["bees work", "stones lie"], 3 * vectors[0]],
        **settings,
    )

    assert [ids(hits) for hits in found] == [ids(alone), ids(alone), ids(averaged), ids(alone)]
    keyword = index.query("fish", embedded="cats", mode="keyword")
    assert ids(keyword) == ids(index.query("fish", mode="keyword"))  # keywords come from the text


@pytest.mark.parametrize(
    ("embedded", "message"),
    [
        ([[]], "no text to embed"),
        ([np.ones(3, np.float32)], "vector has 3 numbers"),
        ([np.ones((2, 2), np.float32)], "vector has the shape"),
        ([np.zeros(32, np.float32)], "has length 0"),
        ([], "embedded has 0 entries for 1 queries"),
    ],
)
def test_embedded_is_checked(index: ChromaIndexer, embedded: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        index.query_many([QUERY], embedded=embedded)


PASSAGE = "To undo the last commit and keep its changes, reset softly to the one before it.\n"


@pytest.fixture
def copies(tmp_path: Path, tiny_encoder: EpicEncoder) -> Iterator[ChromaIndexer]:
    folder = tmp_path / "copies"
    folder.mkdir()
    for number in range(60):
        (folder / f"copy{number:02}.txt").write_text(PASSAGE if number % 2 else PASSAGE.upper())
    (folder / "dot.txt").write_text("Unrelated: a list of birds.\n")
    (folder / "note.txt").write_text("Another note, on trees.\n")
    with ChromaIndexer(folder / ".epic-rag", encoder=tiny_encoder) as indexer:
        indexer.index([folder])
        yield indexer


@pytest.mark.parametrize("mode", ["dense", "hybrid", "keyword"])
def test_near_duplicates_are_folded(copies: ChromaIndexer, mode: Any) -> None:
    plain = copies.query("undo the last commit", k=3, mode=mode, collapse=False)
    hits = copies.query("undo the last commit", k=3, mode=mode)
    assert len(plain) == 3
    expected = 1 if mode == "keyword" else 3  # the other two files have no word of it
    assert len(hits) == expected
    assert len({hit.text.lower() for hit in hits}) == expected
    (best,) = (hit for hit in hits if hit.duplicates)
    assert len(best.duplicates) == len(set(best.duplicates)) >= 19
    assert all(place.endswith(".txt:1") for place in best.duplicates)
    assert f"{best.path}:1" not in best.duplicates
    assert [hit.rank for hit in hits] == list(range(1, expected + 1))


def test_versions_of_a_page_are_separate_hits(tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    for version in ("2.0", "2.1"):
        (tmp_path / f"{version}.txt").write_text(f"In version {version}: {PASSAGE}")
    with ChromaIndexer(tmp_path / ".epic-rag", encoder=tiny_encoder) as indexer:
        indexer.index([tmp_path])
        assert {hit.path for hit in indexer.query("undo", k=5)} == {"2.0.txt", "2.1.txt"}


def by_length(query: str, passages: Sequence[str]) -> list[float]:
    return [float(len(passage)) for passage in passages]


def test_reranking_by_a_function(index: ChromaIndexer) -> None:
    asked: list[tuple[str, int]] = []

    def reranker(query: str, passages: Sequence[str]) -> list[float]:
        asked.append((query, len(passages)))
        return [-passage.count("a") for passage in passages]

    hits = index.query(QUERY, k=5, reranker=reranker)
    assert asked == [(QUERY, reranking.RERANK_DEPTH)]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    given = [hit.rerank_score for hit in hits]
    assert given == sorted(given, reverse=True)
    pool = index.query(QUERY, k=reranking.RERANK_DEPTH)
    assert set(ids(hits)) <= set(ids(pool))
    assert [hit.score for hit in hits] == given
    equal = index.query(QUERY, k=5, reranker=lambda query, passages: [0.0] * len(passages))
    assert ids(equal) == ids(pool)[:5]  # ties keep their order


def test_rerankers_get_headings(index: ChromaIndexer) -> None:
    seen: list[str] = []
    index.query(QUERY, k=1, reranker=lambda query, passages: [seen.append(each) or 0.0 for each in passages])
    assert any(passage.startswith("Cats sleep\n") for passage in seen)


@pytest.mark.parametrize("given", [[], [0.0], [float("nan")] * reranking.RERANK_DEPTH])
def test_rerankers_return_a_number_for_each_text(index: ChromaIndexer, given: list[float]) -> None:
    with pytest.raises(ConfigError, match=f"for {reranking.RERANK_DEPTH} texts"):
        index.query(QUERY, reranker=lambda query, passages: given)


def test_a_cross_encoder_in_a_folder_can_rerank(index: ChromaIndexer, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    folder = save_cross_encoder(tmp_path / "cross-encoder")
    hits = index.query(QUERY, k=4, reranker=folder)
    model = CrossEncoder(str(folder))
    passages = ["\n".join((*hit.heading_path[-1:], hit.text)) for hit in hits]
    expected = model.predict([(QUERY, passage) for passage in passages])
    assert [hit.rerank_score for hit in hits] == pytest.approx([float(score) for score in expected], abs=1e-5)
    assert [hit.rerank_score for hit in hits] == sorted((hit.rerank_score for hit in hits), reverse=True)
    assert ids(index.query(QUERY, k=4, reranker=str(folder))) == ids(hits)


def test_not_a_cross_encoder(index: ChromaIndexer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no folder"):
        index.query(QUERY, reranker=tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="cannot be loaded as a cross-encoder"):
        index.query(QUERY, reranker=tmp_path / "empty")
    with pytest.raises(CheckpointError, match="has 3 outputs for a pair"):
        index.query(QUERY, reranker=save_cross_encoder(tmp_path / "three", outputs=3))


def test_hybrid_mode_without_keyword_index(
    docs: Path, indexer: ChromaIndexer, caplog: pytest.LogCaptureFixture
) -> None:
    indexer.index([docs])
    with closing(sqlite3.connect(path_of(indexer))) as connection, connection:
        connection.execute("UPDATE settings SET value = 'of another version' WHERE name = 'keywords'")
    with caplog.at_level(logging.WARNING):
        hits = indexer.query("cats", k=3)
    assert ids(hits) == ids(indexer.query("cats", k=3, mode="dense"))
    assert "another version of epic-rag" in caplog.text
    assert "Searched by vectors only" in caplog.text
    with pytest.raises(KeywordsUnavailableError, match=r"Run `epic-rag index` to update it"):
        indexer.query("cats", mode="keyword")
    indexer.index([docs])
    (best,) = indexer.query("cats", mode="keyword")
    assert best.path == "notes.txt"


def test_index_rebuilt_with_another_model_during_a_query(
    docs: Path, indexer: ChromaIndexer, tiny_encoder: EpicEncoder, other_checkpoint: Path
) -> None:
    indexer.index([docs])
    folder = path_of(indexer).parent

    def encode(texts: Sequence[str]) -> Any:
        with ChromaIndexer(folder, encoder=EpicEncoder.from_pretrained(other_checkpoint, truncate_dim=16)) as other:
            other.index([docs], rebuild=True)
        return tiny_encoder.encode_query(texts)

    searcher = Searcher(folder, IndexReader(folder))
    with pytest.raises(IndexMismatchError, match=r"rebuilt with another model during the query\. Repeat it"):
        searcher.search(["cats"], SearchRequest(), encode, fingerprint=tiny_encoder.fingerprint)


def test_keywords_follow_every_change(docs: Path, indexer: ChromaIndexer) -> None:
    def where(query: str) -> list[str]:
        return sorted({hit.path for hit in indexer.query(query, k=9, mode="keyword")})

    indexer.index([docs])
    assert where("installer") == ["guide.md"]
    (docs / "guide.md").rename(docs / "moved.md")
    (docs / "notes.txt").write_text("Bees make honey.\n")
    (docs / "src/tool.py").unlink()
    indexer.index([docs])
    assert where("installer") == ["moved.md"]
    assert (where("cats"), where("honey"), where("decode")) == ([], ["notes.txt"], [])
    indexer.index([docs], rebuild=True)
    assert where("installer honey") == ["moved.md", "notes.txt"]
    assert (where("cats"), where("decode")) == ([], [])


def test_results_are_deterministic(index: ChromaIndexer, tiny_encoder: EpicEncoder) -> None:
    hits = index.query(QUERY, k=30)
    assert index.query(QUERY, k=30) == hits
    with ChromaIndexer(path_of(index).parent, encoder=tiny_encoder) as other:
        assert other.query(QUERY, k=30) == hits
        assert other.query(QUERY, k=10) == hits[:10]
