"""Spreadsheets (.xlsx, .xlsm, .xlsb, .xls, .ods): a sheet is a section under its name, a row is a line.

calamine reads values, not formulas. An empty row ends a table, so that tables of one sheet are cut apart.
"""

from __future__ import annotations

import datetime
import io
from itertools import groupby

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.document import BrokenFileError, Document
from epic_rag_chroma.formats.archive import Archive
from epic_rag_chroma.formats.building import DocumentBuilder, parsing

__all__ = ["read"]

_WHAT = "spreadsheet"
_ZIP = b"PK"


def read(data: bytes) -> Document:
    """Read a workbook.

    Raises:
        BrokenFileError: If it is damaged, encrypted or beyond a limit.
        NotTextError: If there is no text in it.
        MissingExtraError: If python-calamine is not installed.
    """
    try:
        from python_calamine import CalamineWorkbook, PasswordError, SheetTypeEnum
    except ImportError as error:
        raise MissingExtraError("python-calamine", "files", "reading spreadsheets") from error
    if data.startswith(_ZIP):
        with Archive(data, _WHAT):
            pass  # it is within the limits
    out = DocumentBuilder(_WHAT)
    with parsing(_WHAT):
        try:
            book = CalamineWorkbook.from_filelike(io.BytesIO(data))
        except PasswordError as error:
            raise BrokenFileError(f"an encrypted {_WHAT}") from error
        for sheet in book.sheets_metadata:
            if sheet.typ is SheetTypeEnum.WorkSheet:
                out.section(sheet.name, 1)
                cells = ([_shown(cell) for cell in row] for row in book.get_sheet_by_name(sheet.name).iter_rows())
                for _, table in groupby(cells, key=any):
                    out.rows(table)
    return out.with_pages()


def _shown(value: object) -> str:
    """A cell's value as a person would write it."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # calamine has every number as a float
    if isinstance(value, datetime.datetime) and value.time() == datetime.time.min:
        return value.date().isoformat()
    return str(value)
