"""Settings, reports and hits of the indexer: frozen dataclasses without slow imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from epic_rag.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from epic_rag_chroma.search.conditions import Condition

__all__ = [
    "DEFAULT_MODE",
    "DEFAULT_PER_FILE",
    "INDEX_FOLDER",
    "SEARCH_MODES",
    "Hit",
    "IndexPlan",
    "IndexProgress",
    "IndexReport",
    "IndexSettings",
    "IndexStatus",
    "IndexedPassage",
    "LanguageMismatch",
    "Mark",
    "ModelInfo",
    "RunState",
    "SearchFilters",
    "SearchMode",
    "SkippedFile",
    "StaleState",
    "WriteCounts",
]

# Default name of the index folder, inside the first indexed path.
INDEX_FOLDER = ".epic-rag"
RunState = Literal["complete", "running", "interrupted"]
SearchMode = Literal["dense", "hybrid", "keyword"]
StaleState = Literal["changed", "deleted"]
"""A file with another size or modification time than when it was indexed, or one that is gone."""
Mark = Literal["right", "wrong"]
"""Mark of a hit by a bank's examples: it answers the query, or it does not."""
SEARCH_MODES: Sequence[SearchMode] = ("dense", "hybrid", "keyword")
DEFAULT_MODE: SearchMode = "hybrid"
DEFAULT_PER_FILE = 3
"""Hits of a file that come before its others: of five hits, two are left for other files."""


@dataclass(frozen=True)
class IndexSettings:
    """Settings of an index: files and chunk sizes.

    Args:
        chunk_tokens: Maximum number of tokens of a chunk by the encoder's tokenizer, heading path included. With the
            default, chunks of whole lines have up to 254; both are reduced to the model's maximum length.
        chunk_overlap: Maximum number of tokens that a chunk repeats of the previous one.
        include: Patterns in .gitignore's syntax; if there are any, only files that match one are indexed.
        exclude: Patterns in .gitignore's syntax of files and folders to leave out.
        follow_links: Whether to follow symbolic links that leave the indexed folder.

    Raises:
        ConfigError: If the sizes are invalid.
    """

    chunk_tokens: int = 200
    chunk_overlap: int = 20
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    follow_links: bool = False

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}. Use 1 or more.")
        if not 0 <= self.chunk_overlap < self.chunk_tokens:
            raise ConfigError(
                f"chunk_overlap is {self.chunk_overlap} and chunk_tokens {self.chunk_tokens}. "
                "Use an overlap of at least 0 that is smaller than the chunk."
            )


@dataclass(frozen=True)
class SkippedFile:
    """A file or folder that was found but not indexed, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class LanguageMismatch:
    """Most of an index is in a language that its model was not trained on.

    Args:
        language: ISO 639-1 code of the language.
        share: Share of the chunks that are in it, by a sample.
        model_languages: Codes of the languages that the model was trained on.
    """

    language: str
    share: float
    model_languages: tuple[str, ...]


@dataclass(frozen=True)
class IndexReport:
    """Result of a run of the indexer.

    Args:
        added: Number of new files.
        changed: Number of files with changed content.
        deleted: Number of deleted files.
        unchanged: Number of unchanged files.
        skipped: Files that were found but not indexed.
        chunks_embedded: Number of chunks that were embedded.
        chunks_total: Number of chunks in the index.
        seconds: Duration.
        renamed: Number of files with the content of a deleted file; counted neither as added nor as deleted.
        chunks_reused: Number of chunks of new, changed and renamed files that already had vectors.
        language_mismatch: Language of most of the index if the model was not trained on it; None too if its languages
            are unknown, and after a run that embedded nothing.
    """

    added: int
    changed: int
    deleted: int
    unchanged: int
    skipped: tuple[SkippedFile, ...]
    chunks_embedded: int
    chunks_total: int
    seconds: float
    renamed: int = 0
    chunks_reused: int = 0
    language_mismatch: LanguageMismatch | None = None


@dataclass(frozen=True)
class IndexPlan:
    """Dry run of the indexer: paths, each relative to its root. Nothing is written.

    Args:
        added: Files that are not in the index.
        changed: Files with other content than in the index.
        deleted: Files that would leave the index.
        renamed: (old, new) for a deleted file and a new one with its content.
        unchanged: Number of unchanged files.
        skipped: Files that would not be indexed.
    """

    added: tuple[str, ...]
    changed: tuple[str, ...]
    deleted: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    unchanged: int
    skipped: tuple[SkippedFile, ...]


@dataclass(frozen=True)
class SearchFilters:
    """Conditions on chunks; all must hold.

    Args:
        where: Conditions on metadata such as "lang=python", "kind!=pdf", "page>=3"; operators =, !=, <, <=, >, >=.
        paths: Patterns in .gitignore's syntax on the file's path; one of them must match.
        since: Files modified at that time or later; with a time zone.
        condition: Comparisons joined by and, or and not, for conditions that `where` cannot express.
    """

    where: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    since: datetime | None = None
    condition: Condition | None = None

    def __bool__(self) -> bool:
        return bool(self.where or self.paths or self.since or self.condition)


@dataclass(frozen=True)
class IndexProgress:
    """Progress of a run: `done` of `total` files in `stage` ("scanning", "indexing", "deleting")."""

    stage: str
    done: int
    total: int
    path: str | None


@dataclass(frozen=True)
class Hit:
    """A chunk found by a query, or several that follow one another in a section: scores are those of the best.

    Args:
        rank: 1 for the best.
        score: The score that hits are ordered by: the reranker's if there is one; else the cosine in dense mode, BM25
            in keyword mode, both scaled and weighted, from 0 to 1, in hybrid mode.
        path: The file, relative to the folder that was indexed.
        first_line: First line of the text in the file, from 1; None for formats without lines (PDF, Office, EPUB).
        last_line: Last line, inclusive; None if `first_line` is None.
        page: Page of a PDF or slide of a presentation, from 1; None for other formats.
        heading_path: Headings above the text, outermost first.
        text: The exact text of those lines.
        id: The id of the chunk, or of the best one, in the collection.
        document_id: The id of its file in the index.
        root: Current absolute path of the indexed folder; `root`/`path` is the file.
        kind: The file's format ("markdown", "pdf", "code", ...).
        lang: The programming language of source code ("python", ...); "" for other formats.
        cosine: Cosine of query and chunk; None in keyword mode.
        bm25: BM25 score; None if the chunk contains no term of the query, and in dense mode.
        rerank_score: Score of the reranker; None without one.
        duplicates: Locations ("path:line") of near-duplicates, which the results leave out.
        stale: "changed" or "deleted" if the file is no longer what was indexed, by its size and modification time;
            None if it is.
        before: The lines before `text` that the request asks for, as they were indexed.
        after: The lines after it.
        marked: "right" or "wrong" if an example of the bank has this query and says that this passage answers it, or
            does not; such hits are first and last whatever their score.
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
    document_id: str = ""
    root: str = ""
    kind: str = ""
    lang: str = ""
    cosine: float | None = None
    bm25: float | None = None
    rerank_score: float | None = None
    duplicates: tuple[str, ...] = field(default=())
    stale: StaleState | None = None
    before: str = ""
    after: str = ""
    marked: Mark | None = None


@dataclass(frozen=True)
class IndexStatus:
    """Contents and state of an index; `roots` are absolute paths.

    `chroma` is the address of the Chroma server that has a copy of the index, None for the index folder, "none" for an
    index without a copy; `collection` is the name of the copy's collection. `last_run` has the counts of the last
    complete run of the indexer (IndexReport's numbers by name), None before there was one. `state` is "running" during
    a run and "interrupted" after one that did not finish: what it stored is used, and the next run completes it.
    `kinds` counts the files of each format. `parts` is the folder or address of the Parquet files that the index is
    filled from, None for an index of folders.
    """

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
    chroma: str | None = None
    last_run: dict[str, float] | None = None
    state: RunState = "complete"
    kinds: dict[str, int] = field(default_factory=dict)
    collection: str = ""
    parts: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """The encoder that made vectors.

    Args:
        fingerprint: Its fingerprint; vectors of different ones cannot be compared.
        model: Its display name.
        source: Name or folder that it is loaded from; "" if unknown.
        dimension: Length of a vector.
        truncate_dim: The dimension that vectors are truncated to; None for all of them.
    """

    fingerprint: str
    model: str
    source: str
    dimension: int
    truncate_dim: int | None = None


@dataclass(frozen=True)
class WriteCounts:
    """Result of writing rows that were embedded elsewhere; `+` adds.

    Args:
        written: Rows that are new.
        changed: Rows that were there with other text, metadata or vector.
        unchanged: Rows that were there as they are.
        deleted: Rows that are gone.
        left_out: Rows of shards in doubt, which a later run writes.
    """

    written: int = 0
    changed: int = 0
    unchanged: int = 0
    deleted: int = 0
    left_out: int = 0

    def __add__(self, other: WriteCounts) -> WriteCounts:
        return WriteCounts(
            self.written + other.written,
            self.changed + other.changed,
            self.unchanged + other.unchanged,
            self.deleted + other.deleted,
            self.left_out + other.left_out,
        )


@dataclass(frozen=True)
class IndexedPassage:
    """A chunk of an index with its vector; fields as in `Hit`.

    Args:
        vector: (dim,) float32 unit vector of the text with the headings above it.
    """

    id: str
    path: str
    first_line: int | None
    last_line: int | None
    heading_path: tuple[str, ...]
    text: str
    kind: str
    vector: npt.NDArray[np.float32]
