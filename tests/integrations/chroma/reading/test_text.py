"""Text formats: headings, split places, embedded text and shown lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer, SearchFilters
from epic_rag_chroma.chunking import Chunk, chunk_document
from epic_rag_chroma.reading.document import NotTextError, split_lines
from epic_rag_chroma.reading.encoding import decode
from epic_rag_chroma.reading.file_types import byte_limit, kind_of, unread_format
from epic_rag_chroma.reading.reader import read_document


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def cut(name: str, text: str, size: int = 60) -> list[Chunk]:
    return chunk_document(
        read_document(name, text.encode()), max_tokens=size, overlap=0, count_tokens=count_words
    )  # fmt: skip


def places(chunks: list[Chunk]) -> list[tuple[tuple[str, ...], int | None, int | None]]:
    return [(chunk.heading_path, chunk.first_line, chunk.last_line) for chunk in chunks]


ASCIIDOC = """\
= The manual
An Author <a@b.c>
:toc:

Intro.

== First part

text

----
== not a title
----

====
* inside an example
====

=== Deeper ===

more

Old title
---------

end
"""
LATEX = r"""\documentclass{article}
\title{The \emph{manual}}
\begin{document}
\section[short]{First part\label{a}}
text % \section{no}
\begin{verbatim}
\section{not a title}
\end{verbatim}
\subsection*{Deeper
  still}
more
\section{100\% sure}
end
\end{document}
"""
ORG = """\
#+TITLE: The manual
Intro.
* TODO First part  :tag:
text
#+BEGIN_SRC org
* not a title
#+END_SRC
** Deeper
more
* Last
end
"""
MAN = """\
.TH TOOL 1 "May 2024"
.SH NAME
tool \\- does it
.SH OPTIONS
.TP
\\fB\\-a\\fR
All.
.SS "More \\fIoptions\\fR"
text
"""
TOML = (
    '[project]\nname = "x"\ntext = """\n[not.a.table]\n"""\n\n[tool.ruff]\nselect = [\n    "E",\n]\n\n[[item]]\na = 1\n'
)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.adoc",
            ASCIIDOC,
            [
                (("The manual",), 1, 5),
                (("The manual", "First part"), 7, 17),
                (("The manual", "First part", "Deeper"), 19, 21),
                (("The manual", "Old title"), 23, 26),
            ],
        ),
        (
            "a.tex",
            LATEX,
            [
                ((), 1, 1),
                (("The manual",), 2, 3),
                (("The manual", "First part"), 4, 8),
                (("The manual", "First part", "Deeper still"), 9, 11),
                (("The manual", "100% sure"), 12, 14),
            ],
        ),
        (
            "a.org",
            ORG,
            [
                (("The manual",), 1, 2),
                (("The manual", "First part"), 3, 7),
                (("The manual", "First part", "Deeper"), 8, 9),
                (("The manual", "Last"), 10, 11),
            ],
        ),
        (
            "tool.1",
            MAN,
            [
                (("tool", "NAME"), 1, 3),
                (("tool", "OPTIONS"), 4, 7),
                (("tool", "OPTIONS", "More options"), 8, 9),
            ],
        ),
        ("a.toml", TOML, [(("project",), 1, 5), (("tool.ruff",), 7, 10), (("item",), 12, 13)]),
        ("a.ini", "; top\n[one]\na = 1\n[two]\nb = 2\n", [((), 1, 1), (("one",), 2, 3), (("two",), 4, 5)]),
        ("app.log.1", "* no manual\n\nnor a title\n", [((), 1, 3)]),
    ],
)
def test_headings(name: str, text: str, expected: list[tuple[tuple[str, ...], int, int]]) -> None:
    assert places(cut(name, text)) == expected


def words(number: int) -> str:
    return " ".join(f"word{n}" for n in range(number))


# A code block, a table and a list item in each format, by lines of five words or so.
BLOCKS = {
    "a.md": {
        "code": ["```sh", *(f"line {n} of\n\ncode" for n in range(5)), "```"],
        "table": ["| a | b |", "|---|---|", *(f"| {n} | w x y z |" for n in range(3))],
        "item": ["- an item", *(f"\n  {words(6)}" for _ in range(3))],
    },
    "a.rst": {
        "code": [".. code-block:: sh", "", *(f"    line {n} of\n\n    code" for n in range(5))],
        "literal": ["An example::", "", *(f"    line {n} of\n\n    code" for n in range(5))],
        "table": ["+---+---+", "| a | b |", "+===+===+", *("| 1 | x |\n+---+---+" for n in range(3))],
        "simple table": ["=== ===", "a   b", "=== ===", *("1   x" for n in range(8)), "=== ==="],
        "item": ["- an item", *(f"\n  {words(6)}" for _ in range(3))],
    },
    "a.adoc": {
        "code": ["[source,sh]\n----", *(f"line {n} of\n\ncode" for n in range(5)), "----"],
        "table": ["|===", "| a | b", "", *(f"| {n} | x" for n in range(5)), "|==="],
        "item": ["* an item", *(f"  {words(6)}" for _ in range(3))],
    },
    "a.tex": {
        "code": [r"\begin{lstlisting}", *(f"line {n} of\n\ncode" for n in range(5)), r"\end{lstlisting}"],
        "table": [r"\begin{tabular}{ll}", *(rf"{n} & x \\" for n in range(5)), r"\end{tabular}"],
    },
    "a.org": {
        "code": ["#+begin_src sh", *(f"line {n} of\n\ncode" for n in range(5)), "#+end_src"],
        "table": ["| a | b |", "|---+---|", *(f"| {n} | x |" for n in range(4))],
        "item": ["- an item", *(f"\n  {words(6)}" for _ in range(3))],
    },
    "a.txt": {"item": ["1. an item", *(f"   {words(6)}" for _ in range(3))]},
    "a.yaml": {"member": ["key:", *(f"  - {words(4)}" for n in range(5))]},
    "a.xml": {"element": ["<e>", *(f"  <f>{words(4)}</f>" for n in range(5)), "</e>"]},
}


@pytest.mark.parametrize(("name", "block"), [(name, block) for name, blocks in BLOCKS.items() for block in blocks])
@pytest.mark.parametrize("before", [3, 11, 22, 29])
def test_blocks_are_kept_together(name: str, block: str, before: int) -> None:
    text = "\n".join(BLOCKS[name][block])
    assert len(text.split()) <= 30
    prose = f"x: {words(before)}" if name.endswith((".yaml", ".xml")) else f"{words(before)}\nand then it goes on."
    chunks = cut(name, f"{prose}\n\n{text}\n\n{prose}\n\n{text}\n\n{prose}\n", size=30)
    assert len(chunks) > 2
    assert sum(text in chunk.text for chunk in chunks) == 2


# Formats in which the rules of a table are not embedded.
RULED = ("a.md", "a.rst", "a.org")


@pytest.mark.parametrize(
    ("name", "header", "row"),
    [
        ("a.md", "| Name | Port |\n|---|---|", "| host {} | {} |"),
        ("a.rst", "+---+---+\n| Name | Port |\n+===+===+", "| host {} | {} |\n+---+---+"),
        ("a.adoc", "|===\n| Name | Port |\n", "| host {} | {} |"),
        ("a.org", "| Name | Port |\n|---+---|", "| host {} | {} |"),
        ("a.csv", "Name,Port |", "host {},{}"),
        ("a.tsv", "Name\tPort |", "host {}\t{}"),
    ],
)
def test_repeated_header(name: str, header: str, row: str) -> None:
    rows = "\n".join(row.format(n, n + 8000) for n in range(60))
    closing = "\n|===" if name == "a.adoc" else ""
    first, *rest = cut(name, f"{header}\n{rows}{closing}\n", size=30)
    assert len(rest) > 2
    assert "Port" in first.text
    rules = re.compile(r"^[|+=-]{4,}\n?|\n[|+=-]{4,}$", re.MULTILINE)  # not embedded

    def read(text: str) -> str:
        """The text that is embedded of a table; in Markdown without its bars."""
        text = rules.sub("", text) if name in RULED else text
        return " ".join(text.replace("|", " ").split()) if name == "a.md" else text

    assert read(first.embedded) == read(first.text)
    assert name != "a.md" or "|" not in first.embedded
    said = next(line for line in header.split("\n") if "Port" in line)
    for chunk in rest:
        assert read(chunk.embedded) == read(f"{said}\n{read(chunk.text)}")
        assert "Port" not in chunk.text
        assert chunk.tokens <= 30


def test_long_header_is_not_repeated() -> None:
    header = ",".join(f"column {n}" for n in range(40))
    rows = "\n".join(f"row {n} is here" for n in range(30))
    chunks = cut("a.csv", f"{header}\n{rows}\n", size=20)
    assert max(chunk.tokens for chunk in chunks) <= 20
    assert chunks[-1].embedded == chunks[-1].text


def test_csv_record_with_line_ends() -> None:
    rows = "\n".join(f'{n},"several\n\nlines of one field"' for n in range(20))
    chunks = cut("a.csv", f"id,text\n{rows}\n", size=20)
    assert len(chunks) > 3
    assert all(chunk.text.endswith('lines of one field"') for chunk in chunks)
    assert all(chunk.text.split(",")[0].isdigit() for chunk in chunks[1:])


@pytest.mark.parametrize("text", ["1,2\n3,4\n", "a,a\n1,2\n", ",b\n1,2\n", "x" * 200_000 + ",b\n1,2\n"])
def test_csv_without_header(text: str) -> None:
    assert not read_document("a.csv", text.encode()).repeated_headers


def test_csv_unclosed_quote() -> None:
    rows = "\n".join(f'screen {n},17" wide' for n in range(301))
    chunks = cut("a.csv", f"name,size\n{rows}\n", size=30)
    assert len(chunks) > 20


def test_json_lines() -> None:
    text = "".join(f'{{"id": {n}, "text": "some words of a record"}}\n' for n in range(20))
    chunks = cut("a.jsonl", text, size=20)
    assert len(chunks) > 4
    assert all(line.startswith("{") and line.endswith("}") for chunk in chunks for line in chunk.text.split("\n"))


def test_opening_lines_are_repeated() -> None:
    servers = ",\n".join(
        f'      {{\n        "port": {n},\n        "name": "the name of it"\n      }}' for n in range(9)
    )
    text = f'{{\n  "title": "a [b",\n  "servers": {{\n    "inner": [\n{servers}\n    ]\n  }},\n  "last": 1\n}}\n'
    first, *rest = cut("a.json", text, size=24)
    assert first.text.startswith("{")
    middle = [chunk for chunk in rest if '"port"' in chunk.text]
    assert len(middle) > 3
    for chunk in middle:
        assert chunk.embedded.startswith('  "servers": {\n    "inner": [\n')
        assert chunk.text.startswith("      {\n")
    assert rest[-1].text.startswith('  "last"') or '"last": 1' in rest[-1].text
    chunks = cut("a.yaml", "top:\n" + "".join(f"  k{n}:\n    - some words {n}\n" for n in range(20)), size=16)
    assert all(chunk.embedded == f"top:\n{chunk.text}" for chunk in chunks[1:])
    assert all(chunk.text.startswith("  k") for chunk in chunks[1:])


def test_json_on_one_line() -> None:
    text = "[" + ",".join(f'{{"id":{n},"text":"some words of a record"}}' for n in range(200)) + "]"
    chunks = cut("a.json", text, size=30)
    assert max(chunk.tokens for chunk in chunks) <= 30
    assert "".join("".join(chunk.text.split()) for chunk in chunks) == "".join(text.split())


def test_html_tables_and_lists() -> None:
    item = "<li>one two<p>three four five</p></li>"
    rows = "".join(f"<tr><td>{n}</td><td>x</td></tr>\n" for n in range(4))
    small = f"<table>\n<tr><th>a</th><th>b</th></tr>\n{rows}</table>"
    prose = f"<p>{words(18)}</p>"
    chunks = cut("a.html", f"{prose}{small}{prose}{small}<ul>{item * 9}</ul>", size=24)
    table = "a | b\n" + "\n".join(f"{n} | x" for n in range(4))
    assert sum(table in chunk.text for chunk in chunks) == 2
    assert sum(chunk.text.count("- one two\n\nthree four five") for chunk in chunks) == 9
    long = small.replace(rows, rows * 9)
    rest = cut("a.html", long, size=24)[1:]
    assert len(rest) > 3
    assert all(chunk.embedded == f"a | b\n{chunk.text}" for chunk in rest)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_html_line_numbers(end: str, encoding: str) -> None:
    data = end.join(["<html>", "<p>one</p>", "", "<p>two</p>"]).encode(encoding)
    document = read_document("a.html", data)
    assert document.spans == [(2, 2), (2, 2), (4, 4)]


SRT = "1\n00:00:01,000 --> 00:00:02,500\nHello there,\nmy friend.\n\n2\n00:00:03,000 --> 00:00:04,000\nHow are you?\n"
VTT = "WEBVTT - it\n\nNOTE by me\n\nSTYLE\n::cue {}\n\nid\n00:01.000 --> 00:02.000 align:start\nHello.\n\n00:03.000 --> 00:04.000\nBye.\n"
SBV = "0:00:01.000,0:00:02.500\nHello.\n\n0:00:03.000,0:00:04.000\nBye.\n"


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("a.srt", SRT, "Hello there,\nmy friend.\nHow are you?"),
        ("a.vtt", VTT, "NOTE by me\n\nHello.\nBye."),
        ("a.sbv", SBV, "Hello.\nBye."),
    ],
)
def test_subtitle_times_are_not_embedded(name: str, text: str, read: str) -> None:
    (chunk,) = cut(name, text)
    assert chunk.embedded == read
    assert chunk.text == text.rstrip("\n")
    assert chunk.tokens == len(read.split())


def test_subtitles_split_after_sentences() -> None:
    cues = []
    for n in range(30):
        said = f"cue {n} goes on" if n % 3 else f"and cue {n} ends."
        cues.append(f"{n}\n00:00:{n:02},000 --> 00:00:{n:02},900\n{said}\n")
    chunks = cut("a.srt", "\n".join(cues), size=30)
    assert len(chunks) > 2
    assert all(chunk.text.endswith("ends.") for chunk in chunks[:-1])
    assert all(chunk.text.split("\n")[0].isdigit() for chunk in chunks)


@pytest.mark.parametrize("text", ["", "WEBVTT\n", "1\n00:00:01,000 --> 00:00:02,000\n\n" * 500])
def test_subtitles_without_speech(text: str) -> None:
    with pytest.raises(NotTextError, match=r"no text|empty"):
        read_document("a.srt", text.encode())


def test_subtitles_without_cues() -> None:
    text = "no cues at all\n" * 9
    chunks = cut("a.srt", text, size=30)
    assert all(chunk.embedded.strip() and chunk.tokens <= 30 for chunk in chunks)
    assert sum(len(chunk.text.split()) for chunk in chunks) == len(text.split())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.MD", "markdown"), ("a.adoc", "asciidoc"), ("a.tex", "latex"), ("a.org", "org"), ("git.1", "man"),
        ("a.tsv", "csv"), ("a.json", "json"), ("a.ndjson", "jsonl"), ("a.yml", "yaml"), ("a.toml", "toml"),
        ("a.cfg", "ini"), ("a.xml", "xml"), ("a.vtt", "subtitles"), ("a.rs", "code"), ("LICENSE", "text"),
        ("a.docx", "docx"), ("a.pptx", "pptx"), ("a.epub", "epub"), ("a.ipynb", "notebook"), ("a.eml", "email"),
        ("a.mbox", "mailbox"),
    ],
)  # fmt: skip
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind
    assert not unread_format(name)
    assert byte_limit(name) >= 2**24


def test_index_of_every_format(tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    """Real files, real Chroma; encodings, line ends, null bytes, a line of a million characters, too large a file."""
    docs = tmp_path / "docs"
    docs.mkdir()
    texts = {
        "a.adoc": ASCIIDOC, "a.tex": LATEX, "a.org": ORG, "tool.1": MAN, "a.toml": TOML, "a.srt": SRT, "a.vtt": VTT,
        "a.csv": "name,port\nhost,80\n", "a.json": '{"host": 80}', "a.jsonl": '{"host": 80}\n', "a.yml": "host: 80\n",
        "a.ini": "[host]\nport = 80\n", "a.xml": "<host>80</host>", "a.go": "func main() {\n\tx()\n}\n", "a.md": "# host",
    }  # fmt: skip
    for name, text in texts.items():
        (docs / name).write_bytes(text.replace("\n", "\r\n").encode())
    (docs / "latin.txt").write_bytes("Größe und Äpfel".encode("latin-1"))
    (docs / "wide.txt").write_bytes("wide text".encode("utf-16"))
    (docs / "null.txt").write_bytes(b"text\0and more")
    (docs / "line.txt").write_bytes(b"word " * 4_000)
    with (docs / "dump.csv").open("wb") as file:
        file.truncate(100 * 2**20)
    with ChromaIndexer(tmp_path / "index", encoder=tiny_encoder) as indexer:
        report = indexer.index([docs])
        hits = indexer.query("host", k=1000, mode="dense", collapse=False)
        assert [hit.path for hit in indexer.query("main", k=3, filters=SearchFilters(where=("lang=go",)))] == ["a.go"]
    assert {file.path: file.reason for file in report.skipped} == {
        "dump.csv": "larger than 16 MiB",
        "null.txt": "not text: it has null bytes",
    }
    assert {hit.path for hit in hits} == {*texts, "latin.txt", "wide.txt", "line.txt"}
    assert {hit.kind for hit in hits} >= {"asciidoc", "latex", "org", "man", "toml", "subtitles", "csv", "code", "text"}
    for hit in hits:
        lines = split_lines(decode((docs / hit.path).read_bytes()))
        assert hit.first_line is not None
        assert hit.last_line is not None
        assert hit.text in "\n".join(lines[hit.first_line - 1 : hit.last_line])
