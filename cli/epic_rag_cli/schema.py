"""The JSON Schemas of what the commands print: loaded for tests, and as tables for docs/cli.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

__all__ = ["load_schema", "schema_names", "schema_tables"]

_SUFFIX = ".schema.json"
# In the order in which they are documented: what refers to another comes after it.
_NAMES = (
    "query",
    "query-lines",
    "query-batch",
    "status",
    "index",
    "index-dry-run",
    "index-watch",
    "config",
    "models",
    "bank-list",
    "bank-show",
)


def schema_names() -> tuple[str, ...]:
    """Return the names of the schemas."""
    return _NAMES


def load_schema(name: str) -> dict[str, Any]:
    """Return a schema by its name."""
    text = (files("epic_rag_cli") / "schemas" / f"{name}{_SUFFIX}").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def schema_tables() -> str:
    """Return what the schemas say as Markdown: a heading, a sentence and a table of keys for each."""
    lines: list[str] = []
    for name in _NAMES:
        schema = load_schema(name)
        lines += [f"### `{schema['title']}`", ""]
        what = "A list. " if schema.get("type") == "array" else ""
        lines += [f"{what}{schema['description']} Schema: `{name}{_SUFFIX}`.", ""]
        lines += ["| Key | Type | Meaning |", "|---|---|---|"]
        hit = schema["$defs"]["hit"] if name == _NAMES[0] else None
        lines += [f"| {key} | {kind} | {text} |" for key, kind, text in _rows(schema, "", hit)]
        lines.append("")
    return "\n".join(lines)


def _rows(schema: dict[str, Any], prefix: str, hit: dict[str, Any] | None) -> Iterator[tuple[str, str, str]]:
    """Yield key, type and meaning of what a schema lists; the keys of a hit only where it is given."""
    if "$ref" in schema:
        yield "...", "", "the keys of a hit, as in `query`"
    if schema.get("type") == "array":
        yield from _rows(schema["items"], f"{prefix}[].", hit)
    for name, each in schema.get("properties", {}).items():
        yield f"`{prefix}{name}`", _type(each), each.get("description", "")
        inner = each.get("items", each)
        if "$ref" in inner:
            inner = hit or {}
        if "properties" in inner:
            yield from _rows(inner, f"{prefix}{name}{'[]' if 'items' in each else ''}.", hit)


def _type(schema: dict[str, Any]) -> str:
    kind = schema.get("type", "boolean")
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if kind == "array":
        inner = schema["items"].get("type", "object")
        return f"list of {inner}s"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)
