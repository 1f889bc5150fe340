"""What is embedded and searched of each text format: what a person reads, without escapes, markup and encoded data."""

from __future__ import annotations

import base64
import json
import random
import string
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag_chroma.chunking import Chunk, chunk_document
from epic_rag_chroma.reading.document import INVISIBLE, Document, NotTextError, substituted
from epic_rag_chroma.reading.reader import read_document


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def chunks_of(name: str, data: str | bytes, size: int = 60) -> list[Chunk]:
    document = read_document(name, data.encode() if isinstance(data, str) else data)
    return chunk_document(document, max_tokens=size, overlap=0, count_tokens=count_words)


def words(name: str, data: str | bytes) -> str:
    return " ".join("\n".join(chunk.words for chunk in chunks_of(name, data)).split())


RANDOM = random.Random(0)
PICTURE = base64.b64encode(RANDOM.randbytes(3000)).decode()
HEX = RANDOM.randbytes(200).hex()


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        # JSON, and the like
        ("a.json", r'{"a": "one\ntwo\tthree", "b": "\u00c5ngstr\u00f6m \ud83d\ude00 \\n \"x\" a\/b"}',
         r'{"a": "one two three", "b": "Ångström 😀 \n "x" a/b"}'),
        ("a.jsonl", r'{"n": "Pr\u00e4zision"}' + "\n", '{"n": "Präzision"}'),
        ("a.geojson", r'{"name": "S\u00e3o Paulo"}', '{"name": "São Paulo"}'),
        ("a.json", r'{"broken": "\ud83d and \u12"}', r'{"broken": " and \u12"}'),
        ("a.yaml", r'k: "Z\xfcrich \u2014 \U0001F600"', "k: \"Zürich — 😀\""),
        ("a.yaml", "k: 'it''s'\np: C:\\new\\table\nq: \"a\\tb\" # \"c\\td\"", "k: 'it's' p: C:\\new\\table q: \"a b\" # \"c d\""),
        ("a.toml", r'name = "Stra\u00dfe"' + "\nraw = 'C:\\new'", "name = \"Straße\" raw = 'C:\\new'"),
        ("a.properties", "menu.k\\u00e4se=Gruy\\u00e8re\\:\\ alt\n# \\u00fcber", "menu.käse=Gruyère: alt # über"),
        ("a.po", '#: src/a.c:12\nmsgid "Open\\nfile"\nmsgstr "\\"Datei\\"\\n\\303"', 'msgid "Open file" msgstr ""Datei" \\303"'),
        ("a.xml", "<a>caf&#xE9; &amp; bar&nbsp;1</a>", "<a>café & bar 1</a>"),
        # Source code
        ("a.py", 'print("Usage:\\nzebra\\n")', 'print("Usage: zebra\\n")'),
        ("a.py", 're.compile(r"\\nabla")  # C:\\new', 're.compile(r"\\nabla")  # C:\\new'.replace("  ", " ")),
        ("a.js", "t = 'Gr\\u00fc\\u00dfe\\x21' + `a\\tb\\u{e9}`", "t = 'Grüße\\x21' + `a bé`"),
        ("a.c", 'puts("one\\n\\ntwo %d\\n");', 'puts("one two %d\\n");'),
        # Markdown
        ("a.md", "Cr&egrave;me &lt;b&gt; snake\\_case `a&amp;b\\_` \\*x\\*", "Crème <b> snake_case a&amp;b\\_ *x*"),
        ("a.md", "**Very** important, __so__ `x**y**z` and 2**3**4", "Very important, so x**y**z and 234"),
        ("a.md", "See [the *guide*](guide.md#top), [us](https://a.org/b) and ![a cat](cat.png \"Cat\").", "See the *guide*, [us](https://a.org/b) and a cat."),
        ("a.md", "``a ` b`` and \\`c` d", "a ` b and \\c d"),
        ("a.md", "<details><summary>More</summary>\n\nText<br>here <kbd>Ctrl</kbd><!-- no -->\n\n</details>", "More Text here Ctrl"),
        ("a.md", '<p align="center"><img src="a.png" alt="A pump"></p>\n\nx', "A pump x"),
        ("a.md", "Use Vec<String> or <T>.", "Use Vec<String> or <T>."),
        ("a.md", "    <div>&eacute;</div>\n\n```html\n<br>\n```", "<div>&eacute;</div> <br>"),
        ("a.md", "a\n{: .note #x}\n\n{% raw %}b{% endraw %} {{< figure src=\"x\" caption=\"Cat\" >}}", "a b Cat"),
        ("a.md", "Title\n=====\n\n| a | b |\n|:--|--:|\n| c | d |", "Title a b c d"),
        ("a.md", "| a | b\\|c | `d` |\n|---|---|---|\n| 1 | | 3 |\n\na | b", "a b|c d 1 3 a | b"),
        ("a.md", "> ~~~sh\n> make | tail\n> ~~~\n\n```\nopen", "> make | tail open"),
        ("a.mdx", "import X from './x'\n\nexport const a = {\n  b: 1,\n}\n\n<X.Y id={1}>\nHello {/* no */}\n</X.Y>", "Hello"),
        ("a.mdx", '<Tab label="macOS"><T>x</T></Tab>', "macOSx"),
        ("a.md", "import Tabs from '@theme/Tabs';\nimport {\n  A,\n} from \"b\";\n\nText.\n\n<Tabs>\n", "Text."),
        ("a.md", "import pandas from the shelf.", "import pandas from the shelf."),
        # reStructuredText
        ("a.rst", ".. currentmodule:: os\n.. index::\n   single: x\n.. _label:\n\nTitle\n=====\n\n.. comment\n   more\n\nText [1]_.\n\n.. [1] note",
         "Title Text [1]_. .. [1] note"),
        ("a.rst", ".. toctree::\n   :maxdepth: 2\n\n   one\n   two\n\n.. only:: html\n\n   Shown.\n\n.. note:: Mind.\n   :class: x\n\n.. |a| replace:: b",
         "Shown. .. note:: Mind."),
        ("a.rst", ".. py:function:: spam(eggs)\n   :module: m\n\n   Cook.\n\n.. image:: a.png\n   :alt: A cat\n", "spam(eggs) Cook. :alt: A cat"),
        ("a.rst", "+---+---+\n| a | b |\n+===+===+\n| c | d |\n+---+---+", "| a | b | | c | d |"),
        ("a.rst", "x::\n\n   .. toctree::\n\n.. code-block:: c\n   :linenos:\n\n   .. _a: b", "x:: .. toctree:: .. _a: b"),
        # TeX
        ("a.tex", r"Erd\H{o}s, G\"{o}del, \v{S}koda, \c Ca, \O{}re, \'{\i}, Stra{\ss}e, co\-op, a~b, 5\% % no", "Erdős, Gödel, Škoda, Ça, Øre, í, Straße, coop, a b, 5%"),
        ("a.tex", "\\begin{verbatim}\n\\'e % yes\n\\end{verbatim}", "\\begin{verbatim} \\'e % yes \\end{verbatim}"),
        ("a.bib", '@book{k,\n title = {The {B}anach {\\L}ojasiewicz 50% {NP}},\n author = "M\\"uller"\n}', '@book{k, title = {The Banach Łojasiewicz 50% {NP}}, author = "Müller" }'),
        # Manual pages, AsciiDoc, captions
        ("a.1", ".TH X 1\n.\\\" no\n\\fBgit\\-log\\fR [\\fIpath\\fP] \\(lqx\\(rq na\\[u00EF]ve", ".TH X 1 git-log [path] “x” naïve"),
        ("a.adoc", "[[anchor]]\n== Caf&eacute;\n// no\nText", "== Café Text"),
        ("a.vtt", "WEBVTT\n\n00:01.000 --> 00:02.000\n<v Ann Lee><b>Hi</b> <00:01.500><c.x>you</c>\n\n00:02.000 --> 00:03.000\nAnn Lee: Hi you\nthere &amp; {\\an8}now",
         "Ann Lee: Hi you there & now"),
        ("a.ass", "[Script Info]\nTitle: x\n[Events]\nDialogue: 0,0:00:01.00,0:00:02.00,D,,0,0,0,,One\\Ntwo, {\\i1}three", "One two, three"),
        ("a.lrc", "[00:12.00]First\n[00:14.00]Second", "First Second"),
        # Characters that nobody sees, in any format
        ("a.txt", "sep\u00adarate kilo\u200bmetre \u202aleft\u202c \ufeffmark joi\u2060ned", "separate kilometre left mark joined"),
        ("a.csv", "na\u00adme,b\n1,2", "name,b 1,2"),
        ("a.html", "<p>su&shy;per&#8203;cali <b>fra</b><wbr>gil", "supercali fragil"),
        # Encoded data
        ("a.md", f"![x](data:image/png;base64,{PICTURE}) after", "![x](data:image/png;base64,…) after"),
        ("a.md", f"[i]: <data:image/svg+xml;charset=utf-8;base64,{PICTURE}>\n\nx", "[i]: <data:image/svg+xml;charset=utf-8;base64,…> x"),
        ("a.css", f'a {{ b: url("data:font/woff;base64,{PICTURE}") }}\nc {{ d: e }}', 'a { b: url("data:font/woff;base64,…") } c { d: e }'),
        ("a.css", 'a { b: url("data:image/svg+xml,' + "%3Csvg viewBox='0 0 1 1'%3E" * 9 + '") }', 'a { b: url("data:image/svg+xml,…") }'),
        ("a.json", json.dumps({"pic": f"data:image/gif;base64,{PICTURE}", "note": "ok"}), '{"pic": "data:image/gif;base64,…", "note": "ok"}'),
        ("a.yaml", f"cert: |\n  {PICTURE[:64]}\n  {PICTURE[64:128]}\n  {PICTURE[128:192]}\n  {PICTURE[192:210]}==\nname: x", "cert: | … name: x"),
        ("a.txt", f"-----BEGIN CERTIFICATE-----\n{PICTURE[:64]}\n{PICTURE[64:90]}\n-----END CERTIFICATE-----\nafter", "-----BEGIN CERTIFICATE----- … after"),
        ("a.txt", f"token {PICTURE[:300].replace('/', '_')} end {HEX} end", "token … end … end"),
        ("a.txt", "begin 644 a.bin\n#0V%T\n`\nend\nafter", "begin 644 a.bin … after"),
        ("a.html", f"<p>before {PICTURE} after<img src='data:image/png;base64,{PICTURE}'>", "before … after"),
        ("a.txt", "/".join(["usr", "share", "local", "documents"] * 12), "/".join(["usr", "share", "local", "documents"] * 12)),
        ("a.txt", "a" * 300 + " " + "=" * 300, "a" * 300 + " " + "=" * 300),
        # Pictures in SVG
        ("a.svg", "<svg><title>Flow</title><style>a{}</style><defs><path id='x'/></defs><desc>How\nit runs</desc>"
         "<text x='1' y='2'>Pu<tspan>mp</tspan></text><text x='9' y='2'>on</text><text y='5'>a<tspan x='1' dy='9'>b</tspan> &amp;</text></svg>",
         "Flow How it runs Pump on a b &"),
    ],
)  # fmt: skip
def test_words(name: str, data: str, expected: str) -> None:
    assert words(name, data) == expected


def test_the_shown_text_stays_the_files() -> None:
    text = 'Caf&eacute; <b>x</b> <!-- c -->\n\n{"a"}'
    chunk = chunks_of("a.md", text)[0]
    assert (chunk.text, chunk.words) == (text, 'Café x \n\n{"a"}')
    assert chunk.embedded == chunk.words


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.md", "---\ntitle: x\n---\n", "front matter"),
        ("a.svg", "<svg><path d='M0 0h9'/></svg>", "a picture without text"),
        ("a.md", "<!-- nothing -->\n", "no text"),
        ("a.rst", ".. toctree::\n\n   a\n", "no text"),
        ("a.txt", " \n\t\n", "empty"),
        ("a.py", b"", "empty"),
        ("a.html", "<script>x()</script>", "no text"),
        (
            "a.pem",
            f"-----BEGIN RSA PRIVATE KEY-----\n{PICTURE[:64]}\n{PICTURE[64:90]}\n-----END RSA PRIVATE KEY-----\n",
            "encoded data",
        ),
        ("a.txt", f"{PICTURE[:76]}\n{PICTURE[76:152]}\n{PICTURE[152:228]}\n{PICTURE[228:240]}\n", "encoded data"),
        ("a.txt", f"data:image/png;base64,{PICTURE}\n", "encoded data"),
    ],
)
def test_nothing_to_read(name: str, data: str | bytes, reason: str) -> None:
    with pytest.raises(NotTextError, match=reason):
        read_document(name, data.encode() if isinstance(data, str) else data)


def test_named_files_are_read_as_text() -> None:
    picture = b"<svg><path d='M0 0h9'/></svg>"
    assert read_document("a.svg", picture, named=True).lines == [picture.decode()]
    assert read_document("a.md", b"---\ntitle: x\n---\n", named=True).lines[1] == "title: x"
    key = f"-----BEGIN PUBLIC KEY-----\n{PICTURE[:64]}\n-----END PUBLIC KEY-----".split("\n")
    assert read_document("a.pem", "\n".join(key).encode(), named=True).lines == key
    with pytest.raises(NotTextError, match="empty"):
        read_document("a.svg", b" ", named=True)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=30), max_size=5),
    st.booleans(),
)
def test_json_is_decoded(texts: list[str], ascii_only: bool) -> None:
    data = json.dumps(texts, ensure_ascii=ascii_only, indent=1)
    document = read_document("a.json", data.encode())
    lines = [substituted(line, document.substitutions.get(n, ())) for n, line in enumerate(document.lines)]
    expected = [
        "".join(c if c.isprintable() or not ascii_only else " " for c in INVISIBLE.sub("", text)) for text in texts
    ]
    assert [line.strip().removesuffix(",")[1:-1] for line in lines[1 : 1 + len(texts)]] == expected
    assert "\n".join(document.lines) == data


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_slices_of_a_line_join_to_the_whole(data: st.DataObject) -> None:
    """A long line is cut anywhere; each substitution counts once."""
    line = data.draw(st.text(string.ascii_letters, min_size=1, max_size=40))
    places = sorted(data.draw(st.sets(st.integers(0, len(line)), max_size=8)))
    some = tuple(
        (first, last, data.draw(st.sampled_from(["", "X", "YZ"])))
        for first, last in zip(places[::2], places[1::2], strict=False)
    )
    cuts = [0, *sorted(data.draw(st.sets(st.integers(0, len(line)), max_size=5))), len(line)]
    parts = [substituted(line, some, first, last) for first, last in pairwise(cuts)]
    assert "".join(parts) == substituted(line, some)


PIECES = ["word", "<b>", "</b>", "&eacute;", "`", "``", "<!--", "-->", "\\_", "{#id}", "{/*", "*/}", "# ", "- ", "\n", "\n\n", "<Tab a='x'>", "```\n", "|", "---\n", "import a from 'b'\n", "\u00ad", "data:image/png;base64," + "Ab1" * 20]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=25),
    st.sampled_from(["a.md", "a.mdx", "a.rst", "a.tex", "a.1", "a.vtt", "a.adoc", "a.svg", "a.txt"]),
)
def test_any_markup(pieces: list[str], name: str) -> None:
    """Substitutions are in order, disjoint and inside their lines; lines stay those of the file."""
    text = " ".join(pieces)
    try:
        document = read_document(name, text.encode())
    except NotTextError:
        return
    if document.spans is None:
        assert len(document.lines) == text.count("\n") + 1
    for number, some in document.substitutions.items():
        position = 0
        for first, last, _ in some:
            assert position <= first <= last <= len(document.lines[number])
            position = last
    for chunk in chunk_document(document, max_tokens=12, overlap=2, count_tokens=count_words):
        assert chunk.words.strip()


def test_documents_inside_documents_keep_their_substitutions() -> None:
    cells = [
        {
            "cell_type": "markdown",
            "source": ["## Caf&eacute; {#x}\n", f"![p](data:image/png;base64,{PICTURE})\n", "snake\\_case"],
        }
    ]
    document: Document = read_document("a.ipynb", json.dumps({"cells": cells}).encode())
    assert [substituted(line, document.substitutions.get(n, ())) for n, line in enumerate(document.lines)] == [
        "## Café", "![p](data:image/png;base64,…)", "snake_case"
    ]  # fmt: skip
