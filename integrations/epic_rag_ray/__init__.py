"""Past one machine: reading, embedding and storing a corpus of any size, by Ray Data or without it.

Import everything from here. Names are loaded when they are first used; Ray is imported by what needs a cluster alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from epic_rag.errors import needs_extra

if TYPE_CHECKING:
    from epic_rag_ray.chunks import FileChunker
    from epic_rag_ray.datasink import ChromaDatasink
    from epic_rag_ray.encoder import EpicBatchEncoder
    from epic_rag_ray.engine import Cluster
    from epic_rag_ray.job import PipelineReport, PipelineSettings, RunProgress, read_progress, run_pipeline
    from epic_rag_ray.parts import VectorInfo, VectorParts, embedding_vectors, row_metadata
    from epic_rag_ray.storage import Storage
    from epic_rag_ray.stores import fill_chroma, fill_index, records

__all__ = [
    "ChromaDatasink",
    "Cluster",
    "EpicBatchEncoder",
    "FileChunker",
    "PipelineReport",
    "PipelineSettings",
    "RunProgress",
    "Storage",
    "VectorInfo",
    "VectorParts",
    "embedding_vectors",
    "fill_chroma",
    "fill_index",
    "read_progress",
    "records",
    "row_metadata",
    "run_pipeline",
]

_NAMES = {
    "chunks": ("FileChunker",),
    "datasink": ("ChromaDatasink",),
    "encoder": ("EpicBatchEncoder",),
    "engine": ("Cluster",),
    "job": ("PipelineReport", "PipelineSettings", "RunProgress", "read_progress", "run_pipeline"),
    "parts": ("VectorInfo", "VectorParts", "embedding_vectors", "row_metadata"),
    "storage": ("Storage",),
    "stores": ("fill_chroma", "fill_index", "records"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs_extra("ray", name):
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
