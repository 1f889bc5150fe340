"""PDF files of text at places, with forms and comments, written as PDF syntax."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Placed", "encrypted_pdf", "placed_pdf"]


class Placed(NamedTuple):
    """Text at a place in points from the lower left corner of the page."""

    x: float
    y: float
    text: str
    size: float = 10
    turn: tuple[int, int, int, int] = (1, 0, 0, 1)


def placed_pdf(pages: Iterable[Iterable[Placed]], *, annotations: Sequence[str] = (), fields: bool = False) -> bytes:
    """Return a PDF; the annotations are dictionaries on the first page, which are fields of a form if `fields`."""
    objects = [b"", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"]
    kids = []
    for number, page in enumerate(pages):
        drawn = "".join(
            f"BT /F1 {part.size} Tf {' '.join(map(str, part.turn))} {part.x} {part.y} Tm "
            f"({part.text.translate(str.maketrans({mark: chr(92) + mark for mark in '()' + chr(92)}))}) Tj ET\n"
            for part in page
        ).encode("cp1252")
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawn), drawn))
        contents = len(objects)
        references = ""
        if not number:
            for annotation in annotations:
                objects.append(f"<< /Type /Annot {annotation} >>".encode("cp1252"))
                references += f"{len(objects)} 0 R "
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Annots [%s]"
            b" /Resources << /Font << /F1 3 0 R >> >> >>" % (contents, references.encode())
        )
        if not number and fields:
            objects[0] = b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [%s] >> >>" % references.encode()
        kids.append(b"%d 0 R" % len(objects))
    objects[0] = objects[0] or b"<< /Type /Catalog /Pages 2 0 R >>"
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    out = b"%PDF-1.7\n"
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    return out + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)


def encrypted_pdf(pdf: bytes, algorithm: str, *, password: str = "") -> bytes:
    """Return a PDF that only the owner may copy from or print."""
    import pypdf
    from pypdf.constants import UserAccessPermissions

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf))
    writer.encrypt(password, "owner", algorithm=algorithm, permissions_flag=UserAccessPermissions(0))
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()
