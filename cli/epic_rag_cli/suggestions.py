"""Pairs of headings and sections of an index, proposed as demonstrations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epic_rag_chroma import IndexedPassage

__all__ = ["SuggestedPair", "suggest_pairs"]

_WORD = re.compile(r"\w+")
_LEAST_WORDS = 12
_MOST_QUERY_WORDS = 16


@dataclass(frozen=True)
class SuggestedPair:
    """A heading as query, and the section below it.

    Args:
        query: The heading, with the one above it where it says little by itself.
        passage: The section's first chunk without its headings.
        chunk: The chunk's id.
    """

    query: str
    passage: str
    chunk: str


def suggest_pairs(passages: Sequence[IndexedPassage], count: int) -> list[SuggestedPair]:
    """Choose pairs of headings and sections, of as many files as possible.

    A heading is taken once, with its first chunk. Headings that occur in several places ("Examples") are left out, and
    so are short sections and those that are nothing but their heading.

    Args:
        passages: The chunks of an index.
        count: Most pairs.
    """
    sections = {(each.path, each.heading_path) for each in passages if each.heading_path}
    places = Counter(headings[-1].casefold() for _, headings in sections)
    by_file: dict[str, list[SuggestedPair]] = {}
    seen: set[str] = set()
    for each in passages:
        if not each.heading_path or each.kind == "code":
            continue
        heading = each.heading_path[-1]
        words = _WORD.findall(heading)
        if len(words) == 1 and len(each.heading_path) > 1:
            heading = f"{each.heading_path[-2]}: {heading}"
            words = _WORD.findall(heading)
        if places[each.heading_path[-1].casefold()] > 1 or heading.casefold() in seen:
            continue
        passage = _without_headings(each.text, each.heading_path)
        if not 2 <= len(words) <= _MOST_QUERY_WORDS or len(_WORD.findall(passage)) < _LEAST_WORDS:
            continue
        seen.add(heading.casefold())
        by_file.setdefault(each.path, []).append(SuggestedPair(heading, passage, each.id))
    # One pair of each file in turn.
    chosen = [pair for pairs in zip_longest(*by_file.values()) for pair in pairs if pair is not None]
    return chosen[:count]


def _without_headings(text: str, headings: Sequence[str]) -> str:
    """Return a chunk's text without the lines at its beginning that hold its headings."""
    lines = text.splitlines()
    known = [[], *(_WORD.findall(heading.casefold()) for heading in headings)]
    while lines and _WORD.findall(lines[0].casefold()) in known:
        lines.pop(0)
    return "\n".join(lines).strip()
