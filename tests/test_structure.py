"""The structure of the code: imports in one direction and without cycles, modules of a readable size, docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import epic_rag_chroma

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "epic_rag": ROOT,
    "epic_rag_chroma": ROOT / "integrations",
    "epic_rag_ray": ROOT / "integrations",
    "epic_rag_server": ROOT / "integrations",
    "epic_rag_langchain": ROOT / "integrations",
    "epic_rag_haystack": ROOT / "integrations",
    "llama_index": ROOT / "integrations",
    "epic_rag_cli": ROOT / "cli",
    "epic_rag_demos": ROOT / "demos",
}
"""The import packages and the folders that hold them."""

LAYERS = {
    "epic_rag": set(),
    "epic_rag_demos": set(),
    "epic_rag_chroma": {"epic_rag"},
    "llama_index": {"epic_rag", "epic_rag_chroma"},
    "epic_rag_ray": {"epic_rag", "epic_rag_chroma"},
    "epic_rag_langchain": {"epic_rag", "epic_rag_chroma"},
    "epic_rag_haystack": {"epic_rag"},
    "epic_rag_server": {"epic_rag", "epic_rag_chroma"},
    "epic_rag_cli": {"epic_rag", "epic_rag_chroma", "epic_rag_ray", "epic_rag_server"},
}
"""Each package, and the others that it may import."""

MAX_LINES = 800


def modules() -> dict[str, Path]:
    """Return every production module by its import name."""
    found = {}
    for package, root in SOURCES.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, str | None, int]]:
    """Yield module, name (None for `import module`) and line of each import, at whatever depth it stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            for alias in node.names:
                yield str(node.module), alias.name, node.lineno


def edges() -> dict[str, set[str]]:
    """Return the import graph. Imports inside functions and for type checkers count."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        targets = set()
        for source, name, _ in imports(path):
            full = f"{source}.{name}"
            targets |= {full if full in known else source} & set(known)
        graph[module] = targets - {module}
    return graph


def test_there_are_no_import_cycles() -> None:
    try:
        TopologicalSorter(edges()).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("package", SOURCES)
def test_packages_import_only_those_below(package: str) -> None:
    allowed = {package, *LAYERS[package]}
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {source}"
        for module, path in modules().items()
        if module.split(".")[0] == package
        for source, _, line in imports(path)
        if (top := source.split(".")[0]) in SOURCES
        and top not in allowed
        # LlamaIndex's own modules share the name llama_index with ours.
        and (top != "llama_index" or source.startswith(("llama_index.embeddings.epic", "llama_index.retrievers.epic")))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("epic_rag", ("llama_index", "chromadb", "typer")),
        ("epic_rag.training", ("epic_rag.evaluation",)),
        ("epic_rag_chroma", ("typer",)),
        ("epic_rag_chroma", ("llama_index",)),
        ("llama_index", ("typer",)),
        ("epic_rag_ray", ("typer", "llama_index")),
        ("epic_rag_langchain", ("typer", "llama_index", "chromadb")),
        ("epic_rag_haystack", ("typer", "llama_index", "chromadb", "langchain_core")),
        ("epic_rag_server", ("typer", "llama_index", "chromadb")),
    ],
)
def test_packages_stay_independent(package: str, forbidden: tuple[str, ...]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {source}"
        for module, path in modules().items()
        if f"{module}.".startswith(f"{package}.")
        for source, name, line in imports(path)
        if f"{source}.{name}.".startswith(tuple(f"{each}." for each in forbidden))
    ]
    assert found == []


def test_other_packages_import_only_what_epic_rag_chroma_exports() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {source}.{name or ''}"
        for module, path in modules().items()
        if not module.startswith("epic_rag_chroma")
        for source, name, line in imports(path)
        if source.split(".")[0] == "epic_rag_chroma"
        and not (source == "epic_rag_chroma" and (name is None or name in epic_rag_chroma.__all__))
    ]
    assert found == []


def test_modules_have_at_most_800_lines() -> None:
    lines = {module: path.read_text(encoding="utf-8").count("\n") for module, path in modules().items()}
    assert {module: count for module, count in lines.items() if count > MAX_LINES} == {}


def test_docstrings_begin_with_what_the_code_does() -> None:
    first_word = re.compile(r"(What|Whether|How|Where|Which|Let|See|Give)\b")
    found = []
    for module, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring and first_word.match(docstring):
                    found.append(f"{module}.{getattr(node, 'name', '')}: {docstring.splitlines()[0]}")
    assert found == []
