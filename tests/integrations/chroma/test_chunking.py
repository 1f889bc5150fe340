"""Chunks: lines, heading paths, token limit, overlap."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import count, pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag import EpicEncoder
from epic_rag_chroma.chunking import Chunk, chunk_document
from epic_rag_chroma.reading.code import read_code
from epic_rag_chroma.reading.document import Document, clean_title, split_lines
from epic_rag_chroma.reading.markdown import read_markdown
from epic_rag_chroma.reading.text import read_rst, read_text


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def cut(document: Document, size: int = 50, overlap: int = 0) -> list[Chunk]:
    return chunk_document(document, max_tokens=size, overlap=overlap, count_tokens=count_words)


def markdown(text: str, size: int = 50, overlap: int = 0) -> list[Chunk]:
    return cut(read_markdown(split_lines(text)), size, overlap)


def places(chunks: list[Chunk]) -> list[tuple[tuple[str, ...], int | None, int | None]]:
    return [(chunk.heading_path, chunk.first_line, chunk.last_line) for chunk in chunks]


def test_markdown_headings() -> None:
    text = "intro\n\n# A\n\nof a\n\n## B\n\nof b\n\n### C\n\nof c\n\n## D\n\nof d\n\n# E\n\nof e\n"
    assert places(markdown(text)) == [
        ((), 1, 1),
        (("A",), 3, 5),
        (("A", "B"), 7, 9),
        (("A", "B", "C"), 11, 13),
        (("A", "D"), 15, 17),
        (("E",), 19, 21),
    ]


def test_heading_without_text() -> None:
    chunks = markdown("# A\n\n## B\n\ntext\n\n# Last\n")
    assert places(chunks) == [(("A", "B"), 1, 5), (("Last",), 7, 7)]
    assert chunks[0].text == "# A\n\n## B\n\ntext"


@pytest.mark.parametrize("fence", ["```", "~~~", "````"])
def test_hash_in_a_code_fence(fence: str) -> None:
    inner = "```\n# inner\n```\n" if fence == "````" else "# inner\n"
    chunks = markdown(f"# A\n\n{fence}sh\n{inner}{fence}\n\nafter\n")
    assert {chunk.heading_path for chunk in chunks} == {("A",)}


def test_underlined_titles_and_indented_hashes() -> None:
    assert places(markdown("Title\n=====\n\none\n\nSub\n---\n\n    # code\n")) == [
        (("Title",), 1, 4),
        (("Title", "Sub"), 6, 9),
    ]


def test_front_matter() -> None:
    chunks = markdown('---\ntitle: "My page"\ntags: x\n---\n\ntext\n\n## Sub\n\nmore\n')
    assert places(chunks) == [(("My page",), 6, 6), (("My page", "Sub"), 8, 10)]
    assert places(markdown("---\ntitle: Same\n---\n# Same\n\ntext\n"))[-1] == (("Same",), 4, 6)
    assert places(markdown("---\n\nno front matter\n")) == [((), 1, 3)]


def test_code_block() -> None:
    code = "```\n" + "".join(f"line {n} of code\n" for n in range(8)) + "```"
    prose = "\n\n".join("Some words that make a paragraph of ten words or so." for _ in range(3))
    chunks = markdown(f"# A\n\n{prose}\n\n{code}\n\n{prose}\n", size=60)
    assert len(chunks) > 1
    assert any(code in chunk.text for chunk in chunks)


def test_lists() -> None:
    text = "\n".join(f"- item {n} goes on\n  on a second line" for n in range(12))
    assert all(chunk.text.startswith("- item") for chunk in markdown(text, size=20))


def test_rst_titles() -> None:
    text = "=====\nTitle\n=====\n\nintro\n\nPart\n----\n\ntext::\n\n    not\n    ---\n\nSub\n~~~\n\nmore\n\nOther\n-----\n\nend\n"
    assert places(cut(read_rst(split_lines(text)))) == [
        (("Title",), 1, 5),
        (("Title", "Part"), 7, 13),
        (("Title", "Part", "Sub"), 15, 18),
        (("Title", "Other"), 20, 23),
    ]


def test_code_by_indentation() -> None:
    text = "\n\n".join(f"def f{n}(x):\n    y = x + {n}\n\n    return y" for n in range(6))
    chunks = cut(read_code(split_lines(text), ""), size=16)
    assert len(chunks) > 2
    assert all(chunk.text.startswith("def f") for chunk in chunks)


def test_embedded_and_stored_text() -> None:
    long = "\n\n".join(f"Paragraph {n} with some ten words in it, no more." for n in range(8))
    first, *rest = markdown(f"# A\n\n## B\n\n{long}\n", size=40)
    assert first.text.startswith("# A\n\n## B")
    assert rest
    for chunk in rest:
        assert chunk.embedded == f"A > B\n\n{chunk.text}"
    assert markdown("# A\n\ntext\n")[0].embedded == "# A\n\ntext"


def test_long_headings() -> None:
    chunks = markdown("# " + "word " * 40 + "\n\n## B\n\n" + "text here. " * 60, size=20)
    assert max(chunk.tokens for chunk in chunks) <= 20
    assert chunks[-1].embedded.startswith("B\n\n")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["", "# ", "- ", "    ", "| "])), max_size=40),
    st.integers(4, 40),
    st.integers(0, 12),
    st.sampled_from([read_text, read_markdown, read_rst]),
    st.booleans(),
)
def test_no_chunk_is_inside_another(
    lines: list[tuple[int, str]], size: int, overlap: int, read: Callable[[list[str]], Document], joined_costs: bool
) -> None:
    """Every word is there once, so that a chunk whose text is in another one's is inside it."""
    numbers = count(1)
    text = "\n".join(start + " ".join(f"w{next(numbers):04}" for _ in range(words)) for words, start in lines)

    def tokens(texts: Sequence[str]) -> list[int]:
        # Some tokenizers need more tokens for lines together than for each alone; such groups are halved.
        return [len(text.split()) + (text.strip().count("\n") if joined_costs else 0) for text in texts]

    chunks = chunk_document(
        read(split_lines(text)), max_tokens=size, overlap=min(overlap, size - 1), count_tokens=tokens
    )
    texts = [chunk.text for chunk in chunks if "w" in chunk.text]
    assert [(a, b) for a, b in permutations(texts, 2) if a in b] == []
    assert set(re.findall(r"w\d+", " ".join(texts))) == set(re.findall(r"w\d+", text))
    firsts = [chunk.first_line or 0 for chunk in chunks]
    assert firsts == sorted(firsts)


def test_overlap_alone_is_no_chunk() -> None:
    """The second line fits into the overlap, but not together with the third one."""
    text = "\n".join([" ".join(["first"] * 30), "see below:", " ".join(["third"] * 35)])
    chunks = cut(read_text(split_lines(text)), size=36, overlap=8)
    assert places(chunks) == [((), 1, 2), ((), 3, 3)]


def test_overlap() -> None:
    text = "\n".join(f"line {n} has six words here." for n in range(30))
    with_overlap, without = (cut(read_text(split_lines(text)), 36, overlap) for overlap in (8, 0))
    pairs = list(pairwise(with_overlap))
    assert pairs
    assert all(right.first_line <= left.last_line for left, right in pairs)  # type: ignore[operator]
    assert all(
        right.first_line == left.last_line + 1  # type: ignore[operator]
        for left, right in pairwise(without)
    )


def test_long_line() -> None:
    sentences = [f"Sentence number {n} is about eight words long." for n in range(20)]
    chunks = markdown("# A\n\n" + " ".join(sentences) + "\n", size=40)
    assert len(chunks) > 3
    assert all(chunk.text.endswith("long.") for chunk in chunks)
    assert chunks[0].text.startswith("# A\n\nSentence number 0")
    assert {(chunk.first_line, chunk.last_line) for chunk in chunks[1:]} == {(3, 3)}


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["word", "Two words", "x" * 30, "\u732b" * 9, "a,b;c", " ", "  ", ". ", "! ", "\u3002", ", ", "? No", "\t"]
        ),
        max_size=40,
    ).map("".join),
    st.integers(1, 12),
    st.booleans(),
)
def test_a_long_line_is_divided_as_llama_index_divides_it(text: str, size: int, by_characters: bool) -> None:
    """Chunks of earlier releases were made by `SentenceSplitter`: unchanged text must keep its chunks."""
    from llama_index.core.node_parser import SentenceSplitter

    from epic_rag_chroma import chunking

    def tokens(texts: Sequence[str]) -> list[int]:
        if by_characters:
            return [sum(not character.isspace() for character in each) for each in texts]
        return [sum(-(-len(word) // 5) for word in each.split()) for each in texts]

    splitter = SentenceSplitter(
        chunk_size=size,
        chunk_overlap=0,
        tokenizer=lambda part: range(tokens([part])[0]),
        chunking_tokenizer_fn=chunking._split_sentences,
    )
    try:
        expected = [part for part in splitter.split_text(text) if part] or [text]
    except ValueError:  # a single character has more tokens than a part may have
        expected = [text]
    spans = chunking._sentences(text, size, tokens)
    assert [text[start:end] for start, end in spans] == expected
    assert all(left <= right for (_, left), (right, _) in pairwise(spans))


@pytest.mark.parametrize("text", ["x" * 50_000, "猫" * 3_000, "ab " * 20_000, "\U0001f600" * 2_000, "a.b," * 5_000])
def test_hostile_lines_take_linear_time(text: str, tiny_encoder: EpicEncoder) -> None:
    document = read_text([text])
    chunks = chunk_document(document, max_tokens=100, overlap=10, count_tokens=tiny_encoder.count_tokens)
    assert max(tiny_encoder.count_tokens([chunk.embedded for chunk in chunks])) <= 100
    assert sum(len(chunk.text) for chunk in chunks) >= len(text.replace(" ", ""))


@pytest.mark.parametrize(
    ("title", "clean"),
    [
        ("Use `git push` **now**", "Use git push now"),
        ("See [the docs](http://x) {#anchor}", "See the docs"),
        ("a > b", "a / b"),
        ("snake_case and *stars*", "snake_case and stars"),
        ("<b>Bold</b> ¶", "Bold"),
        ("x " * 300, ("x " * 100).strip()),
    ],
)
def test_clean_title(title: str, clean: str) -> None:
    assert clean_title(title) == clean
