"""Registration of `EpicEmbeddingFunction` with Chroma, without importing chromadb.

Chroma makes the function of a collection from the collection's configuration, if a class is registered under its name.
`import epic_rag_chroma` must stay cheap, and importing chromadb takes longer than a whole query. So the class is
registered at once if chromadb is imported already, and otherwise right after the program has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_with_chroma"]

_CHROMA = "chromadb"


def register_with_chroma() -> None:
    """Register the embedding function now, or when chromadb is imported."""
    if _CHROMA in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _ChromaFinder())


def _register() -> None:
    try:
        import_module("epic_rag_chroma.embedding_function")
    except Exception as error:  # chromadb itself must remain importable
        import logging

        logging.getLogger(__name__).warning("The embedding function is not registered with Chroma. %s", error)


class _ChromaFinder:
    """Finds chromadb as the other finders do, with a loader that also registers the function.

    A finder of `sys.meta_path`. importlib's abstract class is not imported, which would take as long as this package.
    """

    def __init__(self) -> None:
        self._is_searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of chromadb; None for any other module."""
        if fullname != _CHROMA or self._is_searching:
            return None
        from importlib.util import find_spec

        self._is_searching = True  # find_spec asks this finder, too
        try:
            spec = find_spec(fullname)
        finally:
            self._is_searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(self, spec, spec.loader)  # type: ignore[assignment]
        return spec


class _RegisteringLoader:
    """Loads chromadb with its own loader, which is put back in its place; then registers the function."""

    def __init__(self, finder: _ChromaFinder, spec: ModuleSpec, loader: Any) -> None:
        self._finder = finder
        self._spec = spec
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return what the module's own loader makes."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register the function."""
        self._spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register()
