"""For all text formats: the file's lines at a chunk's line numbers are its text, and every line is in a chunk.

EPIC_RAG_SOAK=1 tries many more files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epic_rag import EpicEncoder
from epic_rag_chroma.chunking import chunk_document
from epic_rag_chroma.reading.document import NotTextError
from epic_rag_chroma.reading.reader import read_document
from epic_rag_chroma.reading.worker import IsolatedReader
from tests.helpers.soak import SOAK

EXAMPLES = 1000 if SOAK else 25

# Lines with a meaning in a format; each file mixes them with plain lines and with those of other formats.
SYNTAX = {
    ".md": ["# One", "## Two", "One", "===", "---", "```", "~~~", "- item", "  more", "| a | b |", "|---|---|", "> q"],
    ".rst": ["Title", "=====", "-----", ".. note::", "   indented", "text::", "+---+", "| a |", "=== ===", "- item"],
    ".adoc": ["= Top", "== Two", "----", "====", "|===", "| a | b", "[source]", ".Title", "* item", "+", "a:: b", "--"],
    ".tex": [
        r"\section{One}",
        r"\title{A",
        "}",
        r"\begin{verbatim}",
        r"\end{verbatim}",
        r"\item a",
        r"a & b \\",
        "% c",
    ],
    ".org": ["* One", "** TODO Two :tag:", "#+begin_src", "#+end_src", "| a |", "|---|", "- item", "#+TITLE: x"],
    ".1": [".TH A 1", ".SH NAME", ".SS", ".TP", ".nf", ".fi", r"\fBx\fR", ".", "'"],
    ".txt": ["- item", "  more", "1. one", "(a) two", "    deep", "end."],
    ".csv": ["a,b", '"x', 'y"', "1,2", "#", ",,", '"a""b",c', "a;b"],
    ".json": ["{", "}", '"a": {', '"b": [', "]", "],", '"c": "d",', '{"a": [1', '"', "// x", "\\"],
    ".jsonl": ['{"a": 1}', "[]", '{"b": "text here"}'],
    ".yaml": ["a:", "  b:", "    c: 1", "- x", "  - y: |", "---", "# c", "  text", "\ttab:"],
    ".toml": ["[a]", "[[b.c]]", "x = 1", 'y = """', '"""', "z = [", "]"],
    ".ini": ["[a]", "b = 1", " goes on", "; c"],
    ".xml": ["<a>", "</a>", '<b c="d">', "<e/>", "<!--", "-->", "<![CDATA[", "]]>", "text", "<"],
    ".srt": ["1", "00:00:01,000 --> 00:00:02,000", "Hello.", "", "2"],
    ".vtt": ["WEBVTT", "NOTE x", "STYLE", "00:01.000 --> 00:02.000 line:1", "Hi", ""],
    ".py": ["def f(x):", "    return x", "class A:", "    def g(self):", '"""', "# c", "@d", "x = (", ")", "if x:"],
    ".ts": [
        "class A {",
        "  f() {",
        "}",
        "const g = () => {",
        "};",
        "/*",
        "*/",
        "`",
        "export default {",
        "  k: () => {",
    ],
    ".c": ["int f(void)", "{", "}", "struct S {", "};", "/* c", "*/", "#if X", "#endif", "  x();"],
    ".go": ["func (s *S) F() {", "}", "type T struct {", "\tx int", "// c", "`"],
    ".rs": ["impl S {", "    fn f() {", "    }", "}", "#[a]", "/// d", "mod m {", 'r#"'],
    ".rb": ["class A", "  def f", "  end", "end", "=begin", "=end", "x = <<~E", "E"],
    ".hs": ["f :: Int", "f 0 = 1", "f x = x", "data D = A", "  | B", "{-", "-}"],
    ".sql": ["CREATE TABLE a (", ");", "SELECT 1;", "-- c", "$$"],
    ".vue": ["<script>", "function f() {", "}", "</script>"],
}
PLAIN = frozenset(["text. And more. " * 9, "end.", "word", "    four", "\tone tab"])
EVERYWHERE = ["", "", "", "text. And more. " * 9, "\f", "\x85 odd \u2028 ends", "end.", "word", "    four", "\tone tab"]
ANYTHING = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n\x1b"), max_size=60)
ALL_SYNTAX = sorted({line for lines in SYNTAX.values() for line in lines})


def files(suffix: str) -> st.SearchStrategy[list[str]]:
    syntax = st.sampled_from(SYNTAX[suffix])
    return st.lists(
        st.one_of(syntax, syntax, syntax, st.sampled_from(EVERYWHERE), st.sampled_from(ALL_SYNTAX), ANYTHING),
        max_size=60,
    )


@pytest.mark.parametrize("suffix", sorted(SYNTAX))
def test_line_numbers(tiny_encoder: EpicEncoder, suffix: str) -> None:
    @settings(
        deadline=None,
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(
        files(suffix),
        st.sampled_from(["\n", "\r\n", "\r"]),
        st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
        st.integers(8, 60),
        st.sampled_from([0, 0, 2, 7]),
    )
    def check(lines: list[str], end: str, encoding: str, size: int, overlap: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "file" + suffix)
            path.write_bytes(end.join(lines).encode(encoding))
            try:
                document = read_document(path.name, path.read_bytes())
            except NotTextError:  # markup alone
                assert suffix == ".vtt" or not PLAIN.intersection(lines)  # a header has no text
                return
            chunks = chunk_document(document, max_tokens=size, overlap=overlap, count_tokens=tiny_encoder.count_tokens)
            with open(path, encoding="utf-8-sig" if encoding == "utf-8" else encoding) as file:
                shown = file.read().split("\n")
        covered: set[int] = set()
        for chunk in chunks:
            assert chunk.first_line is not None
            assert chunk.last_line is not None
            assert chunk.text.strip()
            assert chunk.embedded.strip()
            there = shown[chunk.first_line - 1 : chunk.last_line]
            if chunk.text != "\n".join(there):  # a slice of a line that is too long for one chunk
                assert chunk.text in "\n".join(there)
                assert max(tiny_encoder.count_tokens([line + "\n" for line in there])) > size // 3
            covered.update(range(chunk.first_line, chunk.last_line + 1))
        # Front matter is metadata, not text.
        assert {number for number, line in enumerate(document.lines, start=1) if line.strip()} <= covered
        has_all = not document.metadata
        assert not has_all or [bool(line.strip()) for line in document.lines] == [bool(line.strip()) for line in shown]
        if not overlap and has_all and not document.display_only:  # the chunks are the file, in its order
            assert "".join("".join(chunk.text for chunk in chunks).split()) == "".join("".join(shown).split())
        counts = tiny_encoder.count_tokens([chunk.embedded for chunk in chunks])
        assert all(count <= size or len(chunk.text) == 1 for count, chunk in zip(counts, chunks, strict=True))
        assert [chunk.tokens for chunk in chunks] == counts

    check()


def test_worker_process_reads_the_same() -> None:
    with IsolatedReader() as reader:
        for suffix, lines in SYNTAX.items():
            data = "\n".join([*lines, "", *lines, "text", *lines]).encode()
            assert reader.read(f"a{suffix}", data) == read_document(f"a{suffix}", data)
