"""EpicRetriever: nodes, settings, query bundles, async and threads, LlamaIndex's machinery, copies."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent, RetrievalStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import LongContextReorder, SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine, TransformQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import MetadataMode, NodeRelationship, NodeWithScore, QueryBundle
from llama_index.core.tools import QueryEngineTool, RetrieverTool
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from llama_index.core.workflow import StartEvent, StopEvent, Workflow, step

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.errors import ConfigError, EpicError
from epic_rag_chroma import SEARCH_MODES, ChromaIndexer, SearchFilters
from epic_rag_chroma.errors import IndexMismatchError, IndexNotFoundError
from llama_index.retrievers.epic import EpicRetriever

Nearest = Callable[[Sequence[str]], list[str]]
QUESTION = "how do I remove the package"


def ids(nodes: list[NodeWithScore]) -> list[str]:
    return [each.node.node_id for each in nodes]


# -- nodes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", "hybrid", "keyword"])
def test_nodes_are_the_hits(retriever: EpicRetriever, mode: Any) -> None:
    nodes = retriever.with_settings(mode=mode).retrieve(QUESTION)
    hits = retriever.indexer.query(QUESTION, k=4, mode=mode)
    assert ids(nodes) == [hit.id for hit in hits] != []
    assert [each.text for each in nodes] == [hit.text for hit in hits]
    assert [each.score for each in nodes] == [hit.score for hit in hits]


def test_metadata_locates_the_text(retriever: EpicRetriever, index_dir: Path, rows: Callable[[Path], Any]) -> None:
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
        # Flat and without None, as other stores and prompts need it.
        assert all(isinstance(value, (str, int)) and value != "" for value in node.metadata.values())


def test_several_indexes_are_one(index_dir: Path, tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    (tmp_path / "more.md").write_text("# More\n\nA zebra sleeps.\n")
    with ChromaIndexer(tmp_path / "idx", encoder=tiny_encoder) as indexer:
        indexer.index([tmp_path / "more.md"])
    with EpicRetriever([index_dir, tmp_path / "idx"], similarity_top_k=100, mode="dense") as retriever:
        found = {hit.node.metadata["file_path"] for hit in retriever.retrieve("zebra")}
        assert str(tmp_path / "more.md") in found
        assert len(found) > 1
        with pickle.loads(pickle.dumps(retriever)) as again:
            assert {hit.node.metadata["file_path"] for hit in again.retrieve("zebra")} == found
        words = retriever.with_settings(mode="keyword", similarity_top_k=1).retrieve("zebra")
        assert [hit.node.metadata["file_name"] for hit in words] == ["more.md"]


def test_content_for_models(dense: EpicRetriever) -> None:
    [found] = dense.with_settings(similarity_top_k=1, filters=SearchFilters(paths=("guide.md",))).retrieve("Delete it")
    first, last = found.node.metadata["first_line"], found.node.metadata["last_line"]
    headings = found.node.metadata["heading_path"]
    assert found.node.get_content(MetadataMode.LLM) == (
        f"path: guide.md\nfirst_line: {first}\nlast_line: {last}\nheading_path: {headings}\n\n{found.text}"
    )
    assert found.node.get_content(MetadataMode.EMBED) == f"heading_path: {headings}\n\n{found.text}"
    assert "file_path" in found.node.metadata
    assert NodeRelationship.SOURCE in found.node.relationships


def test_nodes_do_not_depend_on_the_query(dense: EpicRetriever) -> None:
    # Fusion of several queries recognises nodes by their hash.
    everything = dense.with_settings(similarity_top_k=99)
    hashes = {query: {each.node.node_id: each.node.hash for each in everything.retrieve(query)} for query in ("a", "b")}
    assert hashes["a"] == hashes["b"]
    assert len(set(hashes["a"].values())) == len(hashes["a"]) > 5


def test_nodes_are_sorted_by_score(retriever: EpicRetriever) -> None:
    # A reranker that prefers short texts, whatever the cosines.
    reranked = retriever.with_settings(reranker=lambda _, texts: [-len(text) for text in texts])
    assert all(-(each.score or 0.0) >= len(each.text) for each in reranked.retrieve(QUESTION))  # headings come first
    for made in (reranked, *(retriever.with_settings(mode=mode) for mode in SEARCH_MODES)):
        nodes = made.with_settings(similarity_top_k=99).retrieve("cats read the manual")
        scores = [each.score or 0.0 for each in nodes]
        assert scores == sorted(scores, reverse=True)
        assert scores


# -- settings -------------------------------------------------------------------------------------------------


def test_settings_reach_the_index(retriever: EpicRetriever) -> None:
    bank = DemonstrationBank([("throw it away", "Delete the folder."), ("nap", "Cats sleep.")], instruction="Find it")
    settings: dict[str, Any] = {"task": "docs", "bank": bank, "num_demonstrations": 2, "mode": "dense"}
    assert ids(retriever.with_settings(**settings).retrieve("x")) == [
        hit.id for hit in retriever.indexer.query("x", k=4, **settings)
    ]
    scores = [
        retriever.with_settings(mode="dense", **each).retrieve("x")[0].score
        for each in (
            {},
            {"bank": bank},
            {"bank": bank, "num_demonstrations": 1},
            {"bank": bank, "strategy": "task-vector"},
            {"bank": bank, "num_demonstrations": 1, "selection": "nearest"},
            {"instruction": "Find cats"},
            {"task": "docs"},
        )
    ]
    assert len(set(scores)) == 7
    assert (
        retriever.with_settings(mode="dense", task="docs").with_settings(task=None).retrieve("x")[0].score == scores[0]
    )


def test_similarity_top_k_can_be_set(retriever: EpicRetriever) -> None:
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
    ("settings", "message"),
    [
        ({"similarity_top_k": 0}, "similarity_top_k is 0. Use 1 or more."),
        ({"mode": "sparse"}, "Unknown mode 'sparse'. Choose one of dense, hybrid, keyword."),
        ({"strategy": "best"}, "Unknown strategy 'best'. Choose one of reader"),
        ({"task": "docs", "num_demonstrations": 2}, "num_demonstrations is 2, but there is no bank"),
        ({"index_dir": "elsewhere"}, "Unknown setting index_dir. Known are task, "),
    ],
)
def test_mistakes_raise_at_construction(index_dir: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EpicError, match=message):
        EpicRetriever(index_dir).with_settings(**settings)
    if "index_dir" not in settings:
        with pytest.raises(EpicError, match=message):
            EpicRetriever(index_dir, **settings)
    retriever = EpicRetriever(index_dir)
    with pytest.raises(ConfigError, match="similarity_top_k is -1"):
        retriever.similarity_top_k = -1


def test_errors_of_the_index(index_dir: Path, tmp_path: Path, other_checkpoint: Path) -> None:
    with pytest.raises(IndexNotFoundError, match="Run `epic-rag index PATH`"):
        EpicRetriever(tmp_path).retrieve("x")
    other = EpicRetriever(index_dir, encoder=lambda: EpicEncoder.from_pretrained(other_checkpoint), mode="dense")
    with pytest.raises(IndexMismatchError):
        other.retrieve("x")


# -- query bundles --------------------------------------------------------------------------------------------


def test_custom_embedding_strs_are_averaged(dense: EpicRetriever, nearest: Nearest) -> None:
    texts = ["def decode(texts)", "Cats sleep most of the day", "x y z"]
    bundle = QueryBundle("not embedded at all", custom_embedding_strs=texts)
    expected = nearest(texts)
    assert ids(dense.retrieve(bundle)) == expected
    assert ids(asyncio.run(dense.aretrieve(bundle))) == expected
    assert ids(dense.retrieve(QueryBundle("", custom_embedding_strs=texts))) == expected


def test_embedding_of_the_bundle(dense: EpicRetriever, tiny_encoder: EpicEncoder) -> None:
    vector = tiny_encoder.encode_query("Cats sleep").tolist()
    bundle = QueryBundle("not embedded at all", embedding=vector)
    assert ids(dense.retrieve(bundle)) == ids(dense.retrieve("Cats sleep"))
    assert bundle.embedding == vector
    with pytest.raises(ConfigError, match=r"3 numbers.*32"):
        dense.retrieve(QueryBundle("x", embedding=[1.0, 0.0, 0.0]))


def test_keywords_come_from_query_str(retriever: EpicRetriever) -> None:
    bundle = QueryBundle("colour of a wall", custom_embedding_strs=["Cats sleep most of the day"])
    words = retriever.with_settings(mode="keyword").retrieve(bundle)
    assert words[0].node.metadata["path"] == "src/paint.py"
    vectors = retriever.with_settings(mode="dense").retrieve(bundle)
    assert ids(vectors) == ids(retriever.with_settings(mode="dense").retrieve("Cats sleep most of the day"))
    both = retriever.with_settings(mode="hybrid").retrieve(bundle)
    assert {ids(words)[0], ids(vectors)[0]} <= set(ids(both))


def test_invalid_query_vectors(dense: EpicRetriever) -> None:
    def search(embedded: Any) -> list[str]:
        return [hit.id for hit in dense.indexer.query("x", k=4, mode="dense", collapse=False, embedded=embedded)]

    assert search("Cats sleep") == search(["Cats sleep"]) == ids(dense.retrieve("Cats sleep"))
    for embedded, message in (
        ([], "There is no text to embed"),
        (np.zeros(32, dtype=np.float32), "has length 0.0. Pass one with a direction"),
        (np.full(32, np.nan, dtype=np.float32), "has length nan. Pass one with a direction"),
        (np.zeros((2, 32), dtype=np.float32), r"has the shape \(2, 32\), the vectors of the index have 32"),
    ):
        with pytest.raises(ConfigError, match=message):
            search(embedded)


# -- async, threads -------------------------------------------------------------------------------------------


def test_async_equals_sync(retriever: EpicRetriever) -> None:
    assert asyncio.run(retriever.aretrieve(QUESTION)) == retriever.retrieve(QUESTION)


def test_async_does_not_block_the_event_loop(index_dir: Path, tiny_encoder: EpicEncoder) -> None:
    # The encoder waits for something that the event loop does.
    free = threading.Event()

    class Waiting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny_encoder, name)

        def encode_query(self, *texts: Any, **options: Any) -> Any:
            assert free.wait(60)
            return tiny_encoder.encode_query(*texts, **options)

        def encode_document(self, *texts: Any) -> Any:
            raise AssertionError

    async def retrieve() -> list[list[NodeWithScore]]:
        async def release() -> list[NodeWithScore]:
            free.set()
            return []

        return await asyncio.gather(*(waiting.aretrieve(text) for text in "abc"), release())

    with EpicRetriever(index_dir, encoder=Waiting(), mode="dense") as waiting:  # type: ignore[arg-type]
        assert [bool(nodes) for nodes in asyncio.run(retrieve())] == [True, True, True, False]


def test_threads_and_event_loops_share_a_retriever(retriever: EpicRetriever) -> None:
    questions = [f"{word} {number}" for number in range(4) for word in ("cats", "install", "decode texts")]
    expected = {question: ids(retriever.retrieve(question)) for question in questions}
    found: dict[str, list[str]] = {}

    def retrieve(some: list[str]) -> None:
        for question in some:
            found[question] = ids(retriever.retrieve(question))

    async def gather(some: list[str]) -> None:
        for question, nodes in zip(some, await asyncio.gather(*map(retriever.aretrieve, some)), strict=True):
            found[question] = ids(nodes)

    threads = [
        threading.Thread(target=retrieve, args=(questions[:4],)),
        threading.Thread(target=retrieve, args=(questions[4:8],)),
        threading.Thread(target=lambda: asyncio.run(gather(questions[8:]))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_changed_index_is_seen(tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("Cats sleep.\n")
    with ChromaIndexer(tmp_path / "index", encoder=tiny_encoder) as indexer:
        indexer.index([tmp_path / "docs"])
        with EpicRetriever(tmp_path / "index", encoder=tiny_encoder) as retriever:
            assert [each.text for each in retriever.retrieve("x")] == ["Cats sleep."]
            (tmp_path / "docs" / "a.txt").write_text("Dogs run.\n")
            indexer.index([])
            assert [each.text for each in retriever.retrieve("x")] == ["Dogs run."]


# -- LlamaIndex's own machinery ----------------------------------------------------------------------------------


class Recorder(BaseEventHandler):
    events: list[Any] = []  # noqa: RUF012 - a pydantic field

    def handle(self, event: Any, **_: Any) -> None:
        self.events.append(event)


def test_events_and_callbacks(index_dir: Path, tiny_encoder: EpicEncoder) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    recorder, root = Recorder(), get_dispatcher()
    handlers = list(root.event_handlers)
    root.add_event_handler(recorder)
    try:
        with EpicRetriever(index_dir, encoder=tiny_encoder, callback_manager=CallbackManager([debug])) as retriever:
            nodes = retriever.retrieve("x")
            asyncio.run(retriever.aretrieve("x"))
    finally:
        root.event_handlers = handlers
    assert [type(event) for event in recorder.events] == [RetrievalStartEvent, RetrievalEndEvent] * 2
    assert ids(recorder.events[1].nodes) == ids(nodes)
    assert len(debug.get_event_pairs(CBEventType.RETRIEVE)) == 2


def test_query_engine(retriever: EpicRetriever) -> None:
    for engine in (RetrieverQueryEngine.from_args(retriever, llm=MockLLM()), retriever.as_query_engine(MockLLM())):
        response = engine.query(QUESTION)
        assert ids(response.source_nodes) == ids(retriever.retrieve(QUESTION))
        # MockLLM repeats its prompt: the nodes with their places.
        assert "path: guide.md" in str(response)
        assert "file_path" not in str(response)
        assert ids(asyncio.run(engine.aquery(QUESTION)).source_nodes) == ids(response.source_nodes)


def test_postprocessors_keep_the_ranking(retriever: EpicRetriever) -> None:
    nodes = retriever.retrieve("colour of a wall")
    cut = SimilarityPostprocessor(similarity_cutoff=nodes[1].score).postprocess_nodes(list(nodes))
    assert ids(cut)[:2] == ids(nodes)[:2]
    reordered = LongContextReorder().postprocess_nodes(list(nodes))
    assert sorted(ids(reordered)) == sorted(ids(nodes))
    assert ids(nodes)[0] in (ids(reordered)[0], ids(reordered)[-1])


@pytest.mark.parametrize("mode", ["reciprocal_rerank", "relative_score", "dist_based_score", "simple"])
@pytest.mark.parametrize("use_async", [False, True])
def test_fusion_of_retrievers(retriever: EpicRetriever, mode: Any, use_async: bool) -> None:
    parts: list[Any] = [retriever.with_settings(mode="dense"), retriever.with_settings(mode="keyword")]
    fused = QueryFusionRetriever(
        parts, llm=MockLLM(), mode=mode, num_queries=1, similarity_top_k=99, use_async=use_async
    ).retrieve("colour of a wall")
    separate = [ids(part.retrieve("colour of a wall")) for part in parts]
    assert set(ids(fused)) == set(separate[0]) | set(separate[1])
    assert len(ids(fused)) == len(set(ids(fused)))
    assert ids(fused)[0] in (separate[0][0], separate[1][0])


def test_hyde(dense: EpicRetriever, nearest: Nearest) -> None:
    engine = TransformQueryEngine(dense.as_query_engine(MockLLM()), HyDEQueryTransform(llm=MockLLM(max_tokens=3)))
    # MockLLM's answer has three words.
    expected = nearest(["text text text", "Cats sleep"])
    assert ids(engine.query("Cats sleep").source_nodes) == expected


def test_tools(retriever: EpicRetriever) -> None:
    engine = retriever.as_query_engine(MockLLM(), response_mode="compact")
    tool = QueryEngineTool.from_defaults(engine, name="docs", description="Looks things up in the documentation.")
    answer = tool.call(input=QUESTION)
    assert ids(answer.raw_output.source_nodes) == ids(retriever.retrieve(QUESTION))
    shown = RetrieverTool.from_defaults(retriever, name="docs", description="Finds passages.").call(QUESTION)
    assert retriever.retrieve(QUESTION)[0].text in str(shown)
    assert asyncio.run(tool.acall(input=QUESTION)).raw_output.source_nodes == answer.raw_output.source_nodes


def test_workflow(retriever: EpicRetriever) -> None:
    class Lookup(Workflow):
        @step
        async def look_up(self, event: StartEvent) -> StopEvent:
            return StopEvent(result=await retriever.aretrieve(event.question))

    async def run() -> Any:
        return await Lookup(timeout=60).run(question=QUESTION)

    assert asyncio.run(run()) == retriever.retrieve(QUESTION)


def test_nodes_in_another_index(retriever: EpicRetriever) -> None:
    nodes = [each.node for each in retriever.retrieve(QUESTION)]
    index = VectorStoreIndex(nodes, embed_model=MockEmbedding(embed_dim=4))
    assert len(index.as_retriever(similarity_top_k=9).retrieve("x")) == len(nodes)


# -- copies ---------------------------------------------------------------------------------------------------


def test_copies_share_the_open_index(retriever: EpicRetriever) -> None:
    for made in (copy.copy(retriever), copy.deepcopy(retriever), copy.deepcopy({"a": [retriever]})["a"][0]):
        assert made is not retriever
        assert made.indexer is retriever.indexer
        made.similarity_top_k = 1
        assert len(made.retrieve("x")) == 1
    assert retriever.similarity_top_k == 4


def test_pickle(index_dir: Path, tiny_encoder: EpicEncoder) -> None:
    bank = DemonstrationBank([("throw it away", "Delete the folder.")])
    filters = MetadataFilters(filters=[MetadataFilter(key="kind", value="pdf", operator="!=")])
    with EpicRetriever(index_dir, encoder=tiny_encoder, bank=bank, filters=filters, mode="dense") as retriever:
        data = pickle.dumps(retriever)
        assert len(data) < 20_000  # no weights
        with pickle.loads(data) as again:
            assert again.indexer is not retriever.indexer
            assert ids(again.retrieve(QUESTION)) == ids(retriever.retrieve(QUESTION))
            assert again.similarity_top_k == retriever.similarity_top_k


def test_unpicklable_callback_manager(index_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    debug.lock = threading.Lock()  # type: ignore[attr-defined]
    retriever = EpicRetriever(index_dir, callback_manager=CallbackManager([debug]))
    again = pickle.loads(pickle.dumps(retriever))
    assert again.callback_manager.handlers == []
    assert retriever.callback_manager.handlers == [debug]
    assert "callback_manager of EpicRetriever cannot be pickled" in caplog.text


def test_import_does_not_load_torch() -> None:
    code = "import sys; from llama_index.retrievers.epic import EpicRetriever; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
