"""Read PDF: the text of each page in reading order, with what is filled into forms and written beside it.

PDFium, the reader of Chrome, opens the file and finds its letters; `page_layout` makes lines of them. The entries of
the outline are headings at the lines with their titles.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from functools import cache
from statistics import median
from typing import Any

from epic_rag_chroma.reading.containers import MAX_CHARACTERS, parsing, printable, requires
from epic_rag_chroma.reading.document import (
    BrokenFileError,
    Document,
    Heading,
    NotTextError,
    SplitCost,
    clean_title,
    split_lines,
    text_split_costs,
)
from epic_rag_chroma.reading.page_layout import (
    LINE_END_HYPHEN,
    Run,
    joined_lines,
    ordered_rows,
    row_text,
    words_of,
)

__all__ = ["read_pdf"]


_FORMAT = "PDF"
_MAX_OUTLINE = 10_000
_MAX_ANNOTATIONS = 10_000
# A gap between two letters, in heights of the line, that ends a run: cells and columns are that far apart.
_RUN_GAP = 0.75
# PDFium overlooks narrow blanks that are drawn as a gap; in letter-spaced text, a blank is twice a usual gap.
_BLANK = 0.15
_BLANK_TO_USUAL = 2.0
_SPACED_LETTERS = 3
# The letters whose direction is looked at to find that of a page.
_SAMPLED = 40
_IDEOGRAPHS = "\u2e80"
_LIGATURES = str.maketrans(
    {"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl", "\ufb05": "st", "\ufb06": "st"}
)


def read_pdf(data: bytes) -> Document:
    """Read a PDF; damaged pages are skipped."""
    with requires("pypdfium2", "reading PDF files"):
        import pypdfium2  # type: ignore[import-untyped]
    with parsing(_FORMAT):
        try:
            pdf = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            reason = str(error).lower()
            if "password" in reason or "security" in reason:
                raise BrokenFileError(f"an encrypted {_FORMAT}") from error
            raise
        try:
            document = _pages(pdf)
            if not any(line.strip() for line in document.lines):
                raise NotTextError("a PDF without text (scanned pages?)")
            document.headings.extend(_outline(pdf, document))
        finally:
            pdf.close()
        return document


def _pages(pdf: Any) -> Document:
    pdf.init_forms()
    texts: list[list[str]] = []
    size = 0
    broken: BrokenFileError | None = None
    for number in range(len(pdf)):
        of_page: list[str] = []
        try:
            with parsing(_FORMAT):
                of_page = _page(pdf, number)
        except BrokenFileError as error:
            broken = broken or error
        size += sum(map(len, of_page))
        if size > MAX_CHARACTERS:
            raise BrokenFileError(f"more than {MAX_CHARACTERS // 2**20} million characters of text in this {_FORMAT}")
        texts.append(of_page)
    known = cache(lambda: words_of(line for of_page in texts for line in of_page))
    lines: list[str] = []
    costs: list[SplitCost] = []
    pages: list[int] = []
    for number, of_page in enumerate(texts, start=1):
        of_page = split_lines(printable("\n".join(joined_lines(of_page, known)))) if of_page else []
        lines += of_page
        costs += text_split_costs(of_page)
        pages += [number] * len(of_page)
    if broken is not None and not any(line.strip() for line in lines):
        raise broken
    return Document(lines, costs, pages=pages)


def _page(pdf: Any, number: int) -> list[str]:
    """Return the lines of a page (from 0), with hyphens at the ends of lines marked."""
    page = pdf[number]
    text = page.get_textpage()
    runs, turned, angle = _runs(text.raw)
    values, comments = _annotations(pdf, page)
    if angle == 0:
        runs += values
        values = []
    rows = ordered_rows(runs)
    lines = ["" if row is None else row_text(row) for row in rows]
    for more in (turned, [run.text for run in values], comments):
        lines += ["", *more] if more else []
    text.close()
    page.close()
    return [line for at, line in enumerate(lines) if line or (at and lines[at - 1])]


def _runs(text: Any) -> tuple[list[Run], list[str], int]:
    """Return the runs of a page turned upright, the lines in other directions, and the direction in quarter turns."""
    import pypdfium2.raw as pdfium  # type: ignore[import-untyped]

    count = pdfium.FPDFText_CountChars(text)
    if count > MAX_CHARACTERS:
        raise BrokenFileError(f"more than {MAX_CHARACTERS // 2**20} million characters of text in this {_FORMAT}")
    angles: Counter[int] = Counter()
    step = max(1, count // _SAMPLED)
    for index in range(0, count, step):
        if not pdfium.FPDFText_IsGenerated(text, index):
            angles[_quarter(pdfium.FPDFText_GetCharAngle(text, index))] += 1
    angle = angles.most_common(1)[0][0] if angles else 0

    box = pdfium.FS_RECTF()
    pointer = ctypes.pointer(box)
    code_at, box_at = pdfium.FPDFText_GetUnicode, pdfium.FPDFText_GetLooseCharBox
    runs: list[Run] = []
    turned: list[str] = []
    letters: list[str] = []
    gaps: list[tuple[int, float, bool]] = []  # before a letter; whether PDFium takes it for a blank
    guessed = False
    left = bottom = right = top = 0.0
    apart: list[str] | None = None  # the letters of a line in another direction

    def end() -> None:
        if letters:
            if gaps:
                usual = median(gap for _, gap, _ in gaps)
                blank = _BLANK * (top - bottom)
                spaced = usual > blank and len(gaps) >= _SPACED_LETTERS and all(map(str.isalpha, letters))
                for place, gap, is_blank in reversed(gaps):
                    if gap > max(blank, _BLANK_TO_USUAL * usual) or (is_blank and not spaced):
                        letters.insert(place, " ")
                gaps.clear()
            runs.append(Run("".join(letters).translate(_LIGATURES), left, bottom, right, top))
            letters.clear()

    high = 0
    new_line = True
    for index in range(count):
        code = code_at(text, index)
        if code in (13, 10):
            end()
            if apart:
                turned.append("".join(apart))
            apart, new_line = None, True
            continue
        if 0xD800 <= code < 0xDC00:
            high = code
            continue
        if 0xDC00 <= code < 0xE000:
            code = 0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00) if high else 0xFFFD
            high = 0
        letter = chr(code) if code != 0xFFFE else LINE_END_HYPHEN
        if new_line and not letter.isspace():
            new_line = False
            other = _quarter(pdfium.FPDFText_GetCharAngle(text, index))
            apart = [] if other != angle else None
        if apart is not None:
            apart.append(letter)
            continue
        if letter.isspace():
            if pdfium.FPDFText_IsGenerated(text, index):
                guessed = True
            elif letters:
                letters.append(" ")
            continue
        box_at(text, index, pointer)
        x0, y0, x1, y1 = box.left, box.bottom, box.right, box.top
        if angle == 3:
            x0, y0, x1, y1 = y0, -x1, y1, -x0
        elif angle == 2:
            x0, y0, x1, y1 = -x1, -y1, -x0, -y0
        elif angle == 1:
            x0, y0, x1, y1 = -y1, x0, -y0, x1
        height = y1 - y0
        if letters:
            apart_in_y = min(top, y1) - max(bottom, y0) < 0.3 * min(height, top - bottom)
            gap = _RUN_GAP * max(height, top - bottom)
            if apart_in_y or x0 - right > gap or (x1 < left - gap and letter < "\u0590"):
                end()
        if letters:
            if letters[-1] != " " and (guessed or letter < _IDEOGRAPHS):
                gaps.append((len(letters), x0 - right, guessed))
            left, right = min(left, x0), max(right, x1)
            bottom, top = min(bottom, y0), max(top, y1)
        else:
            left, bottom, right, top = x0, y0, x1, y1
        letters.append(letter)
        guessed = False
        if letter == LINE_END_HYPHEN:
            end()
    end()
    if apart:
        turned.append("".join(apart))
    return runs, turned, angle


def _quarter(radians: float) -> int:
    """Return an angle in quarter turns clockwise."""
    return round(radians / 1.5707963267948966) % 4


def _annotations(pdf: Any, page: Any) -> tuple[list[Run], list[str]]:
    """Return the values of form fields at their places, and the comments that are written on a page."""
    import pypdfium2.raw as pdfium

    values: list[Run] = []
    comments: list[str] = []
    for index in range(min(pdfium.FPDFPage_GetAnnotCount(page.raw), _MAX_ANNOTATIONS)):
        annotation = pdfium.FPDFPage_GetAnnot(page.raw, index)
        if not annotation:
            continue
        try:
            kind = pdfium.FPDFAnnot_GetSubtype(annotation)
            if pdfium.FPDFAnnot_GetFlags(annotation) & (pdfium.FPDF_ANNOT_FLAG_HIDDEN | pdfium.FPDF_ANNOT_FLAG_NOVIEW):
                continue
            if kind == pdfium.FPDF_ANNOT_WIDGET:
                box = pdfium.FS_RECTF()
                value = _field_value(pdf, annotation)
                if value.strip() and pdfium.FPDFAnnot_GetRect(annotation, box):
                    text = " ".join(value.split())
                    values.append(Run(text, box.left, min(box.bottom, box.top), box.right, max(box.bottom, box.top)))
            elif kind not in (pdfium.FPDF_ANNOT_LINK, pdfium.FPDF_ANNOT_POPUP):
                contents = _wide(pdfium.FPDFAnnot_GetStringValue, annotation, b"Contents").strip()
                if contents and kind == pdfium.FPDF_ANNOT_FREETEXT:
                    comments += split_lines(printable(contents))
                elif contents:
                    author = _wide(pdfium.FPDFAnnot_GetStringValue, annotation, b"T").strip()
                    comments += split_lines(printable(f"Comment{f' by {author}' if author else ''}: {contents}"))
        finally:
            pdfium.FPDFPage_CloseAnnot(annotation)
    return values, comments


def _field_value(pdf: Any, annotation: Any) -> str:
    """Return what a form field shows: its text, the chosen options, or a cross."""
    import pypdfium2.raw as pdfium

    if pdf.formenv is None:
        return _wide(pdfium.FPDFAnnot_GetStringValue, annotation, b"V")
    form = pdf.formenv.raw
    kind = pdfium.FPDFAnnot_GetFormFieldType(form, annotation)
    if kind in (pdfium.FPDF_FORMFIELD_CHECKBOX, pdfium.FPDF_FORMFIELD_RADIOBUTTON):
        return "[x]" if pdfium.FPDFAnnot_IsChecked(form, annotation) else ""
    if kind in (pdfium.FPDF_FORMFIELD_PUSHBUTTON, pdfium.FPDF_FORMFIELD_SIGNATURE):
        return ""
    if pdfium.FPDFAnnot_GetFormFieldFlags(form, annotation) & pdfium.FPDF_FORMFLAG_TEXT_PASSWORD and kind not in (
        pdfium.FPDF_FORMFIELD_COMBOBOX,
        pdfium.FPDF_FORMFIELD_LISTBOX,
    ):
        return ""
    options = pdfium.FPDFAnnot_GetOptionCount(form, annotation)
    chosen = [
        _wide(pdfium.FPDFAnnot_GetOptionLabel, form, annotation, option)
        for option in range(min(options, 1000))
        if pdfium.FPDFAnnot_IsOptionSelected(form, annotation, option)
    ]
    return ", ".join(filter(None, chosen)) or _wide(pdfium.FPDFAnnot_GetFormFieldValue, form, annotation)


def _wide(function: Any, *arguments: Any) -> str:
    """Call a function that fills a buffer with UTF-16."""
    import pypdfium2.raw as pdfium

    size = function(*arguments, None, 0)
    if size <= 2:
        return ""
    buffer = ctypes.create_string_buffer(size)
    function(*arguments, ctypes.cast(buffer, ctypes.POINTER(pdfium.FPDF_WCHAR)), size)
    return buffer.raw[: size - 2].decode("utf-16-le", "replace")


def _outline(pdf: Any, document: Document) -> list[Heading]:
    """Return the entries of the outline as headings: at the line with the title, or at the first line of the page."""
    pages = document.pages or []
    first: dict[int, int] = {}
    for line, page in enumerate(pages):
        first.setdefault(page, line)
    headings: list[Heading] = []
    taken = -1
    for page, level, title in _entries(pdf):
        # Skip entries that point backwards, or to a page without text.
        start = max(first.get(page, len(pages)), taken + 1)
        if start >= len(pages) or pages[start] != page:
            continue
        taken, height = start, 0
        for line in range(start, len(pages)):
            if pages[line] != page:
                break
            if clean_title(document.lines[line]).casefold().endswith(title.casefold()):
                taken, height = line, 1
                break
        headings.append(Heading(taken, level, title, height))
    return headings


def _entries(pdf: Any) -> list[tuple[int, int, str]]:
    """Return page, level and title of each entry, in order; none if the outline is damaged."""
    entries: list[tuple[int, int, str]] = []
    try:
        for entry in pdf.get_toc(max_depth=20):
            target = entry.get_dest()
            number = None if target is None else target.get_index()
            title = clean_title(printable(entry.get_title() or ""))
            if number is not None and number >= 0 and title:
                entries.append((number + 1, entry.level + 1, title))
            if len(entries) >= _MAX_OUTLINE:
                break
    except MemoryError:
        raise
    except Exception:  # the text is indexed without a damaged outline
        return []
    return entries
