"""Every example on every page runs as it stands, from top to bottom, in an empty folder.

The shipped checkpoints are replaced by a tiny one; the README runs with the real one. A page that speaks of files or
servers which it does not make has a function here that makes them, and a page that shows results has one that compares.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag import DemonstrationBank, EpicEncoder, checkpoints
from epic_rag_chroma import ChromaIndexer
from epic_rag_cli.main import run
from epic_rag_server import AccessPolicy, BankStore, Server, Service, create_app
from tests.conftest import make_encoder, make_tokenizer
from tests.helpers.model_files import make_adapter, make_hub_cache, write_gguf
from tests.helpers.pages import ROOT, PageRun, blocks
from tests.helpers.servers import ChromaProcess, close_plain, free_port, plain_client

PAGES = [
    "README.md",
    "demos/epic_rag_demos/README.md",
    "integrations/llama-index-embeddings-epic/README.md",
    *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
]
WITH_EXAMPLES = sorted(
    page
    for page in PAGES
    if any(block.language not in ("", "text") for block in blocks((ROOT / page).read_text(encoding="utf-8")))
)


@pytest.fixture
def page_run(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> PageRun:
    """An empty working directory, where every shipped checkpoint is the tiny one."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in [*(name for name in os.environ if name.startswith("EPIC_RAG_")), "NO_COLOR", "FORCE_COLOR"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for info in checkpoints.list_checkpoints():
        shutil.copytree(tiny_checkpoint, tmp_path / "shipped" / info.name)
    monkeypatch.setattr(checkpoints, "_SHIPPED", tmp_path / "shipped")
    return PageRun(folder, monkeypatch, capfd, environment={"EPIC_RAG_MODEL": str(tiny_checkpoint)})


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_every_example_runs(page: str, page_run: PageRun) -> None:
    with ExitStack() as stack:
        text = (ROOT / page).read_text(encoding="utf-8")
        if page in PREPARED:
            text = PREPARED[page](page_run, text, stack) or text
        page_run.run(text, page)
        if page in COMPARED:
            COMPARED[page](page_run)


def write_lines(file: str, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines, gzipped where the name ends in .gz."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    Path(file).write_bytes(gzip.compress(text) if file.endswith(".gz") else text)


def prepare_readme(page_run: PageRun, text: str, stack: ExitStack) -> None:
    """The shipped checkpoint, and four of the pages."""
    page_run.monkeypatch.setattr(checkpoints, "_SHIPPED", ROOT / "epic_rag" / "checkpoints")
    Path("docs").mkdir()
    for name in ("chroma.md", "demonstrations.md", "formats.md", "query.md"):
        shutil.copyfile(ROOT / "docs" / name, Path("docs", name))


def compare_readme(page_run: PageRun) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    # The first hit is the one that the README shows.
    (shown,) = [block.text for block in blocks(text) if block.language == "text" and block.text.startswith("1  ")]
    place = re.compile(r"^1  .*?  (\S+\.md):[\d-]+  (.*)$", re.MULTILINE)
    assert place.search(page_run.printed["shell"][1]).groups() == place.search(shown).groups()  # type: ignore[union-attr]
    # The toner, and not the jam that the demonstration is about, answers "pages come out grey".
    jam, toner = (float(value) for value in re.findall(r"-?\d\.\d+", page_run.output("python")))
    assert toner > jam


def prepare_encoder(page_run: PageRun, text: str, stack: ExitStack) -> None:
    """Two model folders, a model in the hub's cache, a GGUF file, an adapter, pairs."""
    from huggingface_hub import constants
    from transformers import AutoModel

    tiny = checkpoints.resolve("epic-minilm")
    page_run.monkeypatch.setattr(constants, "HF_HUB_CACHE", str(page_run.folder / "cache"))
    make_hub_cache(page_run.folder / "cache", "Qwen/Qwen3-0.6B", tiny)
    for folder in ("my-model", "my-llm"):
        shutil.copytree(tiny, folder)
    Path("downloads").mkdir()
    write_gguf(make_encoder().backbone.transformer, make_tokenizer(), Path("downloads/model.gguf"))
    make_adapter(AutoModel.from_pretrained("my-llm"), Path("my-adapter"), target_modules=["q_proj"])
    write_lines("pairs.jsonl", ({"query": f"term {number}", "passage": f"what {number} means"} for number in range(12)))


def compare_encoder(page_run: PageRun) -> None:
    page = (ROOT / "docs/encoder.md").read_text(encoding="utf-8")
    printed = page_run.output("python").splitlines()
    assert [line.split()[0] for line in printed[-4:-1]] == ["epic", "text", "task-vector"]
    assert f"print(error)  # {printed[-1]}\n" in page


def prepare_demonstrations(page_run: PageRun, text: str, stack: ExitStack) -> None:
    """An index of one file in the working directory."""
    Path("manual.md").write_text("# Logs\n\nLog files are rotated every night.\n", encoding="utf-8")
    assert run(["index", "."]) == 0


def compare_demonstrations(page_run: PageRun) -> None:
    assert len(DemonstrationBank.load("mybank")) == 4
    assert all(text.strip() for text in page_run.printed["shell"])
    *ranks, _ = [line.split() for line in page_run.output("python").splitlines()]
    assert [k for k, _ in ranks] == ["0", "1", "2", "4"]
    assert all(0 < float(score) <= 1 for _, score in ranks)
    assert np.shape(page_run.names["vectors"])[0] == 3


def compare_chroma(page_run: PageRun) -> None:
    printed = page_run.output("python")
    assert printed.startswith("1 files, 2 chunks\n1 ")
    assert "broken.pdf - a broken PDF" in printed


def prepare_server(page_run: PageRun, text: str, stack: ExitStack) -> str:
    """A Chroma server on a free port."""
    server = stack.enter_context(ChromaProcess(page_run.folder / "database"))
    page_run.names |= {"close_plain": close_plain, "server": server}
    return text.replace("http://localhost:8000", server.url).replace("client.close()", "close_plain(client)")


def compare_server(page_run: PageRun) -> None:
    with plain_client(page_run.names["server"].url) as client:
        assert client.list_collections() == []


def compare_search(page_run: PageRun) -> None:
    lines = page_run.output("python").splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["1", "2"]
    assert lines[2] == "src/users.py True None"
    assert lines[3] == "['guide/remove.md']"
    assert lines[4] == "['guide/remove.md', 'src/users.py']"
    del lines[3:5]
    assert lines[3] == "['src/users.py']"
    assert sorted(re.findall(r"guide/\S+md", lines[4])) == ["guide/remove.md", "guide/undo.md"]
    assert lines[5] == "['guide/remove.md', 'src/users.py']"
    assert re.fullmatch(r"guide/(old/)?undo\.md also in guide/(old/)?undo\.md:\d", lines[6])
    assert lines[7].startswith("2 ")
    # Five chunks of one file: no other file takes their places.
    assert lines.pop(8).count("('guide/long.md', ") == 5
    assert lines.pop(8).endswith("was undone.' 401 lines")
    assert re.fullmatch(r"src/users\.py -[\d.]+ True", lines[8])
    assert [line.split()[0] for line in lines[9:12]] == ["1", "2", "3"]
    assert {line.split()[1] for line in lines[9:12]} == {"project", "notes"}
    assert len(lines) == 14


def prepare_query(page_run: PageRun, text: str, stack: ExitStack) -> None:
    """Keyword mode, as the vectors of a random model say nothing, and an editor that prints."""
    editor = page_run.folder / "an-editor"
    editor.write_text('#!/bin/sh\necho opened "$@"\n')
    editor.chmod(0o755)
    page_run.monkeypatch.delenv("VISUAL", raising=False)
    page_run.monkeypatch.setenv("EDITOR", str(editor))
    page_run.monkeypatch.setenv("EPIC_RAG_MODE", "keyword")


def compare_query(page_run: PageRun) -> None:
    out = page_run.output("shell")
    assert out.startswith("5 added, ")
    assert re.search(r"^    also in (old/)?undo\.txt:1$", out, flags=re.M)
    assert re.search(r"^1  bm25 <0\.01  history\.py:1-2  parent_of$", out, flags=re.M)
    assert re.search(r"^1  bm25 \d\.\d\d  \S+/notes/commits\.md:1-3  Commits$", out, flags=re.M)
    assert re.search(rf"^opened {re.escape(str(page_run.folder))}/manual/", out, flags=re.M)
    hits = [json.loads(line) for line in out.splitlines() if line.startswith('{"query"')]
    assert [(hit["query"], hit["query_id"]) for hit in hits] == [("undo a commit", 1), ("parent of a commit", 2)]
    assert re.search(r"/manual/history\.py:1 \d", out)
    assert "Question: how do I undo a commit" in Path("prompt.txt").read_text(encoding="utf-8")
    assert np.load("passages.npy").shape[0] == 2
    assert np.load("query.npy").shape[0] == 1


def prepare_llama_index(page_run: PageRun, text: str, stack: ExitStack) -> None:
    """Chunk sizes of LlamaIndex that the page sets are set back afterwards."""
    from llama_index.core import Settings

    page_run.monkeypatch.setattr(Settings, "_node_parser", None)


def compare_llama_index(page_run: PageRun) -> None:
    names = page_run.names
    assert len(names["documents"]) == len(names["nodes"]) == names["collection"].count() == 3
    assert {hit.node.ref_doc_id for hit in names["hits"]} <= {"error-e7", "descaling", "changes"}
    assert {hit.node.metadata["path"] for hit in names["found"]} == {"machine.md", "tap.py"}
    printed = page_run.output("python").splitlines()
    assert len(printed) == 3 + 1 + 1
    assert all(re.search(r"(machine\.md|tap\.py)", line) for line in printed)


def compare_langchain(page_run: PageRun) -> None:
    *ids, nearest, first, second = page_run.output("python").splitlines()
    assert len(ids) == 2
    assert {*ids, nearest} <= {"error-e7", "descaling", "changes"}
    assert all(line.startswith("machine.md ") for line in (first, second))
    assert "Descale" in page_run.names["context"]
    assert {each.metadata["kind"] for each in page_run.names["only_text"]} == {"markdown"}


def compare_haystack(page_run: PageRun) -> None:
    assert page_run.output("python").strip() in ("Error E7", "Descaling")
    assert page_run.names["again"].to_dict() == page_run.names["query"].to_dict()


def prepare_training(page_run: PageRun, text: str, stack: ExitStack) -> None:
    """A folder to index."""
    Path("manual").mkdir()
    Path("manual/display.md").write_text("# Display\n\nIf nothing is displayed, hold the power button.\n")


def compare_training(page_run: PageRun) -> None:
    assert all(page_run.printed["shell"])
    assert "runs/mine-3/final {'step': 5" in page_run.output("python")
    assert {"faq", "mine", "mine-2", "mine-3"} <= {path.name for path in Path("runs").iterdir()}


def prepare_evaluation(page_run: PageRun, text: str, stack: ExitStack) -> None:
    """Evaluation sets of each kind, files of pairs, and models in the folders that the page names."""
    page_run.skipped = ("epic-rag ablate",)  # until its grid is written, which the page shows below
    for name in ("faq", "tickets", "wiki"):
        rows = [{"query": f"{name} {number}", "positive": f"{number} in {name}"} for number in range(60)]
        write_lines(f"my-pairs/{name}.jsonl", rows)
    tiny = checkpoints.resolve("epic-minilm")
    for folder in ("path/to/an-LLM", "path/to/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"):
        shutil.copytree(tiny, folder)
    words = {"q1": "alpha", "q2": "beta"}
    write_lines("sets/Cranfield/corpus.jsonl.gz", ({"_id": id_, "title": "", "text": words[id_]} for id_ in words))
    write_lines("sets/Cranfield/queries.jsonl.gz", ({"_id": id_, "text": f"ask {words[id_]}"} for id_ in words))
    Path("sets/Cranfield/qrels").mkdir()
    Path("sets/Cranfield/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tq1\t1\nq2\tq2\t1\n")
    write_lines("sets/TrecQA/reranking.jsonl.gz", [{"query": "ask", "positive": ["alpha"], "negative": ["beta"]}])
    for name in ("STSBenchmark", "STS13", "SICK-R"):
        Path("sets", name).mkdir()
        rows = (f"a {number}\tb {number}\t{number}\n" for number in range(4))
        Path("sets", name, "test.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(rows))
    for split, count in (("train", 10), ("test", 2)):
        rows = [{"text": f"{label} {split} {i}", "label": label} for label in ("pay", "lost") for i in range(count)]
        write_lines(f"sets/Banking77/{split}.jsonl", rows)
    tasks = {"foldoc": "Find it", "nl2bash": "Find the command"}
    for name in tasks:
        rows = [{"query": f"{name} {number}", "positive": f"what {name} {number} is"} for number in range(40)]
        write_lines(f"pairs/{name}.jsonl.gz", rows)
    Path("pairs/instructions.json").write_text(json.dumps(tasks))


def compare_evaluation(page_run: PageRun) -> None:
    assert Path("untrained/epic.json").is_file()
    for command, printed in zip(page_run.commands, page_run.printed["shell"], strict=True):
        assert "| ---" in printed or "epic-rag eval" not in command
    assert run(["ablate", "grid.yaml", "--only", "epic", "--set", "steps=1", "-o", "runs/ablation"]) == 0


def prepare_cli(page_run: PageRun, text: str, stack: ExitStack) -> None:
    """For each example: a folder with an index, a file of pairs, a bank."""
    Path("notes.md").write_text("# Notes\n\nOf today.\n")
    Path("notes").mkdir()
    Path("notes/commits.md").write_text("# Commits\n\nA commit has a message.\n")
    assert run(["index", write_docs("docs"), "notes.md", "--quiet"]) == 0
    assert run(["index", "notes", "--quiet"]) == 0
    assert run(["index", "docs", "--to", "vectors", "--quiet"]) == 0
    pairs = ({"query": f"term {number}", "positive": f"what {number} means"} for number in range(12))
    write_lines("pairs.jsonl", pairs)
    write_lines("terms.jsonl", ({"query": f"word {number}", "positive": f"its sense {number}"} for number in range(12)))
    assert run(["bank", "build", "pairs.jsonl", "--out", "mybank", "--task", "docs"]) == 0
    assert run(["query", "undo", "--index-dir", "docs"]) == 0  # `bank add` takes a hit of the last query
    Path("grid.yaml").write_text(
        "recipe: {data: ., tasks: [pairs], steps: 2, batch_size: 2, max_demonstrations: 2}\n"
        "evaluation: {heldout: [terms], num_demonstrations: [2]}\narms: {epic: {}, none: {strategy: none}}\n"
    )
    shutil.copytree(checkpoints.resolve("epic-minilm"), "runs/mine/final")
    Path(".epic-rag").symlink_to("docs/.epic-rag")
    Path("passages.txt").write_text("A commit has a message.\nThe manual is beside the installer.\n")
    start = Path.cwd().parent / "start"
    shutil.copytree(".", start, symlinks=True)

    def fresh(line: str) -> None:
        shutil.rmtree(page_run.folder)
        shutil.copytree(start, page_run.folder, symlinks=True)
        page_run.monkeypatch.chdir(page_run.folder)

    page_run.before_command = fresh
    # They run until Ctrl-C; tests/cli/test_serve.py and test_mcp.py run them.
    # And tests/cli/test_ask.py has an endpoint.
    # `bank suggest` needs ten sections; tests/cli/test_bank.py runs it.
    page_run.skipped = (
        "epic-rag serve",
        "epic-rag mcp",
        "epic-rag ask 'how do I undo the last commit?'",
        "epic-rag bank suggest",
    )


def prepare_http_server(page_run: PageRun, text: str, stack: ExitStack) -> str:
    """A server on a free port, started where the page starts it."""
    service_url = f"http://127.0.0.1:{(port := free_port())}"

    def start(line: str) -> None:
        if not line.startswith("curl") or "server" in page_run.names:
            return
        encoder = EpicEncoder.from_pretrained("epic-minilm")
        encoder.name = "epic-minilm"  # it is the tiny one
        service = Service(encoder, {"docs": ChromaIndexer("docs/.epic-rag", encoder=encoder)}, BankStore(Path("banks")))
        page_run.names["server"] = server = Server(create_app(service, AccessPolicy()), port=port)
        thread = threading.Thread(target=server.run)
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.stop)

    page_run.skipped = ("epic-rag serve",)
    page_run.before_command = start
    return text.replace("http://127.0.0.1:8400", service_url)


def compare_http_server(page_run: PageRun) -> None:
    *_, embedded, found, document, settings, of_http = page_run.printed["shell"]
    embedded, found, document = map(json.loads, (embedded, found, document))
    assert "claude mcp add epic-rag" in settings
    assert "claude mcp add --transport http" in of_http
    assert [len(row["embedding"]) for row in embedded["data"]] == [32, 32]
    assert [hit["path"] for hit in found["data"]] == ["undo.md"]
    assert document["lines"][0] == "# Undo"
    assert page_run.output("python").splitlines()[:4] == ["32", "32 32", "32", "32"]
    assert page_run.output("python").splitlines()[-1] == "0"


def write_docs(folder: str) -> str:
    Path(folder, "drafts").mkdir(parents=True)
    Path(folder, "undo.md").write_text("# Undo\n\nTo undo the last commit and keep its changes, reset softly.\n")
    Path(folder, "drafts/idea.md").write_text("# Idea\n\nA draft that nobody has read.\n")
    return folder


Prepare = Callable[[PageRun, str, ExitStack], Any]


def compare_scale(page_run: PageRun) -> None:
    printed = page_run.output("python").splitlines()
    assert printed[0].startswith("2 chunks in 4 shards of ")
    assert printed[1:] == ["git.md", "git.md"]


PREPARED: dict[str, Prepare] = {
    "README.md": prepare_readme,
    "demos/epic_rag_demos/README.md": prepare_demonstrations,
    "docs/chroma_server.md": prepare_server,
    "docs/cli.md": prepare_cli,
    "docs/demonstrations.md": prepare_demonstrations,
    "docs/encoder.md": prepare_encoder,
    "docs/evaluation.md": prepare_evaluation,
    "docs/llama_index.md": prepare_llama_index,
    "docs/query.md": prepare_query,
    "docs/scale.md": prepare_server,
    "docs/server.md": prepare_http_server,
    "docs/training.md": prepare_training,
}
COMPARED: dict[str, Callable[[PageRun], None]] = {
    "README.md": compare_readme,
    "docs/chroma.md": compare_chroma,
    "docs/chroma_server.md": compare_server,
    "docs/demonstrations.md": compare_demonstrations,
    "docs/encoder.md": compare_encoder,
    "docs/evaluation.md": compare_evaluation,
    "docs/haystack.md": compare_haystack,
    "docs/langchain.md": compare_langchain,
    "docs/llama_index.md": compare_llama_index,
    "docs/query.md": compare_query,
    "docs/scale.md": compare_scale,
    "docs/search.md": compare_search,
    "docs/server.md": compare_http_server,
    "docs/training.md": compare_training,
}


def test_every_page_with_a_preparation_exists() -> None:
    assert set(PREPARED) | set(COMPARED) <= set(WITH_EXAMPLES)
