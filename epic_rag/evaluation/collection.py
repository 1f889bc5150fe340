"""Held-out files in one collection, and with other instructions than their own.

In a file's own corpus all documents are of the kind that its queries want, so an encoder need not know what is
wanted. A person's index holds many kinds side by side. `pooled` is such an index: one corpus of all files'
documents, in which each file's queries look for theirs. `pooled-with-queries` holds the queries of other rows,
too, as a collection holds questions and headings beside answers; what is most like a query there is not what
answers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from epic_rag.errors import ConfigError
from epic_rag.evaluation.heldout import Collection, HeldoutSplit, InstructionSource, passage_key, rows_of_queries
from epic_rag.evaluation.prompts import normalised

__all__ = ["in_collection", "with_instruction"]


def in_collection(splits: Sequence[HeldoutSplit], collection: Collection) -> list[HeldoutSplit]:
    """Put the documents of some files into one corpus, or leave each file its own.

    Equal documents (but for spacing) are one document, and relevant to every query that it answers by any
    file. A text that is a test query of any file is never put in as another row's query.

    Args:
        splits: The files, each with its own corpus.
        collection: What the queries are ranked in.

    Returns:
        The same tests, in order, over the collection.

    Raises:
        ConfigError: A file is symmetric: its documents are encoded with its instruction, others bare.
    """
    if collection == "own":
        return list(splits)
    symmetric = [split.name for split in splits if split.symmetric]
    if symmetric:
        raise ConfigError(
            f"the documents of {', '.join(symmetric)} are encoded like queries, those of a {collection} collection "
            "bare; leave the file out, or use --heldout-collection own for it"
        )
    rows: dict[str, int] = {}
    texts: list[str] = []
    for text in (text for split in splits for text in split.documents):
        if passage_key(text) not in rows:
            rows[passage_key(text)] = len(texts)
            texts.append(text)
    parts = [split.documents for split in splits]
    if collection == "pooled-with-queries":
        taken = {normalised(text) for text in texts}
        taken.update(normalised(query) for split in splits for query in split.queries)
        for split in splits:
            added = [query for query in split.other_queries if normalised(query) not in taken]
            taken.update(normalised(query) for query in added)
            texts += added
            parts.append(tuple(added))
    documents = tuple(texts)
    return [_over(split, documents, rows, tuple(parts), collection) for split in splits]


def _over(
    split: HeldoutSplit,
    documents: tuple[str, ...],
    rows: dict[str, int],
    parts: tuple[tuple[str, ...], ...],
    collection: Collection,
) -> HeldoutSplit:
    """One file's test over a pooled corpus; `rows` has the row of each passage key."""
    place = [rows[passage_key(text)] for text in split.documents]
    excluded = rows_of_queries(split.queries, documents)
    relevant = tuple(
        tuple(sorted({place[row] for row in found} - {*skip}))
        for found, skip in zip(split.relevant, excluded, strict=True)
    )
    return replace(split, documents=documents, relevant=relevant, excluded=excluded, parts=parts, collection=collection)


def with_instruction(split: HeldoutSplit, source: InstructionSource, *, default: str | None) -> HeldoutSplit:
    """Return the same test with the file's own instruction, a checkpoint's default, or none.

    Args:
        split: The test.
        source: Which one.
        default: The checkpoint's default instruction; None for one that has none, whose queries then go
            without.
    """
    if source == "own":
        return split
    return replace(split, instruction=(default or "") if source == "default" else "", instruction_source=source)
