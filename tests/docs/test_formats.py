"""docs/formats.md lists the supported formats, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from epic_rag_chroma.reading.code import LANGUAGES
from epic_rag_chroma.reading.file_types import kind_of, languages, suffixes_by_kind

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")


def test_suffixes() -> None:
    listed = set()
    for row in re.findall(r"^\|(.*)\|$", PAGE, re.M):
        if "|" in row:
            listed |= set(re.findall(r"`(\.[a-z0-9]+)`", row.split("|")[1]))
    listed |= {f".{number}" for number in range(1, 9)}
    assert listed == {suffix for suffixes in suffixes_by_kind().values() for suffix in suffixes}


def test_kinds_of_text() -> None:
    for kind, suffixes in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", PAGE, re.M):
        for suffix in re.findall(r"`(\.[a-z0-9]+)`", suffixes):
            assert kind_of(f"a{suffix}") == kind


def test_languages() -> None:
    named = PAGE[PAGE.index("the names are") : PAGE.index("Text is decoded")]
    assert set(re.findall(r"`(\w+)`", named)) == set(languages())
    assert set(re.findall(r"(?<!\()`(\w+)`", named)) == set(LANGUAGES)
