"""Numbers as a spreadsheet shows them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag_chroma.reading.number_formats import BUILT_IN, number_text, shown

EUROS = '_-* #,##0.00\\ [$€-407]_-;\\-* #,##0.00\\ [$€-407]_-;_-* "-"??\\ [$€-407]_-;_-@_-'


@pytest.mark.parametrize(
    ("value", "code", "expected"),
    [
        (1234, "000000", "001234"), (0.153, "0.0%", "15.3%"), (0.5, "0 %", "50 %"), (4006381333931123, "0", "4006381333931123"),
        (0.7999999999999999, "General", "0.8"), (12.0, "General", "12"), (1e22, "General", "1e+22"), (7, "@", "7"),
        (1234567.891, "#,##0.00", "1,234,567.89"), (-1234.5, "#,##0.00;(#,##0.00)", "(1,234.50)"), (0, '0;-0;"none"', "none"),
        (12.5, '"$"#,##0.00', "$12.50"), (-12.5, "$#,##0.00", "-$12.50"), (12.5, '#,##0.00 "EUR"', "12.50 EUR"),
        (1234.5, EUROS, "1,234.50 €"), (0, EUROS, "- €"), (-3, "0", "-3"), (-0.001, "0.00", "0.00"), (1.005, "0.00", "1.01"),
        (45000, "yyyy-mm-dd", "2023-03-15"), (45000.75, "dd/mm/yyyy hh:mm", "15/03/2023 18:00"), (45000, "d mmmm yyyy", "15 March 2023"),
        (45000, "[$-407]ddd, d. mmm yy", "Wed, 15. Mar 23"), (0.75, "h:mm AM/PM", "6:00 PM"), (1.5, "[h]:mm:ss", "36:00:00"),
        (0.001, "mm:ss.0", "01:26.4"), (59, "yyyy-mm-dd", "1900-02-28"), (61, "d.m.yyyy", "1.3.1900"), (45000, 'yyyy"年"m"月"', "2023年3月"),
        (5551234567, "(000) 000-0000", "(555) 123-4567"), (123456789, "000-00-0000", "123-45-6789"), (4006381333931, "0 000000 000000", "4 006381 333931"),
        (12345678, "0.00E+00", "1.23E+07"), (123456, "##0.0E+0", "123.5E+3"), (2.25, "# ?/?", "2 1/4"), (0.333, "# ??/??", "1/3"),
        (1500000, '0.0,,"M"', "1.5M"), (0.5, "#.##", ".5"), (5, "0.##", "5"), (3, '[<10]0" few";0" many"', "3 few"), (15, 'General" pcs"', "15 pcs"),
        (1, '"Q"0', "Q1"), (100, '0"°C"', "100°C"), (-5, "0;[Red]-0", "-5"), (43831, BUILT_IN[14], "2020-01-01"), (9, BUILT_IN[9], "900%"),
    ],
)  # fmt: skip
def test_formats(value: float, code: str, expected: str) -> None:
    assert shown(value, code) == expected


def test_dates_from_1904_and_other_text() -> None:
    assert shown(43538, "yyyy-mm-dd", date_1904=True) == "2023-03-15"
    assert number_text("1234", "000000") == "001234"
    assert number_text("#DIV/0!", "0.00") == "#DIV/0!"


@settings(max_examples=300, deadline=None)
@given(st.floats(-1e15, 1e15), st.text('0#?.,/%@;"\\_* E+-dmyhsAP[]<>=$GenralQ', max_size=20))
def test_any_code_shows_something(value: float, code: str) -> None:
    text = shown(value, code)
    assert "\n" not in text
    assert len(text) < 400


@given(st.integers(-(10**15), 10**15))
def test_whole_numbers_keep_their_digits(value: int) -> None:
    assert shown(value) == str(value)
    assert shown(value, "#,##0").replace(",", "") == str(value)
