"""Search request: the prompt of a query, and what is searched for in which way."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from epic_rag.errors import ConfigError
from epic_rag.query_prompt import PromptSettings, QueryPrompt
from epic_rag_chroma.search.reranking import Reranker
from epic_rag_chroma.types import DEFAULT_MODE, DEFAULT_PER_FILE, SEARCH_MODES, SearchFilters, SearchMode

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SearchRequest", "SearchSettings"]


class SearchSettings(PromptSettings, total=False):
    """The fields of `SearchRequest` and of its prompt as keyword arguments."""

    prompt: QueryPrompt
    k: int
    mode: SearchMode
    filters: SearchFilters | None
    collapse: bool
    merge: bool
    per_file: int | None
    min_score: float | None
    before: int
    after: int
    full_section: bool
    reranker: str | os.PathLike[str] | Reranker | None


@dataclass(frozen=True)
class SearchRequest:
    """Settings of a search.

    Args:
        prompt: Instruction and demonstrations for the query. Keyword mode does not use them.
        k: Maximum number of hits.
        mode: "dense" ranks by cosine, "keyword" by BM25 and without a model, "hybrid" fuses both rankings.
        filters: Conditions on hits; see `parse_filters`.
        collapse: Fold near-duplicates into the best of them, so that the k hits differ. False also turns `merge` off:
            each chunk is a hit, in the order of the ranking.
        merge: Join chunks of a section that overlap or follow one another into one hit.
        per_file: How many hits of a file come before its others, which fill the places that no other file takes; 0 for
            no limit. None is 3, and no limit without `collapse`. A line of JSON lines, a row of CSV, and an entry of a
            mailbox or a bibliography count as files.
        min_score: The lowest score of a hit: the reranker's, or else the cosine, or else BM25; None for any.
        before: How many lines before the text of a hit `Hit.before` has.
        after: How many lines after it `Hit.after` has.
        full_section: Make each hit the whole section of the chunk that was found.
        reranker: A cross-encoder (folder, or name on the hub), or a function from a query and texts to their scores.
            It orders the best hits.

    Raises:
        ConfigError: If `k` is less than 1, another number is negative, `min_score` is not a number, or the mode is
            unknown.
    """

    prompt: QueryPrompt = field(default_factory=QueryPrompt)
    k: int = 5
    mode: SearchMode = DEFAULT_MODE
    filters: SearchFilters | None = None
    collapse: bool = True
    merge: bool = True
    per_file: int | None = None
    min_score: float | None = None
    before: int = 0
    after: int = 0
    full_section: bool = False
    reranker: str | os.PathLike[str] | Reranker | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k is {self.k}. Use 1 or more.")
        for name in ("per_file", "before", "after"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}. Use 0 or more.")
        if self.min_score is not None and math.isnan(self.min_score):
            raise ConfigError("min_score is not a number. Leave it out for hits of any score.")
        if self.mode not in SEARCH_MODES:
            raise ConfigError(f"Unknown mode {self.mode!r}. Choose one of {', '.join(SEARCH_MODES)}.")

    @property
    def file_limit(self) -> int:
        """The number of hits of a file that come before its others; 0 for no limit."""
        if self.per_file is not None:
            return self.per_file
        return DEFAULT_PER_FILE if self.collapse else 0

    @classmethod
    def of(cls, request: SearchRequest | None, settings: SearchSettings) -> SearchRequest:
        """Return `request`, or one made of keyword settings.

        Raises:
            ConfigError: If both are given, or a setting is unknown.
        """
        if request is None:
            return cls().with_settings(**settings)
        if settings:
            raise ConfigError(f"Both a request and {', '.join(settings)} are given. Put them into the request.")
        return request

    def with_settings(self, **settings: Unpack[SearchSettings]) -> SearchRequest:
        """Return a copy with other settings; those of the prompt (`task`, `bank`, ...) change its prompt.

        Raises:
            ConfigError: If a setting is unknown, or both `prompt` and settings of a prompt are given.
            PromptError: If the prompt's settings do not fit together.
        """
        known = SearchSettings.__annotations__
        unknown = ", ".join(sorted(set(settings) - set(known)))
        if unknown:
            raise ConfigError(f"Unknown setting {unknown}. Known are {', '.join(known)}.")
        changes: dict[str, Any] = dict(settings)
        of_prompt = {name: changes.pop(name) for name in PromptSettings.__annotations__ if name in changes}
        if of_prompt and "prompt" in changes:
            raise ConfigError(f"Both a prompt and {', '.join(of_prompt)} are given. Put them into the prompt.")
        if of_prompt:
            changes["prompt"] = replace(self.prompt, **of_prompt)
        return replace(self, **changes)
