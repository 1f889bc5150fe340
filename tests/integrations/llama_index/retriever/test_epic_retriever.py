"""EpicRetriever: nodes with provenance, every way that LlamaIndex calls a retriever, and copies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import MetadataMode, NodeRelationship, NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.errors import ConfigError, PromptError
from epic_rag_chroma import SearchFilters
from epic_rag_chroma.errors import IndexMismatchError, IndexNotFoundError
from llama_index.retrievers.epic import EpicRetriever

Nearest = Callable[[Sequence[str]], list[str]]
QUESTION = "how do I remove the package"


def ids(nodes: list[NodeWithScore]) -> list[str]:
    return [each.node.node_id for each in nodes]


# -- nodes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", "hybrid", "keyword"])
def test_nodes_are_the_hits_of_the_index(retriever: EpicRetriever, mode: Any) -> None:
    nodes = retriever.with_settings(mode=mode).retrieve(QUESTION)
    hits = retriever.indexer.query(QUESTION, k=4, mode=mode)
    assert ids(nodes) == [hit.id for hit in hits] != []
    assert [each.text for each in nodes] == [hit.text for hit in hits]
    assert [each.score for each in nodes] == [hit.score for hit in hits]


def test_metadata_says_where_the_text_stands(
    retriever: EpicRetriever, index_dir: Path, rows: Callable[[Path], Any]
) -> None:
    nodes = {each.node.node_id: each.node for each in retriever.with_settings(similarity_top_k=99).retrieve("a")}
    stored = rows(index_dir)
    assert set(nodes) == set(stored)
    for row_id, (text, metadata, _) in stored.items():
        node = nodes[row_id]
        path = Path(node.metadata["file_path"])
        assert (node.text, node.metadata["path"]) == (text, metadata["path"])
        assert path.is_absolute()
        assert path.name == node.metadata["file_name"]
        assert node.ref_doc_id == metadata["doc_id"]
        assert node.metadata["kind"] == metadata["kind"]
        if path.suffix == ".pdf":
            assert "first_line" not in node.metadata
            assert node.metadata["page"] in (1, 2)
        else:
            first, last = node.metadata["first_line"], node.metadata["last_line"]
            assert "\n".join(path.read_text().splitlines()[first - 1 : last]) == text
            assert "page" not in node.metadata
        # What other stores and prompts take: flat, no None.
        assert all(isinstance(value, (str, int)) and value != "" for value in node.metadata.values())


def test_what_models_see_of_a_node(dense: EpicRetriever) -> None:
    [found] = dense.with_settings(similarity_top_k=1, filters=SearchFilters(paths=("guide.md",))).retrieve("Delete it")
    first, last = found.node.metadata["first_line"], found.node.metadata["last_line"]
    headings = found.node.metadata["heading_path"]
    assert found.node.get_content(MetadataMode.LLM) == (
        f"path: guide.md\nfirst_line: {first}\nlast_line: {last}\nheading_path: {headings}\n\n{found.text}"
    )
    assert found.node.get_content(MetadataMode.EMBED) == f"heading_path: {headings}\n\n{found.text}"
    assert "file_path" in found.node.metadata
    assert NodeRelationship.SOURCE in found.node.relationships


def test_a_chunk_is_the_same_node_for_every_query(dense: EpicRetriever) -> None:
    # Fusion recognises nodes by their hash.
    everything = dense.with_settings(similarity_top_k=99)
    hashes = {query: {each.node.node_id: each.node.hash for each in everything.retrieve(query)} for query in ("a", "b")}
    assert hashes["a"] == hashes["b"]
    assert len(set(hashes["a"].values())) == len(hashes["a"]) > 5


def test_scores_never_rise(retriever: EpicRetriever) -> None:
    # A reranker that loves short texts, whatever the cosines.
    reranked = retriever.with_settings(similarity_top_k=99, reranker=lambda _, texts: [-len(text) for text in texts])
    nodes = reranked.retrieve(QUESTION)
    lengths = [len(each.text) for each in nodes]
    assert all(-(each.score or 0.0) >= length for each, length in zip(nodes, lengths, strict=True))
    assert lengths != [len(each.text) for each in retriever.with_settings(similarity_top_k=99).retrieve(QUESTION)]
    for made in (retriever, retriever.with_settings(mode="keyword"), reranked):
        scores = [
            each.score or 0.0 for each in made.with_settings(similarity_top_k=99).retrieve("cats read the manual")
        ]
        assert scores == sorted(scores, reverse=True)
        assert scores


# -- settings -------------------------------------------------------------------------------------------------


def test_settings_reach_the_index(retriever: EpicRetriever) -> None:
    bank = DemonstrationBank([("throw it away", "Delete the folder."), ("nap", "Cats sleep.")], instruction="Find it")
    asked: dict[str, Any] = {"task": "docs", "num_demonstrations": 2, "mode": "dense"}
    assert ids(retriever.with_settings(**asked, bank=bank).retrieve("x")) == [
        hit.id for hit in retriever.indexer.query("x", k=4, **asked, bank=bank)
    ]
    scores = [
        retriever.with_settings(mode="dense", **each).retrieve("x")[0].score
        for each in (
            {},
            {"bank": bank},
            {"bank": bank, "num_demonstrations": 1},
            {"bank": bank, "strategy": "task-vector"},
            {"instruction": "Find cats"},
        )
    ]
    assert len(set(scores)) == 5
    with pytest.raises(PromptError, match="strategy is 'best', known are epic"):
        retriever.with_settings(strategy="best")


def test_the_number_of_nodes_can_be_set(retriever: EpicRetriever) -> None:
    other = retriever.with_settings(similarity_top_k=1)
    assert (len(other.retrieve("x")), len(retriever.retrieve("x"))) == (1, 4)
    other.similarity_top_k = 2
    assert (len(other.retrieve("x")), other.similarity_top_k) == (2, 2)


@pytest.mark.parametrize("mode", ["dense", "hybrid", "keyword"])
def test_filters_of_both_kinds(retriever: EpicRetriever, mode: Any) -> None:
    python = MetadataFilters(filters=[MetadataFilter(key="lang", value="python")])
    for filters in (python, SearchFilters(where=("lang=python",)), SearchFilters(paths=("src/",))):
        nodes = retriever.with_settings(filters=filters, mode=mode, similarity_top_k=99).retrieve(
            "def paint texts return"
        )
        assert {each.node.metadata["path"] for each in nodes} == {"src/tool.py", "src/paint.py"}
    nothing = MetadataFilters(filters=[MetadataFilter(key="lang", value="cobol")])
    assert retriever.with_settings(filters=nothing, mode=mode).retrieve("def") == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"similarity_top_k": 0}, "similarity_top_k is 0; it must be at least 1"),
        ({"mode": "sparse"}, "mode is 'sparse'; it must be one of dense, hybrid, keyword"),
    ],
)
def test_a_mistake_shows_where_it_is_made(index_dir: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EpicRetriever(index_dir, **arguments)
    with pytest.raises(ConfigError, match=said):
        EpicRetriever(index_dir).with_settings(**arguments)


def test_another_index_is_no_setting(index_dir: Path) -> None:
    with pytest.raises(ConfigError, match="with_settings got index_dir; it takes similarity_top_k, task"):
        EpicRetriever(index_dir).with_settings(index_dir="elsewhere")


def test_errors_are_those_of_the_index(index_dir: Path, tmp_path: Path, other_checkpoint: Path) -> None:
    with pytest.raises(IndexNotFoundError, match="run `epic-rag index"):
        EpicRetriever(tmp_path).retrieve("x")
    other = EpicRetriever(index_dir, encoder=lambda: EpicEncoder.from_pretrained(other_checkpoint), mode="dense")
    with pytest.raises(IndexMismatchError):
        other.retrieve("x")


# -- query bundles --------------------------------------------------------------------------------------------


def test_several_texts_are_averaged_as_llama_index_does(dense: EpicRetriever, nearest: Nearest) -> None:
    texts = ["def decode(texts)", "Cats sleep most of the day", "x y z"]
    bundle = QueryBundle("not embedded at all", custom_embedding_strs=texts)
    expected = nearest(texts)
    assert ids(dense.retrieve(bundle)) == expected
    assert ids(asyncio.run(dense.aretrieve(bundle))) == expected
    assert ids(dense.retrieve(QueryBundle("", custom_embedding_strs=texts))) == expected


def test_a_vector_in_the_bundle_is_used(dense: EpicRetriever, tiny_encoder: EpicEncoder) -> None:
    vector = tiny_encoder.encode_query("Cats sleep").tolist()
    bundle = QueryBundle("not embedded at all", embedding=vector)
    assert ids(dense.retrieve(bundle)) == ids(dense.retrieve("Cats sleep"))
    assert bundle.embedding == vector
    with pytest.raises(ConfigError, match=r"3 numbers.*32"):
        dense.retrieve(QueryBundle("x", embedding=[1.0, 0.0, 0.0]))


def test_words_come_from_the_question_itself(retriever: EpicRetriever) -> None:
    bundle = QueryBundle("colour of a wall", custom_embedding_strs=["Cats sleep most of the day"])
    words = retriever.with_settings(mode="keyword").retrieve(bundle)
    assert words[0].node.metadata["path"] == "src/paint.py"
    vectors = retriever.with_settings(mode="dense").retrieve(bundle)
    assert ids(vectors) == ids(retriever.with_settings(mode="dense").retrieve("Cats sleep most of the day"))
    both = retriever.with_settings(mode="hybrid").retrieve(bundle)
    assert {ids(words)[0], ids(vectors)[0]} <= set(ids(both))


def test_what_stands_for_a_query_must_have_a_direction(dense: EpicRetriever) -> None:
    def ask(embedded: Any) -> list[str]:
        return [hit.id for hit in dense.indexer.query("x", k=4, mode="dense", collapse=False, embedded=embedded)]

    assert ask("Cats sleep") == ask(["Cats sleep"]) == ids(dense.retrieve("Cats sleep"))
    for embedded, said in (
        ([], "there is no text to embed"),
        (np.zeros(32, dtype=np.float32), "has length 0.0; it must have a direction"),
        (np.full(32, np.nan, dtype=np.float32), "has length nan; it must have a direction"),
        (np.zeros((2, 32), dtype=np.float32), r"has the shape \(2, 32\), the vectors of the index have 32"),
    ):
        with pytest.raises(ConfigError, match=said):
            ask(embedded)
