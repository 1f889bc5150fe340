"""Check that an index fits the model and the settings that are requested.

Each message states both sides and the command that changes the index. Queries use these checks as well as the indexer,
so this module imports nothing that reads files.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag.errors import ConfigError
from epic_rag_chroma.errors import IndexMismatchError
from epic_rag_chroma.store.paths import root_path
from epic_rag_chroma.store.state import IndexState
from epic_rag_chroma.types import INDEX_FOLDER, IndexSettings

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = ["check_model", "check_settings", "chunk_sizes"]

# [CLS] and [SEP], or EOS.
_SPECIAL_TOKENS = 2
# Tokens of a chunk of whole lines, with the default size and a model that reads so many.
_DEFAULT_WINDOW = 254


def check_model(index_dir: Path, state: IndexState, encoder: EpicEncoder, paths: Sequence[Path]) -> None:
    """Check that the index has the vectors of a model.

    Raises:
        IndexMismatchError: If the fingerprints differ.
    """
    if state.fingerprint != encoder.fingerprint:
        from epic_rag.checkpoints import DEFAULT_CHECKPOINT  # imports torch

        # Without --model, the command would rebuild with the default model.
        model = "" if encoder.source == DEFAULT_CHECKPOINT else f" --model {shlex.quote(encoder.source)}"
        raise IndexMismatchError(
            f"The index was built with {state.model} ({state.fingerprint}), not with {encoder.name} "
            f"({encoder.fingerprint}). Run `epic-rag index --rebuild {_arguments(index_dir, state, paths)}{model}`."
        )


def check_settings(index_dir: Path, state: IndexState, settings: IndexSettings | None, paths: Sequence[Path]) -> None:
    """Check that the index has the requested chunk sizes.

    Raises:
        IndexMismatchError: If they differ.
    """
    if settings is None:
        return
    old, new = (
        f"{each.chunk_tokens} tokens with an overlap of {each.chunk_overlap}" for each in (state.settings, settings)
    )
    if old != new:
        raise IndexMismatchError(
            f"The index was built with chunks of {old}, not of {new}. "
            f"Run `epic-rag index --rebuild {_arguments(index_dir, state, paths)}`."
        )


def _arguments(index_dir: Path, state: IndexState, paths: Sequence[Path]) -> str:
    """Format the paths of an index for a command line, with --index-dir unless it is the default of the first path."""

    def near(path: Path) -> str:
        try:
            relative = os.path.relpath(path)
        except ValueError:  # another drive
            return str(path)
        return str(path) if relative.startswith("..") else relative if relative == "." else os.path.join(".", relative)

    shown = list(paths) or [root_path(root, index_dir) for root in state.roots]
    if not shown:
        return f"PATH --index-dir {shlex.quote(near(index_dir))}"
    words = [shlex.quote(near(path)) for path in shown]
    first = shown[0] if shown[0].is_dir() else shown[0].parent
    if (first / INDEX_FOLDER).resolve() != index_dir.resolve():
        words.append(f"--index-dir {shlex.quote(near(index_dir))}")
    return " ".join(words)


def chunk_sizes(settings: IndexSettings, encoder: EpicEncoder) -> tuple[int, int, int]:
    """Return chunk size, overlap and window for a model.

    The default size is reduced to the model's limit, any other must fit. With the default size, chunks of whole lines
    are larger, as far as the model reads them.

    Raises:
        ConfigError: If it does not fit.
    """
    limit = encoder.max_document_tokens - _SPECIAL_TOKENS
    tokens, window = settings.chunk_tokens, settings.chunk_tokens
    if tokens == IndexSettings().chunk_tokens:
        tokens = max(1, min(tokens, limit))
        window = max(tokens, min(limit, _DEFAULT_WINDOW))
    elif tokens > limit:
        raise ConfigError(
            f"Chunks of {tokens} tokens exceed the {limit} tokens that {encoder.name} reads of a document. "
            f"Run `epic-rag index --chunk-tokens {limit}`."
        )
    return tokens, min(settings.chunk_overlap, tokens // 2), window
