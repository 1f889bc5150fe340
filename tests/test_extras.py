"""A light installation: each part imports what its extra brings, and says which extra is missing."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from tests.helpers.extras import declared, environment, link_packages, project
from tests.test_structure import SOURCES, modules, tree

PARTS = {
    "epic_rag": [],
    "epic_rag.onnx_transformer": ["onnx"],
    "epic_rag.training": ["train"],
    "epic_rag.evaluation": ["eval"],
    "epic_rag_demos": [],
    "epic_rag_chroma": ["index"],
    "epic_rag_ray": ["ray"],
    "epic_rag_server": ["serve"],
    "epic_rag_server.mcp": ["mcp"],
    "epic_rag_langchain": ["langchain"],
    "epic_rag_haystack": ["haystack"],
    "llama_index": ["llama-index"],
    "epic_rag_cli": ["cli"],
}
"""Modules by the beginning of their names, the longest counts, and the extras that they may rely on."""

WHEN_NEEDED = {
    "epic_rag.sentence_model": ["models"],
    "epic_rag.backbone": ["train"],
    "epic_rag.evaluation.few_shot_methods": ["llama-index"],
    "epic_rag.evaluation.few_shot_report": ["dev"],
    "epic_rag_chroma.search.reranking": ["rerank"],
    "epic_rag_cli.commands.mcp": ["mcp"],
}
"""Further extras of imports inside functions, which report a missing package by a `MissingExtraError`."""

BROUGHT_BY = {"fsspec": "huggingface-hub", "tokenizers": "transformers"}
"""Packages that a requirement brings because its own interface has their objects."""


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the top-level name of each import and whether it runs with the module; those for type checkers do not."""

    def visit(node: ast.AST, runs: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            runs = False
        if isinstance(node, ast.Import):
            yield from ((alias.name, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module), runs
        for child in ast.iter_child_nodes(node):
            yield from visit(child, runs)

    for name, runs in visit(tree(path), True):
        top = name.split(".")[0]
        # LlamaIndex's own modules share the name llama_index with ours.
        ours = ("llama_index.embeddings.epic", "llama_index.retrievers.epic")
        if top not in sys.stdlib_module_names and not (
            top in SOURCES and (top != "llama_index" or name.startswith(ours))
        ):
            yield top, runs


def test_every_part_imports_only_what_its_extra_declares() -> None:
    homes = importlib.metadata.packages_distributions()
    found = []
    for module, path in modules().items():
        part = max((name for name in PARTS if f"{module}.".startswith(f"{name}.")), key=len)
        for name, runs in imported(path):
            extras = [*PARTS[part], *([] if runs else WHEN_NEEDED.get(module, []))]
            known = declared(*extras)
            known |= {name for name, bringer in BROUGHT_BY.items() if bringer in known}
            if not known & {canonicalize_name(home) for home in homes.get(name, [name])} and name != "tomllib":
                found.append(f"{module} imports {name}, which {', '.join(extras) or 'the encoder alone'} does not have")
    assert found == []


def test_the_extras_of_the_lists_exist() -> None:
    known = set(project()["optional-dependencies"])
    assert {extra for extras in (*PARTS.values(), *WHEN_NEEDED.values()) for extra in extras} <= known


def test_all_has_every_extra_but_those_for_development() -> None:
    extras = set(project()["optional-dependencies"]) - {"dev", "all"}
    assert declared("all") == declared(*extras)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of `pip install epic-rag`."""
    return environment(link_packages(tmp_path_factory.mktemp("bare") / "packages"))


def python(code: str, env: dict[str, str], *arguments: str, cwd: Path | None = None) -> Any:
    command = [sys.executable, "-S", "-W", "error::ImportWarning", *(("-c", code) if code else ()), *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)


def test_the_encoder_alone_embeds(bare: dict[str, str], tmp_path: Path) -> None:
    code = """
import numpy as np
from epic_rag import DemonstrationBank, EpicEncoder

encoder = EpicEncoder.from_pretrained("epic-minilm")
bank = DemonstrationBank([("crash", "Load the dump to restore the database.")])
texts = ["To restore the database, load the dump.", "Oil the chain once a month."]
few = encoder.encode_document(texts)
many = encoder.encode_document(texts * 50)  # by torch
assert np.allclose(few, many[:2], atol=2e-3)
query = encoder.encode_query("get the data back", bank=bank)
assert encoder.similarity(query, few).argmax() == 0
encoder.save_pretrained("copy")
print(EpicEncoder.from_pretrained("copy", device="cpu").describe()[0])
"""
    result = python(code, bare, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "run by" in result.stdout


def test_an_import_names_the_extra_that_is_missing(bare: dict[str, str]) -> None:
    statements = {
        "from epic_rag_chroma import ChromaIndexer": "index",
        "from epic_rag_chroma import EpicEmbeddingFunction": "index",
        "from llama_index.embeddings.epic import EpicEmbedding": "llama-index",
        "from llama_index.retrievers.epic import EpicRetriever": "llama-index",
        "from epic_rag_ray import run_pipeline": "ray",
        "import epic_rag_server": "serve",
        "import epic_rag_langchain": "langchain",
        "import epic_rag_haystack": "haystack",
    }
    code = f"""
for statement in {list(statements)!r}:
    try:
        exec(statement)
    except ImportError as error:
        print(type(error).__name__, error)
"""
    result = python(code, bare)
    assert result.returncode == 0, result.stderr
    for line, extra in zip(result.stdout.splitlines(), statements.values(), strict=True):
        assert line.startswith("MissingExtraError ")
        assert line.endswith(f", which is not installed. Run `pip install 'epic-rag[{extra}]'`.")


def test_the_command_names_the_extra_that_is_missing(bare: dict[str, str]) -> None:
    result = python("", bare, "-m", "epic_rag_cli", "--version")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: The command line needs ")
    assert result.stderr.endswith(", which is not installed. Run `pip install 'epic-rag[cli]'`.\n")
    assert result.stderr.count("\n") == 1


def test_a_query_of_a_model_that_needs_more_names_the_extra(bare: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "model2vec"}')
    code = f"from epic_rag import EpicEncoder\nEpicEncoder.from_pretrained({str(tmp_path)!r})"
    result = python(code, bare)
    assert result.stderr.endswith(
        "needs sentence-transformers, which is not installed. Run `pip install 'epic-rag[models]'`.\n"
    )


def test_the_command_line_indexes_and_finds_with_its_extra_alone(tmp_path: Path, tiny_checkpoint: Path) -> None:
    env = environment(link_packages(tmp_path / "packages", "cli"))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "undo.md").write_text("# Undo\n\n" + "To undo the last commit, reset softly. " * 100)
    (docs / "tool.py").write_text("def encode(texts):\n    return texts\n")
    (docs / "page.html").write_text("<h1>Cats</h1><p>Cats sleep most of the day.</p>")
    model = ("--model", str(tiny_checkpoint))
    made = python("", env, "-m", "epic_rag_cli", "index", str(docs), *model)
    assert made.returncode == 0, made.stderr
    assert "3 added" in made.stdout
    assert "warning" not in made.stderr
    found = python("", env, "-m", "epic_rag_cli", "query", "cats", "--mode", "keyword", "--index-dir", str(docs))
    assert (found.returncode, "page.html" in found.stdout) == (0, True), found.stderr
    served = python("", env, "-m", "epic_rag_cli", "serve", *model)
    assert (served.returncode, served.stderr.endswith("Run `pip install 'epic-rag[serve]'`.\n")) == (1, True)
