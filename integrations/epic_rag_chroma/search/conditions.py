"""Conditions on the metadata of a chunk: a tree of comparisons joined by and, or and not.

They are evaluated on a row's metadata, so that they mean the same in every search mode and for every key. Chroma's
`where` lacks substrings, headings and file names, and silently finds nothing for a misspelt key.

A key that a row does not have (`page` of a text file) satisfies `!=`, `nin` and `is_empty`, and nothing else.

Any other key is one of the files' front matter, whose values are texts and lists of texts. A list is equal to each of
its items; `>` and the like compare numbers as numbers, and all else, such as dates, as text. Texts are compared in
Unicode's composed form.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
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

NUMERIC_KEYS = ("chunks", "first_line", "last_line", "page", "position")
_TEXT_KEYS = (
    "content_hash", "doc_id", "embedded_hash", "file_name", "file_path", "heading_path", "kind", "lang", "path", "root",
)  # fmt: skip
KNOWN_KEYS: tuple[str, ...] = tuple(sorted((*NUMERIC_KEYS, *_TEXT_KEYS)))
_LIST_KEYS = ("heading_path",)
_FRONT_MATTER_KEY = re.compile(r"\w[\w. -]*")

_MEMBERSHIP = ("in", "nin")
_SUBSTRING = ("text_match", "text_match_insensitive")
_LIST_OPERATORS = ("contains", "any", "all")
_ORDER = (">", ">=", "<", "<=")
_TRUE_WITHOUT_KEY = ("!=", "nin", "is_empty")
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
    """A comparison of one key with a value.

    Args:
        key: One of `KNOWN_KEYS`: keys of the rows, `file_path` (absolute) and `file_name`.
        operator: `==`, `!=`; `>`, `>=`, `<`, `<=` for numbers; `in`, `nin` with a tuple of values; `text_match` and
            `text_match_insensitive` for a part of a text; `contains`, and `any` and `all` with a tuple, for whole
            headings in `heading_path`; `is_empty`, without a value.
        value: A text or a number, as the key has it; a tuple of them; None for `is_empty`.

    Raises:
        ConfigError: If the key is unknown, or the operator or the value is invalid for it.
    """

    key: str
    operator: Operator
    value: Value = None

    def __post_init__(self) -> None:
        if self.operator not in _TESTS:
            raise ConfigError(f"Unknown operator {self.operator!r} in a filter. Known are {' '.join(_TESTS)}.")
        if self.of_front_matter:
            if not _FRONT_MATTER_KEY.fullmatch(self.key):
                raise ConfigError(f"Cannot filter by {self.key!r}. The keys of an index are {', '.join(KNOWN_KEYS)}.")
            return
        numeric = self.key in NUMERIC_KEYS
        if self.operator in _ORDER and not numeric:
            raise self._invalid(f"{self.key} is a text. Use ==, in or text_match.")
        if self.operator in _SUBSTRING and numeric:
            raise self._invalid(f"{self.key} is a number. Use ==, < or in.")
        if self.operator in _LIST_OPERATORS and self.key not in _LIST_KEYS:
            raise self._invalid(f"{self.key} is not a list as {', '.join(_LIST_KEYS)} is. Use in or text_match.")
        self._check_value(numeric)

    @property
    def of_front_matter(self) -> bool:
        """True if the key is none that every index has."""
        return self.key not in KNOWN_KEYS

    def _check_value(self, numeric: bool) -> None:
        if self.operator == "is_empty":
            return
        several = self.operator in (*_MEMBERSHIP, "any", "all")
        if several and not isinstance(self.value, tuple):
            raise self._invalid("it takes a list of values.")
        if not several and (self.value is None or isinstance(self.value, tuple)):
            raise self._invalid(f"it takes one value. Use {'is_empty' if self.value is None else 'in'}.")
        for value in self.value if isinstance(self.value, tuple) else (self.value,):
            if isinstance(value, (int, float)) != numeric:
                raise self._invalid(f"{self.key} is {'a number' if numeric else 'a text'}, {value!r} is not.")

    def _invalid(self, why: str) -> ConfigError:
        shown = "" if self.operator == "is_empty" else f" {self.value!r}"
        return ConfigError(f"The filter {self.key} {self.operator}{shown} is invalid: {why}")

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Return whether the condition holds for a row (see `fields_of`)."""
        found = row.get(self.key)
        if found is None:
            return self.operator in _TRUE_WITHOUT_KEY
        if self.of_front_matter:
            return self._matches_front_matter(found if isinstance(found, list) else [found])
        return _TESTS[self.operator](_composed(found), _composed(self.value))

    def _matches_front_matter(self, items: list[str]) -> bool:
        """Return whether the condition holds for a value of the front matter, as a list of texts."""
        values = self.value if isinstance(self.value, tuple) else () if self.value is None else (self.value,)
        wanted = [str(_composed(value)) for value in values]
        found = [str(_composed(item)) for item in items]
        if self.operator in ("!=", "nin"):
            return not any(_equal(item, value) for item in found for value in wanted)
        if self.operator == "all":
            return all(any(_equal(item, value) for item in found) for value in wanted)
        if self.operator == "is_empty":
            return not any(found)
        if self.operator in _ORDER or self.operator in _SUBSTRING:
            test = _TESTS[self.operator]
            return any(test(*_comparable(item, value, self.operator)) for item in found for value in wanted)
        return any(_equal(item, value) for item in found for value in wanted)


@dataclass(frozen=True)
class Combination:
    """Conditions joined by `and` (all hold), `or` (one holds) or `not` (none holds). An empty one always holds."""

    condition: Literal["and", "or", "not"]
    parts: tuple[Condition, ...]

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Return whether the condition holds for a row (see `fields_of`)."""
        if not self.parts:
            return True
        if self.condition == "and":
            return all(part.matches(row) for part in self.parts)
        some = any(part.matches(row) for part in self.parts)
        return some if self.condition == "or" else not some


Condition = Comparison | Combination


def fields_of(metadata: Mapping[str, Any], index_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a row's metadata with `file_path` (absolute) and `file_name`, for `matches`.

    Args:
        metadata: The row's metadata in Chroma.
        index_dir: The index folder, absolute; roots are kept relative to it.
    """
    path = str(metadata.get("path", ""))
    absolute = os.path.normpath(os.path.join(index_dir, str(metadata.get("root", "")), path))
    front_matter = json.loads(metadata["front_matter"]) if metadata.get("front_matter") else {}
    return {**front_matter, **metadata, "file_path": absolute, "file_name": PurePosixPath(path).name}


def _composed(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_composed, value))
    return value if not isinstance(value, str) or value.isascii() else unicodedata.normalize("NFC", value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _comparable(found: str, value: str, operator: str) -> tuple[Any, Any]:
    """Return both as numbers, if they are and the operator is one of order; else as texts."""
    numbers = (_number(found), _number(value)) if operator in _ORDER else (None, None)
    return (found, value) if None in numbers else numbers


def _equal(found: str, value: str) -> bool:
    """Return whether two values are equal; truth values and numbers however they are written."""
    if found == value or found.casefold() == value.casefold():
        return True
    first, second = _number(found), _number(value)
    return first is not None and first == second and "." not in found + value


def _headings(path: str) -> frozenset[str]:
    return frozenset(path.split(HEADING_SEPARATOR) if path else ())
