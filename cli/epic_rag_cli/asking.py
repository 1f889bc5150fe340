"""What is asked of an index, the same for one query, a batch and an interactive session."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epic_rag.errors import BankError
from epic_rag_cli.defaults import DEFAULT_HITS, DEFAULT_TASK, ShownBy
from epic_rag_cli.hits import hit_lines
from epic_rag_cli.output import emit, hyperlinks, message

if TYPE_CHECKING:
    from epic_rag_chroma import ChromaIndexer, Hit, SearchMode

__all__ = ["Asked", "Asker"]


@dataclass(frozen=True)
class Asked:
    """How queries are answered: the options of `epic-rag query`, with the meaning that they have there."""

    k: int = DEFAULT_HITS
    task: str | None = None
    bank: str | None = None
    num_demonstrations: int | None = None
    strategy: ShownBy | None = None
    mode: SearchMode | None = None
    where: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    since: str | None = None
    show_all: bool = False
    rerank: str | None = None

    def __post_init__(self) -> None:
        if self.bank is not None and os.path.isfile(self.bank):
            raise BankError(
                f"{self.bank} is a file, a bank is a folder; run `epic-rag bank build {self.bank} --out FOLDER "
                f"--task {self.task or DEFAULT_TASK}` and give --bank that folder"
            )

    @property
    def by(self) -> SearchMode:
        """The mode that counts."""
        from epic_rag_chroma import DEFAULT_MODE

        return self.mode or DEFAULT_MODE

    @property
    def instructed_by(self) -> str | None:
        """The task that counts: a bank brings its own instruction."""
        return DEFAULT_TASK if self.task is None and self.bank is None else self.task

    @property
    def is_filtered(self) -> bool:
        """Whether some passages cannot be found."""
        return bool(self.where or self.paths or self.since)

    def arguments(self) -> dict[str, Any]:
        """Return what the indexer is given besides the query.

        Raises:
            ConfigError: A filter cannot be understood.
        """
        filters = None
        if self.is_filtered:
            from epic_rag_chroma.filters import parse_filters

            filters = parse_filters(self.where, self.paths, self.since)
        return {
            "k": self.k,
            "task": self.instructed_by,
            "bank": self.bank,
            "num_demonstrations": self.num_demonstrations,
            "strategy": self.strategy,
            "mode": self.mode,
            "filters": filters,
            "collapse": not self.show_all,
            "reranker": self.rerank,
        }


class Asker:
    """Asks one index and shows what it answers.

    Args:
        indexer: The index.
        folder: Its folder, as the user wrote it.
    """

    def __init__(self, indexer: ChromaIndexer, folder: Path) -> None:
        self._indexer = indexer
        self._folder = folder

    def one(self, text: str, asked: Asked) -> list[Hit]:
        """Return the hits of one query."""
        return self._indexer.query(_encodable(text), **asked.arguments())

    def many(self, texts: Sequence[str], asked: Asked) -> list[list[Hit]]:
        """Return the hits of each query."""
        return self._indexer.query_many([_encodable(text) for text in texts], **asked.arguments())

    def show(self, hits: Sequence[Hit], text: str, asked: Asked) -> None:
        """Print hits for people; nothing on stdout if there are none."""
        if hits:
            emit(hit_lines(hits, text, asked.by, links=hyperlinks()))
        else:
            self.tell_nothing(asked)

    def tell_nothing(self, asked: Asked) -> None:
        """Say why there may be no hits."""
        if asked.is_filtered:
            message("note", "no passage satisfies all of --where, --path and --since; leave one out, or ask less of it")
        elif asked.by == "keyword":
            message("note", "no passage has a word of the query; ask in other words, or with --mode hybrid")
        else:
            message("note", f"{self._folder} holds no passages; run `epic-rag index PATH` to add some")

    def answer(self, hits: Sequence[Hit], text: str, asked: Asked) -> dict[str, Any]:
        """Return the answer to one query as JSON has it."""
        return {
            "query": text,
            "index_dir": str(self._folder),
            "task": asked.instructed_by,
            "bank": asked.bank,
            "mode": asked.by,
            "hits": [dataclasses.asdict(hit) for hit in hits],
        }


def _encodable(text: str) -> str:
    """Replace lone surrogates (bytes on the command line that are no text), which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
