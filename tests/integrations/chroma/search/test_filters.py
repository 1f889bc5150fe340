"""Filters: what they mean, and what is no filter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from epic_rag.errors import ConfigError
from epic_rag_chroma import SearchFilters
from epic_rag_chroma.search.conditions import Comparison
from epic_rag_chroma.search.filters import Filter, parse_filters, parse_where
from epic_rag_chroma.store.paths import DocumentKey, FileStamp
from epic_rag_chroma.store.state import FileEntry

PYTHON: dict[str, Any] = {"path": "src/tool.py", "root": "..", "kind": "code", "lang": "python", "first_line": 7}
PDF: dict[str, Any] = {"path": "guide/book.pdf", "root": "..", "kind": "pdf", "lang": "", "page": 3}


def passing(
    filters: SearchFilters, index_dir: Path = Path("/nowhere"), files: Mapping[DocumentKey, FileEntry] | None = None
) -> list[str]:
    passes = Filter(filters, index_dir)
    assert passes.needs_files == (filters.since is not None)
    passes.use_files(files or {})
    return [row["kind"] for row in (PYTHON, PDF) if passes(row)]


@pytest.mark.parametrize(
    ("where", "kinds"),
    [
        (["lang=python"], ["code"]),
        (["lang == python"], ["code"]),
        (["lang!=python"], ["pdf"]),
        (["lang="], ["pdf"]),
        (["page>=3"], ["pdf"]),
        (["page>3"], []),
        (["page < 4", "page<=3", "page=3"], ["pdf"]),
        (["page!=3"], ["code"]),  # a text file has no page
        (["first_line<100"], ["code"]),
        (["file_name=tool.py"], ["code"]),
        (["lang=python", "kind=pdf"], []),
        ([], ["code", "pdf"]),
    ],
)
def test_conditions(where: list[str], kinds: list[str]) -> None:
    assert passing(parse_filters(where, [], None)) == kinds


@pytest.mark.parametrize(
    ("paths", "kinds"),
    [
        (["guide/**"], ["pdf"]),
        (["*.py"], ["code"]),
        (["src"], ["code"]),
        (["/tool.py"], []),
        (["tool.py"], ["code"]),
        (["*.py", "*.pdf"], ["code", "pdf"]),
        (["*", "!*.pdf"], ["code"]),
    ],
)
def test_paths_have_the_syntax_of_ignore_files(paths: list[str], kinds: list[str]) -> None:
    assert passing(parse_filters([], paths, None)) == kinds


def test_a_condition_of_other_code_counts_as_well() -> None:
    assert passing(SearchFilters(condition=Comparison("path", "text_match", "guide"))) == ["pdf"]
    assert passing(SearchFilters(("lang=python",), condition=Comparison("path", "text_match", "guide"))) == []


@pytest.mark.parametrize(
    ("since", "age"),
    [
        ("30m", timedelta(minutes=30)),
        ("12h", timedelta(hours=12)),
        ("7d", timedelta(days=7)),
        ("1.5D", timedelta(days=1.5)),
        ("2w", timedelta(weeks=2)),
    ],
)
def test_ages(since: str, age: timedelta) -> None:
    moment = parse_filters([], [], since).since
    assert moment is not None
    assert abs(datetime.now(timezone.utc) - age - moment) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("since", "moment"),
    [
        ("2026-01-31", datetime(2026, 1, 31).astimezone()),
        ("2026-01-31T12:30", datetime(2026, 1, 31, 12, 30).astimezone()),
        ("2026-01-31T12:30:00Z", datetime(2026, 1, 31, 12, 30, tzinfo=timezone.utc)),
        ("2026-01-31 12:30+02:00", datetime(2026, 1, 31, 10, 30, tzinfo=timezone.utc)),
    ],
)
def test_dates(since: str, moment: datetime) -> None:
    assert parse_filters([], [], since).since == moment


@pytest.mark.parametrize(
    ("where", "paths", "since", "message"),
    [
        (["lang"], [], None, r'"lang" is not a condition\. Write one like "lang=python"'),
        (["=python"], [], None, "is not a condition"),
        (["page>=three"], [], None, r'page is a number, "three" is not'),
        (["page="], [], None, "page is a number"),
        (["lang>python"], [], None, "lang is a text"),
        ([], [""], None, "is not a path pattern"),
        ([], ["# comment"], None, "is not a path pattern"),
        ([], ["!"], None, "is not a path pattern"),
        ([], [], "yesterday", r'"yesterday" is not a time\. Write an age such as 30m'),
        ([], [], "7", "is not a time"),
        ([], [], "-7d", "is not a time"),
        ([], [], "2026-13-01", "is not a time"),
        ([], [], "9" * 400 + "d", "is not a time"),
        ([], [], "", "is not a time"),
    ],
)
def test_what_is_no_filter(where: list[str], paths: list[str], since: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_filters(where, paths, since)


@pytest.mark.parametrize(
    "filters",
    [SearchFilters(("nonsense",)), SearchFilters(paths=("",)), SearchFilters(since=datetime(2026, 1, 1))],
)
def test_filters_made_by_hand_are_checked_when_they_are_used(filters: SearchFilters) -> None:
    with pytest.raises(ConfigError):
        Filter(filters, Path("/nowhere"))


def test_parse_where_takes_values_with_spaces_and_signs() -> None:
    assert parse_where("heading_path=Guide > Undo = redo") == Comparison("heading_path", "==", "Guide > Undo = redo")
    assert parse_where("page>=-1") == Comparison("page", ">=", -1)
    assert parse_where("page<2.5") == Comparison("page", "<", 2.5)


def test_since_is_compared_with_the_indexed_file_and_then_with_the_file(tmp_path: Path) -> None:
    index_dir = tmp_path / ".epic-rag"
    old, new = datetime(2020, 1, 1, tzinfo=timezone.utc), datetime(2026, 1, 1, tzinfo=timezone.utc)
    since = SearchFilters(since=datetime(2025, 1, 1, tzinfo=timezone.utc))
    assert passing(since, index_dir) == []  # neither entries nor files
    for path in ("src/tool.py", "guide/book.pdf"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text("x")
    os.utime(tmp_path / "src/tool.py", (new.timestamp(), new.timestamp()))
    os.utime(tmp_path / "guide/book.pdf", (old.timestamp(), old.timestamp()))
    assert passing(since, index_dir) == ["code"]
    entries = {}
    for path, moment in (("src/tool.py", old), ("guide/book.pdf", new)):
        nanoseconds = int(moment.timestamp() * 1e9)
        entries["..", path] = FileEntry("d", 1, FileStamp(1, nanoseconds, nanoseconds, 1))
    assert passing(since, index_dir, entries) == ["pdf"]
    assert passing(SearchFilters(since=new), index_dir, entries) == ["pdf"]
