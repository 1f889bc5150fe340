"""Filters on chunks: by metadata, by path and by the age of the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

from epic_rag.errors import ConfigError
from epic_rag_chroma.search.conditions import KNOWN_KEYS, NUMERIC_KEYS, Comparison, Condition, Operator, fields_of
from epic_rag_chroma.store.paths import DocumentKey, root_path
from epic_rag_chroma.store.state import FileEntry
from epic_rag_chroma.types import SearchFilters
from epic_rag_chroma.walk.ignore import IgnorePatterns, PatternError, compile_patterns

__all__ = ["Filter", "parse_filters", "parse_where"]

_WHERE = re.compile(r"\s*([\w.-]+)\s*(==|!=|>=|<=|=|>|<)\s*(.*?)\s*", re.DOTALL)
_OPERATORS: Mapping[str, Operator] = {"=": "==", "==": "==", "!=": "!=", ">": ">", ">=": ">=", "<": "<", "<=": "<="}
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([mhdw])", re.IGNORECASE)
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_CACHED_PATHS = 100_000


def parse_filters(where: Sequence[str], paths: Sequence[str], since: str | None) -> SearchFilters:
    """Parse filters as given on a command line.

    Args:
        where: Conditions: "lang=python", "kind!=pdf", "page>=3".
        paths: Patterns in .gitignore's syntax.
        since: An age ("30m", "12h", "7d", "2w") or a date, with or without a time and a time zone (ISO 8601); a time
            without a zone is local.

    Raises:
        ConfigError: If a filter is invalid.
    """
    filters = SearchFilters(tuple(where), tuple(paths), None if since is None else _moment(since))
    for condition in filters.where:
        parse_where(condition)
    _patterns(filters.paths)
    return filters


def parse_where(text: str) -> Comparison:
    """Parse a condition such as "lang=python".

    Raises:
        ConfigError: If it is not a condition, or its key is unknown.
    """
    found = _WHERE.fullmatch(text)
    if found is None:
        raise ConfigError(f'"{text}" is not a condition. Write one like "lang=python", "kind!=pdf" or "page>=3".')
    key, operator, value = found.groups()
    if key not in NUMERIC_KEYS:
        return Comparison(key, _OPERATORS[operator], value)
    try:
        number: int | float = int(value) if value.lstrip("+-").isdigit() else float(value)
    except ValueError:
        raise ConfigError(f'{key} is a number, "{value}" is not. Write a condition like "{key}>=3".') from None
    return Comparison(key, _OPERATORS[operator], number)


def _moment(text: str) -> datetime:
    text = text.strip()
    age = _AGE.fullmatch(text)
    try:
        if age is not None:
            return datetime.now(timezone.utc) - timedelta(**{_UNITS[age[2].lower()]: float(age[1])})
        # Python 3.10 does not parse the usual Z.
        return datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text)).astimezone()
    except (ValueError, OverflowError, OSError):
        raise ConfigError(
            f'"{text}" is not a time. Write an age such as 30m, 12h, 7d or 2w, or a date such as 2026-01-31.'
        ) from None


def _patterns(paths: Sequence[str]) -> IgnorePatterns:
    try:
        return compile_patterns(paths, "--path")
    except PatternError as error:
        raise ConfigError(f'"{error}" is not a path pattern. Write one like "guide/**" or "*.md".') from None


class Filter:
    """Predicate on a chunk's metadata.

    Args:
        filters: The filters; all must hold.
        index_dir: The index folder.

    Attributes:
        front_matter_keys: The keys of its conditions that are of the files' front matter.

    Raises:
        ConfigError: If a condition or a pattern is invalid, or `since` has no time zone.
    """

    def __init__(self, filters: SearchFilters, index_dir: Path) -> None:
        conditions: list[Condition] = [parse_where(condition) for condition in filters.where]
        if filters.condition is not None:
            conditions.append(filters.condition)
        self._conditions = conditions
        keys = {key for condition in conditions for key in _keys(condition)}
        # Computing absolute paths and parsing front matter takes a while for 100,000 rows.
        self._needs_file = bool(keys & {"file_name", "file_path"} or keys - set(KNOWN_KEYS))
        self.front_matter_keys = frozenset(keys - set(KNOWN_KEYS))
        self._index_dir = index_dir
        patterns = _patterns(filters.paths)
        self._path_matches = lru_cache(_CACHED_PATHS)(patterns.selects) if filters.paths else None
        self._since_ns: int | None = None
        if filters.since is not None:
            if filters.since.tzinfo is None:
                raise ConfigError(
                    f"since is {filters.since.isoformat()} without a time zone. "
                    "Pass one, as in datetime.now(timezone.utc)."
                )
            self._since_ns = int(filters.since.timestamp() * 1e9)
        self._times: dict[DocumentKey, int] = {}

    @property
    def needs_files(self) -> bool:
        """True if `use_files` must be called before the filter is applied."""
        return self._since_ns is not None

    def use_files(self, files: Mapping[DocumentKey, FileEntry]) -> None:
        """Take modification times from the index's files."""
        self._times = {key: entry.stamp.mtime_ns for key, entry in files.items() if entry.stamp is not None}

    def __call__(self, metadata: Mapping[str, Any]) -> bool:
        """Return whether a chunk with that metadata passes."""
        if self._path_matches is not None and not self._path_matches(str(metadata.get("path", ""))):
            return False
        if self._conditions:
            fields = fields_of(metadata, self._index_dir) if self._needs_file else metadata
            if not all(condition.matches(fields) for condition in self._conditions):
                return False
        return self._since_ns is None or self._modified(metadata) >= self._since_ns

    def _modified(self, metadata: Mapping[str, Any]) -> int:
        """Return the modification time of a chunk's file, as recorded when it was indexed or from the file system."""
        key = (str(metadata.get("root", "")), str(metadata.get("path", "")))
        if key not in self._times:
            try:
                self._times[key] = (root_path(key[0], self._index_dir) / key[1]).stat().st_mtime_ns
            except (OSError, ValueError):
                self._times[key] = 0
        return self._times[key]


def _keys(condition: Condition) -> set[str]:
    if isinstance(condition, Comparison):
        return {condition.key}
    return {key for part in condition.parts for key in _keys(part)}
