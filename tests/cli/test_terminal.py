from __future__ import annotations

import json

import pytest

from epic_rag_cli.terminal import json_text, plural, printable, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("two  spaces\tand\na line", "two spaces and a line"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\rb", "a b"),
        ("bell\x07 backspace\x08 delete\x7f null\x00", "bell\\x07 backspace\\x08 delete\\x7f null\\x00"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ufeffbom", "\\ufeffbom"),
        ("file-\udcff.md", "file-\\udcff.md"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("héllo 世界 🙂", "héllo 世界 🙂"),
        ("👩\u200d👩\u200d👧", "👩\u200d👩\u200d👧"),
        ("[red]not markup[/red]", "[red]not markup[/red]"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected


@pytest.mark.parametrize("ascii_only", [False, True])
def test_json_text_escapes_controls_and_round_trips(ascii_only: bool) -> None:
    value = {"text": "\x1b[31m\x9b \x7f\u202e \udcff\U000e0041 世界\n\ttab", "number": 1.5, "none": None}
    text = json_text(value, ascii_only=ascii_only)
    assert json.loads(text) == value
    assert not {"\x1b", "\x9b", "\x7f", "\u202e", "\udcff", "\U000e0041"} & set(text)
    assert ("世" in text) is not ascii_only
    assert text.isascii() is ascii_only


def test_json_text_refuses_what_is_no_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"score": float("nan")})


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (45_000_000, "45.0 MB"), (2.5e12, "2.5 TB")],
)
def test_size(count: int, expected: str) -> None:
    assert size(count) == expected


def test_plural() -> None:
    assert [plural(count, "file") for count in (0, 1, 1234)] == ["0 files", "1 file", "1,234 files"]
