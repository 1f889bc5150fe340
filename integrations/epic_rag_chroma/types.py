"""What the indexer takes and gives: plain frozen dataclasses, free of any import that costs time."""

from __future__ import annotations

from dataclasses import dataclass

from epic_rag.errors import ConfigError

__all__ = ["Hit", "IndexProgress", "IndexReport", "IndexSettings", "IndexStatus", "SkippedFile"]


@dataclass(frozen=True)
class IndexSettings:
    """What goes into an index, and in which pieces.

    Args:
        chunk_tokens: The most tokens of a chunk, by the encoder's own tokenizer, heading path included. The default
            shrinks to what the model reads of a document.
        chunk_overlap: The most tokens that a chunk repeats of the one before it.
        include: Patterns in .gitignore's syntax; when there are any, only files that match one are indexed.
        exclude: Patterns in .gitignore's syntax of files and folders to leave out.

    Raises:
        ConfigError: If the numbers cannot work.
    """

    chunk_tokens: int = 200
    chunk_overlap: int = 20
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}; it must be at least 1")
        if not 0 <= self.chunk_overlap < self.chunk_tokens:
            raise ConfigError(
                f"chunk_overlap is {self.chunk_overlap} and chunk_tokens {self.chunk_tokens}; "
                "the overlap must be at least 0 and smaller than the chunk"
            )


@dataclass(frozen=True)
class SkippedFile:
    """A file (or folder) that was found and not indexed, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class IndexReport:
    """What a run of the indexer did; `added` to `unchanged` count files."""

    added: int
    changed: int
    deleted: int
    unchanged: int
    skipped: tuple[SkippedFile, ...]
    chunks_embedded: int
    chunks_total: int
    seconds: float


@dataclass(frozen=True)
class IndexProgress:
    """How far a run is: `done` of `total` files in `stage` ("scanning", "indexing", "deleting")."""

    stage: str
    done: int
    total: int
    path: str | None


@dataclass(frozen=True)
class Hit:
    """A chunk that a query found.

    Args:
        rank: 1 for the best.
        score: Cosine of query and chunk.
        path: The file, relative to the folder that was indexed.
        first_line: First line of the text in the file, from 1; None for a PDF.
        last_line: Last line, inclusive; None for a PDF.
        page: Page of a PDF, from 1; None for everything else.
        heading_path: Headings above the text, outermost first.
        text: The exact text of those lines.
        id: The chunk's id in the collection.
        root: Absolute path of the folder that was indexed, where it is now: `root` + `path` is the file.
    """

    rank: int
    score: float
    path: str
    first_line: int | None
    last_line: int | None
    page: int | None
    heading_path: tuple[str, ...]
    text: str
    id: str
    root: str = ""


@dataclass(frozen=True)
class IndexStatus:
    """What an index holds; `roots` are absolute paths."""

    index_dir: str
    roots: tuple[str, ...]
    model: str
    fingerprint: str
    dimension: int
    files: int
    chunks: int
    size_bytes: int
    updated_at: str | None
    settings: IndexSettings
