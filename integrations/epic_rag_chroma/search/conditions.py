"""Conditions on the metadata of a chunk, as a tree: comparisons joined by and, or and not.

They decide by looking at a row's metadata, so that they mean the same in every mode of search and for every key.
Chroma's own `where` cannot say all of it (no part of a text, no headings, nothing about a file's name), and finds
nothing, without a word, where a key is misspelt.

A key that a row does not have (`page` of a text file) satisfies `!=`, `nin` and `is_empty`, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from epic_rag.errors import ConfigError
from epic_rag_chroma.reading.document import HEADING_SEPARATOR

__all__ = ["KNOWN_KEYS", "NUMERIC_KEYS", "Combination", "Comparison", "Condition", "Operator", "fields_of"]


Operator = Literal[
    "==", "!=", ">", ">=", "<", "<=", "in", "nin", "any", "all", "contains", "text_match", "text_match_insensitive",
    "is_empty",
]  # fmt: skip
Value = str | int | float | tuple[str | int | float, ...] | None

NUMERIC_KEYS = ("chunks", "first_line", "last_line", "page")
_TEXTS = (
    "content_hash", "doc_id", "embedded_hash", "file_name", "file_path", "heading_path", "kind", "lang", "path", "root",
)  # fmt: skip
KNOWN_KEYS: tuple[str, ...] = tuple(sorted((*NUMERIC_KEYS, *_TEXTS)))
_LISTS = ("heading_path",)

_ONE_OF = ("in", "nin")
_PART_OF_TEXT = ("text_match", "text_match_insensitive")
_PART_OF_LIST = ("contains", "any", "all")
_ORDERED = (">", ">=", "<", "<=")
_TRUE_OF_NOTHING = ("!=", "nin", "is_empty")
_TESTS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": lambda found, value: bool(found == value),
    "!=": lambda found, value: bool(found != value),
    ">": lambda found, value: bool(found > value),
    ">=": lambda found, value: bool(found >= value),
    "<": lambda found, value: bool(found < value),
    "<=": lambda found, value: bool(found <= value),
    "in": lambda found, value: found in value,
    "nin": lambda found, value: found not in value,
    "contains": lambda found, value: value in _headings(found),
    "any": lambda found, value: not _headings(found).isdisjoint(value),
    "all": lambda found, value: _headings(found).issuperset(value),
    "text_match": lambda found, value: value in found,
    "text_match_insensitive": lambda found, value: value.casefold() in found.casefold(),
    "is_empty": lambda found, _: bool(found == ""),
}


@dataclass(frozen=True)
class Comparison:
    """One key compared with a value.

    Args:
        key: One of `KNOWN_KEYS`: what the rows have, `file_path` (absolute) and `file_name`.
        operator: `==`, `!=`; `>`, `>=`, `<`, `<=` for numbers; `in`, `nin` with a tuple of values; `text_match` and
            `text_match_insensitive` for a part of a text; `contains`, and `any` and `all` with a tuple, for whole
            headings in `heading_path`; `is_empty`, without a value.
        value: A text or a number, as the key has it; a tuple of them; None for `is_empty`.

    Raises:
        ConfigError: If the key is not known, or the operator or the value has no meaning for it.
    """

    key: str
    operator: Operator
    value: Value = None

    def __post_init__(self) -> None:
        if self.operator not in _TESTS:
            raise ConfigError(f"unknown operator {self.operator!r} in a filter; known are {' '.join(_TESTS)}")
        if self.key not in KNOWN_KEYS:
            raise ConfigError(f"cannot filter by {self.key!r}; the keys of an index are {', '.join(KNOWN_KEYS)}")
        numeric = self.key in NUMERIC_KEYS
        if self.operator in _ORDERED and not numeric:
            raise self._meaningless(f"{self.key} is a text; use ==, in or text_match")
        if self.operator in _PART_OF_TEXT and numeric:
            raise self._meaningless(f"{self.key} is a number; use ==, < or in")
        if self.operator in _PART_OF_LIST and self.key not in _LISTS:
            raise self._meaningless(f"{self.key} is no list ({', '.join(_LISTS)} is one); use in or text_match")
        self._check_value(numeric)

    def _check_value(self, numeric: bool) -> None:
        if self.operator == "is_empty":
            return
        several = self.operator in (*_ONE_OF, "any", "all")
        if several and not isinstance(self.value, tuple):
            raise self._meaningless("it takes a list of values")
        if not several and (self.value is None or isinstance(self.value, tuple)):
            raise self._meaningless("it takes one value" + ("; use is_empty" if self.value is None else "; use in"))
        for value in self.value if isinstance(self.value, tuple) else (self.value,):
            if isinstance(value, (int, float)) != numeric:
                kinds = ("a number", "a text") if numeric else ("a text", "a number")
                raise self._meaningless(f"{self.key} is {kinds[0]} and {value!r} is {kinds[1]}")

    def _meaningless(self, why: str) -> ConfigError:
        shown = "" if self.operator == "is_empty" else f" {self.value!r}"
        return ConfigError(f"the filter {self.key} {self.operator}{shown} has no meaning: {why}")

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether the condition holds for a row.

        Args:
            row: What `fields_of` makes of its metadata.
        """
        found = row.get(self.key)
        if found is None:
            return self.operator in _TRUE_OF_NOTHING
        return _TESTS[self.operator](found, self.value)


@dataclass(frozen=True)
class Combination:
    """Conditions joined: `and` (all hold), `or` (one holds), `not` (none holds). Without any it always holds."""

    condition: Literal["and", "or", "not"]
    parts: tuple[Condition, ...]

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether the condition holds for a row; see `Comparison.matches`."""
        if not self.parts:
            return True
        if self.condition == "and":
            return all(part.matches(row) for part in self.parts)
        some = any(part.matches(row) for part in self.parts)
        return some if self.condition == "or" else not some


Condition = Comparison | Combination


def fields_of(metadata: Mapping[str, Any], index_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What a condition looks at: a row's metadata with `file_path` (absolute) and `file_name`.

    Args:
        metadata: The row's metadata in Chroma.
        index_dir: The index folder, absolute; roots are kept relative to it.
    """
    path = str(metadata.get("path", ""))
    absolute = os.path.normpath(os.path.join(index_dir, str(metadata.get("root", "")), path))
    return {**metadata, "file_path": absolute, "file_name": PurePosixPath(path).name}


def _headings(path: str) -> frozenset[str]:
    return frozenset(path.split(HEADING_SEPARATOR) if path else ())
