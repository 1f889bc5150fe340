"""Numbers as a spreadsheet shows them, by their format codes: 001234, 15.3 %, 4,006.50 EUR, 2026-03-01."""

from __future__ import annotations

import datetime
import re
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

__all__ = ["BUILT_IN", "number_text", "shown"]


# The codes that files refer to by number alone.
BUILT_IN = {
    0: "General", 1: "0", 2: "0.00", 3: "#,##0", 4: "#,##0.00", 5: '"$"#,##0', 6: '"$"#,##0', 7: '"$"#,##0.00',
    8: '"$"#,##0.00', 9: "0%", 10: "0.00%", 11: "0.00E+00", 12: "# ?/?", 13: "# ??/??", 14: "yyyy-mm-dd",
    15: "d-mmm-yy", 16: "d-mmm", 17: "mmm-yy", 18: "h:mm AM/PM", 19: "h:mm:ss AM/PM", 20: "h:mm", 21: "h:mm:ss",
    22: "yyyy-mm-dd h:mm", 37: "#,##0;(#,##0)", 38: "#,##0;(#,##0)", 39: "#,##0.00;(#,##0.00)",
    40: "#,##0.00;(#,##0.00)", 41: "#,##0", 42: '"$"#,##0', 43: "#,##0.00", 44: '"$"#,##0.00', 45: "mm:ss",
    46: "[h]:mm:ss", 47: "mm:ss.0", 48: "##0.0E+0", 49: "@",
}  # fmt: skip

_TOKEN = re.compile(
    r'"(?P<quoted>[^"]*)"?|\\(?P<escaped>.)|_.|\*.|\[\$(?P<currency>[^\]-]*)[^\]]*\]|\[(?P<elapsed>[hms]+)\]'
    r"|\[(?P<condition>(?:<=|>=|<>|<|>|=)[^\]]*)\]|\[[^\]]*\]|(?P<general>General|Standard)"
    r"|(?P<half>AM/PM|A/P)|(?P<exponent>E[+-])|(?P<date>y+|m+|d+|h+|s+(?:\.0+)?|e+|g+)"
    r"|(?P<digits>[0#?.,/%@]+)|(?P<other>.)",
    re.IGNORECASE | re.DOTALL,
)
_MONTH_NAMES = "January February March April May June July August September October November December"
_MONTHS = tuple(_MONTH_NAMES.split())
_DAY_NAMES = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_DAYS = tuple(_DAY_NAMES.split())
_EPOCH = datetime.datetime(1899, 12, 30)
_MAX_SERIAL = 2_958_466  # the year 10000
_MAX_DIGITS = 40


class _Section(NamedTuple):
    """One of up to four parts of a format code: tokens as (kind, text), and the condition of its use."""

    tokens: tuple[tuple[str, str], ...]
    condition: str

    @property
    def is_date(self) -> bool:
        return any(kind in ("date", "elapsed") for kind, _ in self.tokens)


def number_text(text: str, code: str, *, date_1904: bool = False) -> str:
    """Return a number in a file as it is shown in a format; other text unchanged."""
    try:
        value = float(text)
    except ValueError:
        return text
    return shown(value, code, date_1904=date_1904)


def shown(value: float, code: str = "General", *, date_1904: bool = False) -> str:
    """Return a number as it is shown in a format.

    Args:
        value: The number; for a date, the days since 1899-12-30.
        code: The format code ("0.0%").
        date_1904: Count days from 1904-01-01.
    """
    value = float(value)
    if value != value or value in (float("inf"), -float("inf")):
        return str(value)
    try:
        sections = _sections(code)
        section, value = _section_for(sections, value)
        if section.is_date:
            return _date(section, value + 1462 * date_1904)
        return _number(section, value)
    except (ValueError, OverflowError, InvalidOperation, IndexError, ZeroDivisionError):
        return _general(value)  # a code of another program


@lru_cache(maxsize=512)
def _sections(code: str) -> tuple[_Section, ...]:
    sections: list[_Section] = []
    tokens: list[tuple[str, str]] = []
    condition = ""
    for match in _TOKEN.finditer(code):
        kind = match.lastgroup or "space"
        text = match.group(kind) if match.lastgroup else " " if match.group().startswith("_") else ""
        if kind == "other" and text == ";":
            sections.append(_Section(tuple(tokens), condition))
            tokens, condition = [], ""
        elif kind == "condition":
            condition = text
        elif kind in ("quoted", "escaped", "currency", "other", "space"):
            tokens.append(("text", text))
        else:
            tokens.append((kind, text))
    return (*sections, _Section(tuple(tokens), condition))


def _section_for(sections: tuple[_Section, ...], value: float) -> tuple[_Section, float]:
    """Return the section that a number is shown by, and the number without the sign that the section stands for."""
    numeric = sections[:3]
    if any(section.condition for section in numeric):
        for section in numeric:
            match = re.match(r"(<=|>=|<>|<|>|=)(.*)", section.condition)
            if match is None:
                return section, value
            operator, limit = match.group(1), float(match.group(2))
            if {
                "<": value < limit, ">": value > limit, "=": value == limit,
                "<=": value <= limit, ">=": value >= limit, "<>": value != limit,
            }[operator]:  # fmt: skip
                return section, abs(value) if value < 0 and len(numeric) > 1 else value
        return numeric[-1], value
    if value < 0 and len(numeric) > 1:
        return numeric[1], -value
    if value == 0 and len(numeric) > 2:
        return numeric[2], value
    return numeric[0], value


def _general(value: float) -> str:
    """Return a number with up to 15 digits, whole numbers as such."""
    if value.is_integer() and abs(value) < 1e21:
        return str(int(value))
    return f"{value:.15g}"


def _number(section: _Section, value: float) -> str:
    codes = "".join(text for kind, text in section.tokens if kind == "digits")
    if any(kind == "general" for kind, _ in section.tokens) or not codes:
        shown_text = "".join(
            _general(value) if kind == "general" else text
            for kind, text in section.tokens
            if kind in ("general", "text")
        )
        return " ".join(shown_text.split()) if shown_text.strip() else "" if section.tokens else _general(value)
    if "@" in codes:
        return _general(value)
    if "/" in codes:
        return _fraction(codes, value)
    pattern = codes.replace("%", "")
    number = Decimal(repr(value)) * Decimal(100) ** codes.count("%")
    whole_code, point, decimal_code = pattern.partition(".")
    decimal_code = decimal_code.replace(",", "").replace(".", "")[:_MAX_DIGITS]
    scale = len(whole_code) - len(whole_code.rstrip(",")) if not point else len(pattern) - len(pattern.rstrip(","))
    number /= Decimal(1000) ** scale
    grouped = "," in whole_code.rstrip(",")
    whole_code = whole_code.replace(",", "")
    exponent = ""
    kinds = [kind for kind, _ in section.tokens]
    if "exponent" in kinds:
        at = kinds.index("exponent")
        after = sum(len(text) for kind, text in section.tokens[at:] if kind == "digits")
        decimal_code = decimal_code[: max(0, len(decimal_code) - after)]
        power = number.adjusted() if number else 0
        power -= power % len(whole_code) if len(whole_code) > 1 else 0
        number = number.scaleb(-power)
        exponent = f"E{power:+0{after + 1}d}"
    rounded = abs(number).quantize(Decimal(1).scaleb(-len(decimal_code)), ROUND_HALF_UP)
    whole, _, decimals = f"{rounded:f}".partition(".")
    least = whole_code.count("0")
    whole = whole.zfill(least) if least or whole != "0" else ""
    if grouped:
        whole = re.sub(r"(?<=\d)(?=(?:\d{3})+$)", ",", whole)
    optional = len(decimal_code) - len(decimal_code.rstrip("#?"))
    while optional and decimals.endswith("0"):
        decimals, optional = decimals[:-1], optional - 1
    sign = "-" if number < 0 and (rounded or exponent) else ""
    return _with_text(section, sign, whole, decimals, exponent, interleaved=not grouped and not point and not exponent)


def _with_text(section: _Section, sign: str, whole: str, decimals: str, exponent: str, *, interleaved: bool) -> str:
    """Put the text of a section around its number, or between the digits (of a telephone number, 000-0000)."""
    tokens = [(kind, text) for kind, text in section.tokens if kind in ("digits", "text", "exponent")]
    places = [at for at, (kind, text) in enumerate(tokens) if kind == "digits" and text.strip("%")]
    if not places:
        return "".join(text for _, text in tokens)
    parts = [text for _, text in tokens]
    digits = whole + (f".{decimals}" if decimals else "") + exponent
    for at in range(places[0], places[-1] + 1):
        if tokens[at][0] == "exponent" or at in places:
            parts[at] = "%" * tokens[at][1].count("%")
    if interleaved and len(places) > 1:
        rest = whole
        for at in reversed(places[1:]):
            size = len(tokens[at][1].replace(",", ""))
            parts[at] = rest[max(0, len(rest) - size) :] + parts[at]
            rest = rest[: max(0, len(rest) - size)]
        digits = rest
    parts[places[0]] = sign + digits + parts[places[0]]
    if sign and places[0]:
        parts[places[0]] = parts[places[0]][1:]
        parts[0] = sign + parts[0]
    return " ".join("".join(parts).split())


def _fraction(code: str, value: float) -> str:
    whole_code, _, below = code.replace("%", "").partition("/")
    fixed = re.match(r"\d*[1-9]\d*", below)
    number = Fraction(repr(abs(value)))
    if fixed:
        limit = int(fixed.group())
        number = Fraction(round(number * limit), limit)
    else:
        number = number.limit_denominator(max(1, 10 ** min(len(below), 4) - 1))
    whole, rest = divmod(number, 1) if re.search(r"[0#?].*[0#?]", whole_code) else (0, number)
    parts = [str(whole)] if whole or not rest else []
    if rest:
        parts.append(f"{rest.numerator}/{rest.denominator}")
    return ("-" if value < 0 and number else "") + " ".join(parts)


def _date(section: _Section, value: float) -> str:
    if not 0 <= value < _MAX_SERIAL:
        raise ValueError("not a date")
    # The year 1900 has a 29 February for the programs that show dates by these codes.
    days = value + 1 if value < 60 else value
    tokens = section.tokens
    fine = max((len(text.partition(".")[2]) for kind, text in tokens if kind == "date" and text[0] in "sS"), default=0)
    moment = _EPOCH + datetime.timedelta(seconds=round(days * 86400, fine))
    if fine == 0 and moment.microsecond:
        moment = moment.replace(microsecond=0)
    total = round(value * 86400, fine)
    half_day = any(kind == "half" for kind, _ in tokens)
    parts: list[str] = []
    for at, (kind, text) in enumerate(tokens):
        if kind == "elapsed":
            unit = {"h": 3600, "m": 60, "s": 1}[text[0].lower()]
            parts.append(f"{int(total // unit):0{len(text)}d}")
        elif kind == "half":
            parts.append(("AM" if moment.hour < 12 else "PM")[: 1 if len(text) == 3 else 2])
        elif kind == "date":
            parts.append(_date_part(text.lower(), moment, half_day, _is_minute(tokens, at)))
        elif kind == "text" or (kind == "digits" and not text.strip(".,/")):
            parts.append(text)
    return " ".join("".join(parts).split())


def _is_minute(tokens: tuple[tuple[str, str], ...], at: int) -> bool:
    """Return whether an "m" means minutes: after hours, or before seconds."""
    units = [(place, text[0].lower()) for place, (kind, text) in enumerate(tokens) if kind in ("date", "elapsed")]
    place = [number for number, _ in units].index(at)
    before = units[place - 1][1] if place else ""
    after = units[place + 1][1] if place + 1 < len(units) else ""
    return before == "h" or after == "s"


def _date_part(code: str, moment: datetime.datetime, half_day: bool, minute: bool) -> str:
    unit, size = code[0], len(code.partition(".")[0])
    if unit in "ye":
        return f"{moment.year % 100:02d}" if size <= 2 and unit == "y" else f"{moment.year:04d}"
    if unit == "m" and not (minute and size <= 2):
        name = _MONTHS[moment.month - 1]
        return f"{moment.month:0{size}d}" if size <= 2 else name[:3] if size == 3 else name[0] if size == 5 else name
    if unit == "d":
        name = _DAYS[moment.weekday()]
        return f"{moment.day:0{size}d}" if size <= 2 else name[:3] if size == 3 else name
    if unit == "h":
        hour = (moment.hour % 12 or 12) if half_day else moment.hour
        return f"{hour:0{min(size, 2)}d}"
    if unit == "m":
        return f"{moment.minute:0{size}d}"
    if unit == "s":
        fine = code.partition(".")[2]
        return f"{moment.second:0{min(size, 2)}d}" + (f".{moment.microsecond:06d}"[: len(fine) + 1] if fine else "")
    return ""
