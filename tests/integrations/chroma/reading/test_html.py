"""HTML: what a browser shows, whatever the markup is like; lines of the source; tables and headings."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag_chroma.reading.document import Document, NotTextError
from epic_rag_chroma.reading.reader import read_document


def read(html: str, name: str = "a.html") -> Document:
    return read_document(name, html.encode())


def text(html: str, name: str = "a.html") -> str:
    return "\n".join(line for line in read(html, name).lines if line)


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        # Omitted and misplaced tags
        ("<title>T</title><p>one<p>two", "one\ntwo"),
        ("<html><head><meta charset=utf-8><p>one", "one"),
        ("<html><head><style>a{}</style><h1>one</h1>two", "one\ntwo"),
        ("one<body>two</body>three</html>four", "onetwothreefour"),
        ("<body><p>one</body></html><html><body><p>two", "one\ntwo"),
        ("<ul><li>one<li>two<ul><li>three</ul></ul>", "- one\n- two\n- three"),
        ("<dl><dt>one<dd>two<dt>three</dl>", "one\ntwo\nthree"),
        ("<table><tr><td>one<td>two<tr><td>three</table>", "one | two\nthree"),
        ("<table><caption>C</caption>stray<tr><th>one</table>", "stray\nC\none"),
        ("<select><option>no</select>one", "one"),
        ("<p>one<h2>two</h2>three", "one\ntwo\nthree"),
        ("<b>one<p>two</b>three", "one\ntwothree"),
        ("<div>" * 4000 + "deep", "deep"),
        ("one <!-- no --!> two <!-- no --> three", "one two three"),
        ("one<![if !IE]> two<![endif]> <!--[if IE]>no<![endif]-->three<?php no ?>", "one two three"),
        ("one</ p> two</> three<!no>", "one two three"),
        ("a < b, c <3 d &lt; e &amp;lt; &notit;", "a < b, c <3 d < e &lt; ¬it;"),
        ("<textarea>one <b></textarea>", "one <b>"),
        # What is not shown
        ("<script>if (a < b) no()</script><noscript>no</noscript><template>no</template>one", "one"),
        ("<nav>no</nav><div role=navigation>no</div><p hidden>no</p>one", "one"),
        ("<p hidden=until-found>one</p><div role=tabpanel hidden>two</div>", "one\ntwo"),
        ("<div><template shadowrootmode=open><p>one</p></template></div>", "one"),
        ("<svg><title>no</title><text>one</text><style>no</style></svg>", "one"),
        ("<math><mi>x</mi><annotation>no</annotation></math>", "x"),
        # Words and blocks
        ("super<b>cali</b><wbr>fragil<i>istic</i>", "supercalifragilistic"),
        ("<button>OK</button><button>Cancel</button>", "OK Cancel"),
        ("<ruby>東<rp>(</rp><rt>とう</rt><rp>)</rp>京<rt>きょう</rt></ruby>へ", "東京 (とうきょう)へ"),
        ("one<br>two", "one\ntwo"),
        ("<pre>\n  one\n   two</pre>", "  one\n   two"),
        # Main part
        ("<nav>no</nav><article>one</article><article>two</article>", "one\ntwo"),
        ("<aside><article>ad</article></aside><p>one", "ad\none"),
        ("<main>one</main><main>two</main>", "one\ntwo"),
        ("<header>head</header><main>one and more words of it</main><footer>foot</footer>", "one and more words of it"),
        ("<main>one</main><section>two and many more words than the other</section>", "one\ntwo and many more words than the other"),
        ("<h1>Title</h1><p>intro</p><article>one</article>", "Title\nintro\none"),
    ],
)  # fmt: skip
def test_text(html: str, expected: str) -> None:
    assert text(html) == expected


def test_xhtml() -> None:
    page = (
        '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml">\n'
        '<head><title/><script src="x"/></head>\n<body><a id="top"/><h1>One</h1><p/>two<![CDATA[ < three]]></body></html>'
    )
    assert text(page, "a.xhtml") == "One\ntwo < three"
    assert (read(page, "a.xhtml").spans or [])[-1] == (5, 5)


@pytest.mark.parametrize(
    ("html", "titles"),
    [
        ("<h1>A <a class=headerlink href='#a'>¶</a></h1><h2>B<a href='#b'><svg/></a></h2><h3>C#</h3>x", ["A", "B", "C#"]),
        ("<h2>std::<wbr><a>vec</a>::<b>Vec</b>&lt;T></h2><h3><code>&lt;select></code></h3>x", ["T", "std::vec::Vec<T>", "<select>"]),
        ("<h2>one<br>two</h2><h2><div>a</div><div>b</div></h2><h2>a &gt; b</h2>x", ["T", "one two", "a b", "a / b"]),
        ("<h2>soft&shy;ware</h2>x", ["T", "software"]),
        ("<h2> </h2>x", ["T"]),
    ],
)  # fmt: skip
def test_headings(html: str, titles: list[str]) -> None:
    assert [heading.title for heading in read(f"<title>T</title>{html}").headings] == titles


def test_merged_cells_count_for_each_row_and_column() -> None:
    html = """<table>
<tr><th>Zone<th>Weight<th colspan=2>Price</tr>
<tr><td rowspan=2><p>North</p></td><td>10 kg</td><td>15</td><td>EUR</td></tr>
<tr><td>28 kg</td><td rowspan="2">42</td><td>EUR</td></tr>
<tr><td>West</td><td><ul><li>5 kg</ul></td><td>USD</td></tr>
<tr><td colspan=4>All prices net</td></tr>
</table>"""
    document = read(html)
    assert document.lines == [
        "Zone | Weight | Price | Price", "North | 10 kg | 15 | EUR", "North | 28 kg | 42 | EUR", "West | 5 kg | 42 | USD",
        "All prices net",
    ]  # fmt: skip
    assert document.spans == [(2, 2), (3, 3), (3, 4), (4, 5), (6, 6)]
    assert document.repeated_headers[0].text == document.lines[0]


@pytest.mark.parametrize("span", ["0", "-1", "x", "99999999", "", "65534"])
def test_odd_spans(span: str) -> None:
    lines = read(f"<table><tr><td rowspan={span}>a<td>b<tr><td>c</table>").lines
    assert {word for line in lines for word in line.split(" | ")} == {"a", "b", "c"}


def test_tables_of_layout() -> None:
    html = f"<table><tr><td><h1>Title</h1><p>one</p></td><td>{'long ' * 100}</td></tr></table>"
    document = read(html)
    assert [heading.title for heading in document.headings] == ["Title"]
    assert document.lines[:3] == ["Title", "", "one"]


@pytest.mark.parametrize(
    ("label", "codec"),
    [("iso-8859-1", "cp1252"), ("us-ascii", "cp1252"), ("x-sjis", "cp932"), ("windows-31j", "cp932"), ("gb2312", "gb18030"),
     ("ks_c_5601-1987", "cp949"), ("big5", "big5hkscs"), ("iso-8859-9", "cp1254"), ("tis-620", "cp874"), ("logical", "iso8859_8"),
     ("x-cp1251", "cp1251"), ("koi8-ru", "koi8_u")],
)  # fmt: skip
@pytest.mark.parametrize(
    "meta", ["<meta charset={}>", "<meta http-equiv=Content-Type content='text/html; charset={}'>"]
)
def test_charset_labels(label: str, codec: str, meta: str) -> None:
    sample = {"cp1252": "€ “x” – é", "cp932": "髙橋①", "gb18030": "镕喆€", "cp949": "똠방각하", "big5hkscs": "嘅咗", "cp1254": "ığ – €",
              "cp874": "ไทย…", "iso8859_8": "שלום", "cp1251": "Привет – мир", "koi8_u": "їжак"}[codec]  # fmt: skip
    data = f"{meta.format(label)}<p>x {sample}".encode(codec)
    assert read_document("a.html", data).lines == [f"x {sample}"]


INLINE = ["<b>", "</b>", "<a href='#x'>", "</a>", "<i>", "<span>", "</span>", "<!-- c -->", "<br>"]
BLOCKS = ["<p>", "</p>", "<div>", "</div>", "<ul>", "<li>", "</ul>", "<table>", "<tr>", "<td>", "</table>", "<h2>", "</h2>", "<pre>", "</pre>", "<code\n id=x>", "<section\n class='x'>", "</section>", "<body>", "</html>", "<blockquote>"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 99), st.sampled_from([*INLINE, *BLOCKS, "\n"])), max_size=40))
def test_lines_of_words(parts: list[int | str]) -> None:
    """All words are read, each from its source line."""
    number = 0
    source = []
    for part in parts:
        if isinstance(part, int):
            number += 1
            source.append(f" w{number}x ")
        else:
            source.append(part)
    html = "".join(source)
    try:
        document = read(html)
    except NotTextError:
        assert number == 0
        return
    found = re.findall(r"w\d+x", " ".join(document.lines))
    assert sorted(set(found)) == sorted(f"w{n}x" for n in range(1, number + 1))
    of_file = html.split("\n")
    assert document.spans is not None
    for line, (first, last) in zip(document.lines, document.spans, strict=True):
        for word in re.findall(r"w\d+x", line):
            assert word in "\n".join(of_file[first - 1 : last])
