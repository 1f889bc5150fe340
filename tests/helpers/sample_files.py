"""One small file of every format, made on the spot, and of the containers also what breaks or attacks them."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Mapping
from email.message import EmailMessage

__all__ = ["SAMPLES", "make_book", "make_docx", "make_odt", "make_pptx", "make_xlsx", "zipped"]

TEXTS = {
    "a.md": "---\ntitle: A page\n---\n\n# Guide\n\nRead *this* first.\n\n- one\n- two\n\n| Key | Value |\n|---|---|\n| a | 1 |\n\n```sh\n$ run it\n```\n",
    "a.rst": "Guide\n=====\n\nRead this first.\n\n.. code::\n\n   run it\n\nSteps\n-----\n\n* one\n* two\n",
    "a.adoc": "= Guide\n\n== Steps\n\nRead this first.\n\n----\nrun it\n----\n\n|===\n|a |b\n|===\n",
    "a.tex": "\\documentclass{article}\n\\begin{document}\n\\section{Guide}\nRead this first: $a^2$.\n\\begin{itemize}\n\\item one\n\\end{itemize}\n\\end{document}\n",
    "a.org": "* Guide\nRead this first.\n** Steps\n- one\n#+begin_src sh\nrun it\n#+end_src\n",
    "a.1": ".TH GUIDE 1\n.SH NAME\nguide \\- read this first\n.SH OPTIONS\n.TP\n.B \\-a\nall of it\n",
    "a.py": "class Server:\n    def handle(self, request):\n        return request\n\n\ndef main():\n    return Server()\n",
    "a.js": "class Server {\n  handle(request) {\n    return request;\n  }\n}\n\nexport const main = () => new Server();\n",
    "a.rs": "struct Server;\n\nimpl Server {\n    fn handle(&self) -> u32 {\n        42\n    }\n}\n",
    "a.c": '#include <stdio.h>\n\nint main(void) {\n  puts("read this");\n  return 0;\n}\n',
    "a.csv": 'name,age,note\nAda,36,"counts, and\nwrites"\nAlan,41,runs\n',
    "a.tsv": "name\tage\nAda\t36\nAlan\t41\n",
    "a.json": json.dumps({"guide": {"steps": ["one", "two"], "deep": [[[{"a": 1}]]]}}, indent=2),
    "a.jsonl": '{"title": "Guide", "text": "Read this first."}\n{"title": "Steps", "n": 2}\n',
    "a.yaml": "guide:\n  steps:\n    - one\n    - two\n",
    "a.toml": '[guide]\nsteps = ["one", "two"]\n',
    "a.ini": "[guide]\nsteps = one\n",
    "a.xml": "<?xml version='1.0'?>\n<guide>\n  <step n='1'>one</step>\n</guide>\n",
    "a.srt": "1\n00:00:01,000 --> 00:00:02,000\nRead this first.\n\n2\n00:00:03,000 --> 00:00:04,000\nThen that.\n",
    "a.vtt": "WEBVTT\n\n00:01.000 --> 00:02.000\nRead this first.\n\n00:03.000 --> 00:04.000\n<v Ada>Then that.\n",
    "a.txt": "Cats sleep most of the day.\n\nThey wake up for food.\n",
    "a.html": "<html><head><title>Guide</title></head><body><h1>Guide</h1><p>Read <b>this</b> first.</p><table><tr><td>a<td>1</table><pre>\nrun it\n</pre></body></html>",
}


def zipped(members: Mapping[str, str | bytes], *, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive of members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return out.getvalue()


def make_docx() -> bytes:
    """A Word document with headings, a list, a table."""
    import docx

    document = docx.Document()
    document.add_heading("Manual", 0)
    document.add_heading("Undo", 1)
    document.add_paragraph("Reset softly to the commit before it.")
    document.add_paragraph("keep the changes", style="List Bullet")
    document.add_paragraph("drop the commit", style="List Bullet")
    document.add_heading("Options", 2)
    table = document.add_table(rows=3, cols=2)
    for row, cells in zip(
        table.rows, [("Option", "Meaning"), ("--soft", "keeps files"), ("--hard", "drops files")], strict=True
    ):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    document.add_heading("Remove", 1)
    document.add_paragraph("Delete the folder.")
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def make_pptx() -> bytes:
    """A presentation of three slides: bullets and notes, a table, one without a title."""
    import pptx
    from pptx.util import Inches

    presentation = pptx.Presentation()
    slide = presentation.slides.add_slide(presentation.slide_layouts[1])
    slide.shapes.title.text = "Undo"
    slide.placeholders[1].text_frame.text = "Reset softly"
    slide.placeholders[1].text_frame.add_paragraph().text = "Keep the changes"
    slide.notes_slide.notes_text_frame.text = "Say why."
    slide = presentation.slides.add_slide(presentation.slide_layouts[5])
    slide.shapes.title.text = "Options"
    table = slide.shapes.add_table(2, 2, Inches(1), Inches(2), Inches(5), Inches(1)).table
    for row, cells in zip(table.rows, [("Option", "Meaning"), ("--soft", "keeps files")], strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    slide = presentation.slides.add_slide(presentation.slide_layouts[6])
    box = slide.shapes.add_textbox(Inches(1), Inches(1), Inches(2), Inches(1))
    box.text_frame.text = "No title here"
    out = io.BytesIO()
    presentation.save(out)
    return out.getvalue()


def make_xlsx() -> bytes:
    """A workbook of two sheets, the first with two tables; in the least that a reader accepts."""

    def sheet(rows: list[list[str | float] | None]) -> str:
        cells = ""
        for number, row in enumerate(rows, start=1):
            if row:
                cells += (
                    f'<row r="{number}">'
                    + "".join(
                        f'<c t="inlineStr" r="{chr(65 + column)}{number}"><is><t>{value}</t></is></c>'
                        if isinstance(value, str)
                        else f'<c r="{chr(65 + column)}{number}"><v>{value}</v></c>'
                        for column, value in enumerate(row)
                    )
                    + "</row>"
                )
        return f'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>{cells}</sheetData></worksheet>'

    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    main = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    return zipped(
        {
            "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" ContentType="{main}.sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" ContentType="{main}.worksheet+xml"/><Override PartName="/xl/worksheets/sheet2.xml" ContentType="{main}.worksheet+xml"/></Types>',
            "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
            "xl/workbook.xml": f'<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" xmlns:r="{office}"><sheets><sheet name="People" sheetId="1" r:id="r1"/><sheet name="Prices" sheetId="2" r:id="r2"/></sheets></workbook>',
            "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" Type="{office}/worksheet" Target="worksheets/sheet1.xml"/><Relationship Id="r2" Type="{office}/worksheet" Target="worksheets/sheet2.xml"/></Relationships>',
            "xl/worksheets/sheet1.xml": sheet(
                [["Name", "Age"], ["Ada", 36], ["Alan", 41.5], None, ["City"], ["London"]]
            ),
            "xl/worksheets/sheet2.xml": sheet([["Bread", 3]]),
        }
    )


def make_book(chapters: Mapping[str, str] | None = None, *, extra: Mapping[str, str | bytes] | None = None) -> bytes:
    """An EPUB of chapters: name -> the body's HTML."""
    chapters = chapters or {
        "one.xhtml": "<h1>Loomings</h1><p>Call me Ishmael.</p><script>never()</script>",
        "two.xhtml": "<h1>The Carpet-Bag</h1><h2>New Bedford</h2><p>I stuffed a shirt or two.</p>",
    }
    items = "".join(
        f'<item id="c{n}" href="text/{name}" media-type="application/xhtml+xml"/>' for n, name in enumerate(chapters)
    )
    spine = "".join(f'<itemref idref="c{n}"/>' for n in range(len(chapters)))
    return zipped(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile full-path="OEBPS/content.opf"/></rootfiles></container>',
            "OEBPS/content.opf": f'<package xmlns="http://www.idpf.org/2007/opf"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>Moby-Dick</dc:title><dc:creator>Herman Melville</dc:creator></metadata><manifest>{items}</manifest><spine>{spine}</spine></package>',
            **{
                f"OEBPS/text/{name}": f'<?xml version="1.0"?><!DOCTYPE html><html xmlns="http://www.w3.org/1999/xhtml"><head><title>x</title></head><body>{body}</body></html>'
                for name, body in chapters.items()
            },
            **(extra or {}),
        }
    )


def make_odt(body: str | None = None, *, kind: str = "text", extra: Mapping[str, str | bytes] | None = None) -> bytes:
    """An OpenDocument file."""
    spaces = " ".join(
        f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name if name != "draw" else "drawing"}:1.0"'
        for name in ("office", "text", "table", "draw", "presentation")
    )
    body = body or (
        '<text:h text:outline-level="1">Undo</text:h><text:p>Reset<text:s text:c="1000000000"/>softly<text:note><text:note-citation>1</text:note-citation><text:note-body><text:p>or not</text:p></text:note-body></text:note>.</text:p>'
        "<text:list><text:list-item><text:p>keep</text:p></text:list-item><text:list-item><text:p>drop</text:p></text:list-item></text:list>"
        '<text:h text:outline-level="2">Options</text:h><table:table><table:table-row><table:table-cell><text:p>Option</text:p></table:table-cell><table:table-cell><text:p>Meaning</text:p></table:table-cell></table:table-row>'
        "<table:table-row><table:table-cell><text:p>--soft</text:p></table:table-cell><table:table-cell><text:p>keeps</text:p></table:table-cell></table:table-row></table:table>"
    )
    return zipped(
        {
            "mimetype": f"application/vnd.oasis.opendocument.{kind}",
            "content.xml": f"<office:document-content {spaces}><office:body><office:{kind}>{body}</office:{kind}></office:body></office:document-content>",
            **(extra or {}),
        }
    )


def make_notebook() -> bytes:
    """A notebook with Markdown, code and an output."""
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# Analysis\n", "\n", "Load the *data*."]},
        {
            "cell_type": "code",
            "execution_count": 1,
            "metadata": {"source": "not this"},
            "outputs": [{"output_type": "stream", "name": "stdout", "text": ["never shown\n"]}],
            "source": ["import os\n", "\n", 'print("é\\n")'],
        },
        {"cell_type": "markdown", "metadata": {}, "source": "## Results\n\nAll is well."},
        {"cell_type": "code", "metadata": {}, "outputs": [], "source": []},
    ]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, indent=1).encode()


def make_message() -> bytes:
    """A message with two alternatives, a patch and a picture."""
    message = EmailMessage()
    message["Subject"] = "Undo the löst commit"
    message["From"] = "Ada Lovelace <ada@example.org>"
    message["Date"] = "Thu, 01 Jan 2026 10:00:00 +0000"
    message.set_content("Reset softly to the commit before it.\n\nOr not.\n")
    message.add_alternative("<p>Only in <b>HTML</b></p>", subtype="html")
    message.add_attachment("--- a\n+++ b\n", filename="fix.txt")
    message.add_attachment(b"\x89PNG" * 20, maintype="image", subtype="png", filename="a.png")
    return message.as_bytes()


def make_mailbox() -> bytes:
    """A mailbox of two messages: plain text, and base64."""
    encoded = base64.encodebytes("Das Brot ist im Öfen.\n".encode() * 9)
    return (
        b"From ada@example.org Thu Jan  1 10:00:00 2026\nSubject: Bread\nFrom: Ada\n\nBake it for forty minutes.\n>From the top.\n\n"
        b"From alan@example.org Fri Jan  2 10:00:00 2026\nSubject: =?utf-8?q?=C3=96fen?=\n"
        b"Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: base64\n\n" + encoded + b"\n"
    )


def make_rtf() -> bytes:
    """An RTF document."""
    return rb"{\rtf1\ansi\ansicpg1252{\fonttbl\f0\fswiss Helvetica;}\f0\pard Reset softly.\par {\b Keep} the caf\'e9 open \u8364?.\par}"


def make_pdf() -> bytes:
    """A PDF of three pages with an outline."""
    import pypdf

    lines = ["Chapter One", "Reset softly to the commit before it.", "Delete the folder."]
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for text in lines:
        stream = b"BT /F1 12 Tf 72 720 Td (" + text.encode("latin-1") + b") Tj ET"
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Resources << /Font << /F1 3 0 R >> >> >>"
            % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(lines))
    out = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(out))
    chapter = writer.add_outline_item(title="Chapter One", page_number=0)
    writer.add_outline_item(title="Undo", page_number=1, parent=chapter)
    writer.add_outline_item(title="Remove", page_number=2)
    saved = io.BytesIO()
    writer.write(saved)
    return saved.getvalue()


def _samples() -> dict[str, bytes]:
    return {
        **{name: text.encode() for name, text in TEXTS.items()},
        "a.docx": make_docx(),
        "a.pptx": make_pptx(),
        "a.xlsx": make_xlsx(),
        "a.epub": make_book(),
        "a.odt": make_odt(),
        "a.ipynb": make_notebook(),
        "a.eml": make_message(),
        "a.mbox": make_mailbox(),
        "a.rtf": make_rtf(),
        "a.pdf": make_pdf(),
    }


SAMPLES = _samples()
