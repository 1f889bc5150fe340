"""PDF: reading order, hyphenated words, doubled letters, forms, comments, encryption, pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag_chroma.reading.document import BrokenFileError
from epic_rag_chroma.reading.reader import read_document
from tests.helpers.pdf_files import Placed, encrypted_pdf, placed_pdf

LEFT = [
    "The lighthouse keeper wrote",
    "the weather into the book",
    "every evening, and lit the",
    "lamp before the sun set.",
]
RIGHT = [
    "Ships that passed at night",
    "were counted by the clerk,",
    "who sent the long list to",
    "the harbour every Monday.",
]
THIRD = ["Gulls nested on the roof", "in spring, which made the", "keeper angry, since they", "woke him very early."]

# Of letters of Helvetica at 20 points.
WIDTHS = {"f": 5.56, "l": 4.44, "c": 10, "r": 6.66, "s": 10, "v": 10, "w": 14.44, "y": 10, "t": 5.56}


def lines_of(pdf: bytes) -> list[str]:
    return [line for line in read_document("a.pdf", pdf).lines if line]


def columns(*texts: list[str], lowered: float = 0) -> list[Placed]:
    """Columns beside each other, drawn row by row."""
    return [
        Placed(50 + 165 * number, 700 - 12 * row - lowered * number, text[row])
        for row in range(len(texts[0]))
        for number, text in enumerate(texts)
    ]


@pytest.mark.parametrize("lowered", [0, 3, 6])
def test_columns_are_read_one_after_the_other(lowered: float) -> None:
    assert lines_of(placed_pdf([columns(LEFT, RIGHT, lowered=lowered)])) == LEFT + RIGHT


def test_three_columns_between_lines_of_the_whole_width() -> None:
    title = Placed(50, 740, "The news of the island and of the ships that passed it, as told by its gulls", 14)
    footer = Placed(50, 600, "This line below the columns is as wide as the page, and is no part of a column.")
    found = lines_of(placed_pdf([[footer, *columns(LEFT, RIGHT, THIRD), title]]))
    assert found == [title.text, *LEFT, *RIGHT, *THIRD, footer.text]


def test_rows_of_a_table_stay_together() -> None:
    table = [
        ("Part", "Description", "Person responsible", "Price"),
        ("A-1", "Rubber washer for cold taps", "Maria Gonzalez", "0.30"),
        ("A-2", "Brass fitting for garden hoses", "Peter Novak", "4.10"),
        ("A-3", "Steel spring for gate latches", "Olga Ivanova", "2.20"),
    ]
    placed = [
        Placed(x, 700 - 14 * number, cell)
        for number, row in enumerate(table)
        for x, cell in zip((50, 100, 300, 450), row, strict=True)
    ]
    assert lines_of(placed_pdf([placed])) == ["  ".join(row) for row in table]


@pytest.mark.parametrize(
    ("above", "below", "expected"),
    [
        ("must be inspec-", "ted every spring", ["must be inspected", "every spring"]),
        ("by a tech-", "nician. Write", ["by a technician.", "Write"]),
        ("a well-", "known fault", ["a well-known", "fault"]),
        ("an up-to-", "date list", ["an up-to-date", "list"]),
        ("of Baden-", "Baden", ["of Baden-Baden"]),
        ("LIABLE FOR DAM-", "AGES OF ANY", ["LIABLE FOR DAMAGES", "OF ANY"]),
        ("it costs 12-", "15 euros", ["it costs 12-15", "euros"]),
        ("a pause -", "then more", ["a pause -", "then more"]),
    ],
)
def test_words_hyphenated_at_the_end_of_a_line(above: str, below: str, expected: list[str]) -> None:
    assert lines_of(placed_pdf([[Placed(50, 700, above), Placed(50, 688, below)]])) == expected


def test_the_document_decides_on_a_hyphen() -> None:
    halves = [Placed(50, 700, "about non-"), Placed(50, 688, "native code")]
    for word in ("nonnative", "non-native"):
        found = lines_of(placed_pdf([halves, [Placed(50, 700, f"all {word} packages")]]))
        assert found[:2] == [f"about {word}", "code"]


@pytest.mark.parametrize("shift", [0, 0.3, 1])
@pytest.mark.parametrize("letters", [False, True])
def test_letters_that_are_drawn_twice_are_read_once(shift: float, letters: bool) -> None:
    text = "SALE OF BOOKS 1100"
    parts = list(enumerate(text)) if letters else [(0, text)]
    placed = [Placed(50 + 16 * at + moved, 700, part, 20) for at, part in parts for moved in (0, shift) if part.strip()]
    found = lines_of(placed_pdf([placed]))
    assert "".join(found).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("turn", [(0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1)])
def test_turned_pages(turn: tuple[int, int, int, int]) -> None:
    _, _, c, d = turn
    placed = [
        Placed(300 + c * (0 - 12 * row), 400 + d * (0 - 12 * row), text, turn=turn) for row, text in enumerate(LEFT)
    ]
    assert lines_of(placed_pdf([placed])) == LEFT


def test_a_line_in_another_direction_is_apart() -> None:
    placed = [*columns(LEFT), Placed(20, 300, "Version of May", turn=(0, 1, -1, 0))]
    assert lines_of(placed_pdf([placed])) == [*LEFT, "Version of May"]


@pytest.mark.parametrize("algorithm", ["RC4-40", "RC4-128", "AES-128", "AES-256"])
def test_a_pdf_that_opens_without_a_password(algorithm: str) -> None:
    pdf = placed_pdf([[Placed(50, 700, "The spare fuses lie in the drawer.")]])
    assert lines_of(encrypted_pdf(pdf, algorithm)) == ["The spare fuses lie in the drawer."]
    with pytest.raises(BrokenFileError, match="an encrypted PDF"):
        read_document("a.pdf", encrypted_pdf(pdf, algorithm, password="secret"))


def test_values_of_a_form_stand_at_their_labels() -> None:
    def field(y: int, more: str) -> str:
        return f"/Subtype /Widget /Rect [150 {y} 350 {y + 14}] {more}"

    labels = [
        Placed(50, 703 - 30 * row, label)
        for row, label in enumerate(("Name", "Plate", "Colour", "Member", "Guest", "Code"))
    ]
    fields = [
        field(700, "/FT /Tx /T (name) /V (Quastenflosser Haulage)"),
        field(670, "/FT /Tx /T (plate) /V (ZX-4711-K)"),
        field(640, "/FT /Ch /Ff 131072 /T (colour) /Opt [[(t) (Teal)] [(m) (Mauve)]] /V (t)"),
        field(610, "/FT /Btn /T (member) /V /Yes /AS /Yes /AP << /N << /Yes 3 0 R /Off 3 0 R >> >>"),
        field(580, "/FT /Btn /T (guest) /V /Off /AS /Off /AP << /N << /Yes 3 0 R /Off 3 0 R >> >>"),
        field(550, "/FT /Tx /Ff 8192 /T (code) /V (password)"),
    ]
    found = lines_of(placed_pdf([labels], annotations=fields, fields=True))
    assert found[:3] == ["Name  Quastenflosser Haulage", "Plate  ZX-4711-K", "Colour  Teal"]
    assert found[3].split()[0] == "Member"
    assert found[4:] == ["Guest", "Code"]


def test_comments() -> None:
    annotations = [
        "/Subtype /Text /Rect [10 10 20 20] /T (Ada) /Contents (Replace the wombat fuse)",
        "/Subtype /Highlight /Rect [10 10 20 20] /Contents (Why this one?)",
        "/Subtype /FreeText /Rect [10 10 20 20] /Contents (Written on the page)",
        "/Subtype /Link /Rect [10 10 20 20] /Contents (a link)",
        "/Subtype /Text /F 2 /Rect [10 10 20 20] /Contents (hidden)",
    ]
    found = lines_of(placed_pdf([[Placed(50, 700, "A drawing.")]], annotations=annotations))
    assert found == [
        "A drawing.",
        "Comment by Ada: Replace the wombat fuse",
        "Comment: Why this one?",
        "Written on the page",
    ]


@pytest.mark.parametrize("cut", [10, 200, 600, 900])
def test_a_damaged_file_has_a_reason(cut: int) -> None:
    pdf = placed_pdf([columns(LEFT)] * 3)
    try:
        found = lines_of(pdf[:-cut])
    except BrokenFileError as error:
        found = [f"a reason without a line end: {error}"]
    assert all(line in LEFT or line.startswith("a reason") for line in found)


words = st.lists(st.text("abcdefgh", min_size=2, max_size=9), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(words, min_size=1, max_size=6), min_size=1, max_size=4))
def test_every_word_is_on_its_page(pages: list[list[list[str]]]) -> None:
    pdf = placed_pdf([[Placed(50, 700 - 13 * row, " ".join(line)) for row, line in enumerate(page)] for page in pages])
    document = read_document("a.pdf", pdf)
    assert document.pages is not None
    for number, page in enumerate(pages, start=1):
        found = [line for line, of_page in zip(document.lines, document.pages, strict=True) if of_page == number]
        assert " ".join(found).split() == [word for line in page for word in line]


@pytest.mark.parametrize("spacing", [0, 4])
def test_blanks_that_are_only_gaps(spacing: float) -> None:
    text = "flow colors even when they start"
    placed, x = [], 50.0
    for letter in text:
        if letter != " ":
            placed.append(Placed(x, 700, letter, 20))
        x += {" ": 6.0}.get(letter, WIDTHS.get(letter, 11.12)) + spacing + (6 if letter == " " and spacing else 0)
    assert lines_of(placed_pdf([placed])) == [text]
