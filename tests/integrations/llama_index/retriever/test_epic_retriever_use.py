"""EpicRetriever in use: async and threads, the machinery of LlamaIndex, copies."""

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
from llama_index.core.schema import NodeWithScore
from llama_index.core.tools import QueryEngineTool, RetrieverTool
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from llama_index.core.workflow import StartEvent, StopEvent, Workflow, step

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag_chroma import ChromaIndexer
from llama_index.retrievers.epic import EpicRetriever

Nearest = Callable[[Sequence[str]], list[str]]
QUESTION = "how do I remove the package"


def ids(nodes: list[NodeWithScore]) -> list[str]:
    return [each.node.node_id for each in nodes]


# -- async, threads -------------------------------------------------------------------------------------------


def test_async_gives_the_same(retriever: EpicRetriever) -> None:
    assert asyncio.run(retriever.aretrieve(QUESTION)) == retriever.retrieve(QUESTION)


def test_async_leaves_the_event_loop_free(index_dir: Path, tiny_encoder: EpicEncoder) -> None:
    # The encoder waits for something that only the event loop can do.
    free = threading.Event()

    class Waiting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny_encoder, name)

        def encode_query(self, *texts: Any, **options: Any) -> Any:
            assert free.wait(60)
            return tiny_encoder.encode_query(*texts, **options)

        def encode_document(self, *texts: Any) -> Any:
            raise AssertionError

    async def ask() -> list[list[NodeWithScore]]:
        async def release() -> list[NodeWithScore]:
            free.set()
            return []

        return await asyncio.gather(*(waiting.aretrieve(text) for text in "abc"), release())

    with EpicRetriever(index_dir, encoder=Waiting(), mode="dense") as waiting:  # type: ignore[arg-type]
        assert [bool(nodes) for nodes in asyncio.run(ask())] == [True, True, True, False]


def test_threads_and_loops_share_a_retriever(retriever: EpicRetriever) -> None:
    questions = [f"{word} {number}" for number in range(4) for word in ("cats", "install", "decode texts")]
    expected = {question: ids(retriever.retrieve(question)) for question in questions}
    found: dict[str, list[str]] = {}

    def ask(some: list[str]) -> None:
        for question in some:
            found[question] = ids(retriever.retrieve(question))

    async def gather(some: list[str]) -> None:
        for question, nodes in zip(some, await asyncio.gather(*map(retriever.aretrieve, some)), strict=True):
            found[question] = ids(nodes)

    threads = [
        threading.Thread(target=ask, args=(questions[:4],)),
        threading.Thread(target=ask, args=(questions[4:8],)),
        threading.Thread(target=lambda: asyncio.run(gather(questions[8:]))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_an_index_that_grows_is_seen(tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
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


def test_events_of_both_kinds_are_sent(index_dir: Path, tiny_encoder: EpicEncoder) -> None:
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


def test_a_query_engine_answers_from_the_nodes(retriever: EpicRetriever) -> None:
    for engine in (RetrieverQueryEngine.from_args(retriever, llm=MockLLM()), retriever.as_query_engine(MockLLM())):
        response = engine.query(QUESTION)
        assert ids(response.source_nodes) == ids(retriever.retrieve(QUESTION))
        # MockLLM says what it was told: the nodes with where they stand.
        assert "path: guide.md" in str(response)
        assert "file_path" not in str(response)
        assert ids(asyncio.run(engine.aquery(QUESTION)).source_nodes) == ids(response.source_nodes)


def test_postprocessors_that_sort_by_score_keep_the_ranking(retriever: EpicRetriever) -> None:
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


def test_hyde_embeds_what_the_model_imagines(dense: EpicRetriever, nearest: Nearest) -> None:
    engine = TransformQueryEngine(dense.as_query_engine(MockLLM()), HyDEQueryTransform(llm=MockLLM(max_tokens=3)))
    # The three first words of its prompt are what MockLLM "imagines".
    expected = nearest(["text text text", "Cats sleep"])
    assert ids(engine.query("Cats sleep").source_nodes) == expected


def test_an_agent_can_use_it_as_a_tool(retriever: EpicRetriever) -> None:
    engine = retriever.as_query_engine(MockLLM(), response_mode="compact")
    tool = QueryEngineTool.from_defaults(engine, name="docs", description="Looks things up in the documentation.")
    said = tool.call(input=QUESTION)
    assert ids(said.raw_output.source_nodes) == ids(retriever.retrieve(QUESTION))
    shown = RetrieverTool.from_defaults(retriever, name="docs", description="Finds passages.").call(QUESTION)
    assert retriever.retrieve(QUESTION)[0].text in str(shown)
    assert asyncio.run(tool.acall(input=QUESTION)).raw_output.source_nodes == said.raw_output.source_nodes


def test_a_workflow_can_use_it(retriever: EpicRetriever) -> None:
    class Lookup(Workflow):
        @step
        async def look_up(self, event: StartEvent) -> StopEvent:
            return StopEvent(result=await retriever.aretrieve(event.question))

    async def run() -> Any:
        return await Lookup(timeout=60).run(question=QUESTION)

    assert asyncio.run(run()) == retriever.retrieve(QUESTION)


def test_nodes_fit_another_index(retriever: EpicRetriever) -> None:
    nodes = [each.node for each in retriever.retrieve(QUESTION)]
    index = VectorStoreIndex(nodes, embed_model=MockEmbedding(embed_dim=4))
    assert len(index.as_retriever(similarity_top_k=9).retrieve("x")) == len(nodes)


# -- copies ---------------------------------------------------------------------------------------------------


def test_copies_share_the_open_index_and_the_weights(retriever: EpicRetriever) -> None:
    for made in (copy.copy(retriever), copy.deepcopy(retriever), copy.deepcopy({"a": [retriever]})["a"][0]):
        assert made is not retriever
        assert made.indexer is retriever.indexer
        made.similarity_top_k = 1
        assert len(made.retrieve("x")) == 1
    assert retriever.similarity_top_k == 4


def test_a_pickled_copy_loads_the_model_of_the_index(index_dir: Path, tiny_encoder: EpicEncoder) -> None:
    bank = DemonstrationBank([("throw it away", "Delete the folder.")])
    filters = MetadataFilters(filters=[MetadataFilter(key="kind", value="pdf", operator="!=")])
    with EpicRetriever(index_dir, encoder=tiny_encoder, bank=bank, filters=filters, mode="dense") as retriever:
        data = pickle.dumps(retriever)
        assert len(data) < 20_000  # no weights
        with pickle.loads(data) as again:
            assert again.indexer is not retriever.indexer
            assert ids(again.retrieve(QUESTION)) == ids(retriever.retrieve(QUESTION))
            assert again.similarity_top_k == retriever.similarity_top_k


def test_a_callback_that_cannot_be_pickled_stays_behind(index_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    debug.lock = threading.Lock()  # type: ignore[attr-defined]
    retriever = EpicRetriever(index_dir, callback_manager=CallbackManager([debug]))
    again = pickle.loads(pickle.dumps(retriever))
    assert again.callback_manager.handlers == []
    assert retriever.callback_manager.handlers == [debug]
    assert "callback_manager of EpicRetriever cannot be pickled" in caplog.text


def test_importing_it_does_not_load_torch() -> None:
    code = "import sys; from llama_index.retrievers.epic import EpicRetriever; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
