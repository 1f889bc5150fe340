"""Front matter: the YAML or TOML mapping at the top of a text file. It is metadata, and no part of the text."""

from __future__ import annotations

import re
import sys
from typing import Any

__all__ = ["FrontMatter", "read_front_matter"]

_MAX_LINES = 1000
_MAX_KEYS = 200
_MAX_ITEMS = 200
_MAX_VALUE = 1000
_MAX_DEPTH = 3
_PLAIN = re.compile(r"""^([\w][\w. -]*?)\s*[:=]\s*(['"]?)(.*?)\2\s*$""")
# A text with commas is a list under these keys.
_LISTS = frozenset({"tags", "tag", "keywords", "categories", "category", "aliases", "authors", "labels"})

Metadata = dict[str, "str | list[str]"]


class FrontMatter:
    """Front matter of a file.

    Attributes:
        end: The line after it.
        metadata: Its values and lists of values, as texts that are written as in the file; keys of inner mappings are
            joined by dots.
        title: The value of `title`; "" without one.
    """

    def __init__(self, end: int, content: dict[Any, Any]) -> None:
        self.end = end
        self.metadata: Metadata = {}
        _flatten(content, "", self.metadata, 0)
        title = self.metadata.get("title", self.metadata.get("Title", ""))
        self.title = title if isinstance(title, str) else " ".join(title)


def read_front_matter(lines: list[str]) -> FrontMatter | None:
    """Return the front matter of a file; None without any.

    It is between two lines `---` (YAML) or `+++` (TOML), and a mapping; anything else is text between two rules.
    """
    mark = lines[0].rstrip() if lines else ""
    if mark not in ("---", "+++"):
        return None
    closing = (mark, "...") if mark == "---" else (mark,)
    end = next((number for number in range(1, min(_MAX_LINES, len(lines))) if lines[number].rstrip() in closing), 0)
    if not end:
        return None
    text = "\n".join(lines[1:end])
    content = _parsed_yaml(text) if mark == "---" else _parsed_toml(text)
    if content is None:  # broken, and yet readable line by line
        content = {}
        for line in lines[1:end]:
            match = _PLAIN.match(line)
            if match is not None:
                content[match.group(1)] = match.group(3)
            elif line.strip() and line[:1] not in (" ", "\t", "-", "#", "]", "}"):
                return None
    return FrontMatter(end + 1, content) if isinstance(content, dict) and content else None


def _parsed_yaml(text: str) -> Any:
    import yaml

    # All scalars as they are written: 007 and 1.10 are no numbers here, and "no" no truth value.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        return yaml.load(text.expandtabs(2), Loader=loader) or ""
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


def _parsed_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text) or ""
    except (ValueError, RecursionError):
        return None


def _flatten(content: dict[Any, Any], prefix: str, into: Metadata, depth: int) -> None:
    for name, value in content.items():
        key = f"{prefix}{name}".strip()
        if not key or len(into) >= _MAX_KEYS:
            continue
        if isinstance(value, dict):
            if depth < _MAX_DEPTH:
                _flatten(value, f"{key}.", into, depth + 1)
        elif isinstance(value, list):
            items = [_text_of(item) for item in value[:_MAX_ITEMS] if not isinstance(item, (dict, list))]
            if any(items):
                into[key] = [item for item in items if item]
        elif str(name).lower() in _LISTS:
            parts = [part.strip().removeprefix("#") for part in _text_of(value).split(",")]
            if any(parts):
                into[key] = [part for part in parts if part]
        elif _text_of(value):
            into[key] = _text_of(value)


def _text_of(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
    return " ".join(text.split())[:_MAX_VALUE]
