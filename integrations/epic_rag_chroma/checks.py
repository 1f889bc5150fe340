"""Whether an index, a model and settings go together; every message says both sides and what to run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import ConfigError, IndexMismatchError
from epic_rag_chroma import roots
from epic_rag_chroma.known_servers import require_known
from epic_rag_chroma.manifest import CHUNKER_VERSION, IndexState
from epic_rag_chroma.server import IN_FOLDER, ChromaServer
from epic_rag_chroma.types import IndexSettings

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = ["check_model", "check_place", "check_settings", "effective_sizes"]

# Where an index lies when nobody says where.
INDEX_FOLDER = ".epic-rag"

# [CLS] and [SEP], or EOS: what a model puts around a document.
_SPECIAL_TOKENS = 2


def check_model(index_dir: Path, state: IndexState, encoder: EpicEncoder, paths: Sequence[Path]) -> None:
    """Refuse vectors of another model.

    Raises:
        IndexMismatchError: If the fingerprints differ.
    """
    if state.fingerprint != encoder.fingerprint:
        # Without it, the command would rebuild with the default model.
        model = "" if encoder.source == DEFAULT_CHECKPOINT else f" --model {shlex.quote(encoder.source)}"
        raise IndexMismatchError(
            f"index was built with {state.model} ({state.fingerprint}), you asked for {encoder.name} "
            f"({encoder.fingerprint}); run `epic-rag index --rebuild {_shown(index_dir, state, paths)}{model}`"
        )


def check_settings(index_dir: Path, state: IndexState, settings: IndexSettings | None, paths: Sequence[Path]) -> None:
    """Refuse other chunks than the index has.

    Raises:
        IndexMismatchError: If sizes or version differ.
    """
    again = f"run `epic-rag index --rebuild {_shown(index_dir, state, paths)}`"
    if state.chunker_version != CHUNKER_VERSION:
        raise IndexMismatchError(
            f"index was built with version {state.chunker_version} of the chunks, this is version "
            f"{CHUNKER_VERSION}; {again}"
        )
    if settings is None:
        return
    had = (state.settings.chunk_tokens, state.settings.chunk_overlap)
    asked = (settings.chunk_tokens, settings.chunk_overlap)
    if had != asked:
        raise IndexMismatchError(
            f"index was built with chunks of {had[0]} tokens, {had[1]} shared, you asked for {asked[0]}, "
            f"{asked[1]} shared; {again}"
        )


def check_place(
    index_dir: Path, state: IndexState, asked: ChromaServer | str | None, paths: Sequence[Path] = ()
) -> None:
    """Refuse to look for the vectors where they are not, or where the user would not; `asked` is `asked_server`'s.

    Raises:
        IndexMismatchError: If the index has them elsewhere.
        IndexStateError: If only the index folder has ever named its server.
    """
    if asked is None or asked == (IN_FOLDER if state.chroma is None else state.chroma.server):
        if state.chroma is not None:
            require_known(index_dir, state.chroma.server, is_named=asked is not None)
        return
    kept = "in its folder" if state.chroma is None else f"on {state.chroma}"
    wanted = f"on {asked}" if isinstance(asked, ChromaServer) else "in its folder"
    option = asked.url if isinstance(asked, ChromaServer) else IN_FOLDER
    raise IndexMismatchError(
        f"the index in {index_dir} has its vectors {kept}, you asked for an index {wanted}; leave out --chroma to use "
        f"it where it is, or run `epic-rag index --rebuild --chroma {shlex.quote(option)} "
        f"{_shown(index_dir, state, paths)}`"
    )


def _shown(index_dir: Path, state: IndexState, paths: Sequence[Path]) -> str:
    """Paths, and the index folder where it is not the first path's own, as a person here would write them."""
    wanted = list(paths) or [Path(roots.where(root, index_dir)) for root in state.roots]
    if not wanted:
        return f"PATH --index-dir {shlex.quote(_near(index_dir))}"
    words = [shlex.quote(_near(path)) for path in wanted]
    first = wanted[0] if wanted[0].is_dir() else wanted[0].parent
    if (first / INDEX_FOLDER).resolve() != index_dir.resolve():
        words.append(f"--index-dir {shlex.quote(_near(index_dir))}")
    return " ".join(words)


def _near(path: Path) -> str:
    try:
        near = os.path.relpath(path)
    except ValueError:  # another drive
        return str(path)
    return str(path) if near.startswith("..") else near if near == "." else os.path.join(".", near)


def effective_sizes(settings: IndexSettings, encoder: EpicEncoder) -> tuple[int, int]:
    """Chunk size and overlap for a model: the default size shrinks to what it reads, a chosen one must fit.

    Raises:
        ConfigError: If it does not.
    """
    limit = encoder.max_document_tokens - _SPECIAL_TOKENS
    tokens = settings.chunk_tokens
    if tokens > limit:
        if tokens != IndexSettings().chunk_tokens:
            raise ConfigError(
                f"chunks of {tokens} tokens are more than the {limit} that {encoder.name} reads of a document; "
                f"run `epic-rag index --chunk-tokens {limit}`"
            )
        tokens = max(1, limit)
    return tokens, min(settings.chunk_overlap, tokens // 2)
