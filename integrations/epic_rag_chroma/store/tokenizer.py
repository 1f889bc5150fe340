"""What keyword search takes for a word: the terms of a text, the same for chunks and for queries.

FTS5's own tokenizer keeps `getUserName` and a whole Chinese sentence as one word each, and splits `3.11` without a
trace. So a text is taken apart here, and the terms are handed over separated by spaces:

* A compound (`get_user_name`, `os.path.join`, `git-rebase`, `3.11`) gives its parts and the whole without punctuation,
  so that it is found by a part, and best by its own name however that is written.
* CamelCase gives the whole and its parts; so does a word that ends in digits (`python3`).
* Scripts without spaces between words (Chinese, Japanese, Thai, ...; Korean, whose words carry particles) give
  pairs of characters, as is usual, and the single characters for a query of only one.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

__all__ = ["RUN", "STOP_WORDS", "TERMS_VERSION", "UNSPACED_RUN", "document_terms", "query_terms", "words"]


# Raised whenever the same text would give other terms: words that were stored before are made again.
TERMS_VERSION = 1
_LONGEST = 128

_STOP_WORDS = """
    a about am an and any are as at be been being but by can could did do does doing for from had has have having how
    i if in into is it its may me might must my no not of on or our shall should so some such than that the their them
    then there these they this those to was we were what when where which while who whom whose why will with would you
    your"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

# Marks that words of many scripts contain and `\w` leaves out: Hebrew, Arabic, the scripts of India and their kin.
_MARKS = (
    "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff\u0e00-\u0eff"
    "\u1000-\u109f\u1780-\u17ff"
)
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
_COMPOUND = re.compile(rf"[\w{_MARKS}]+(?:(?:[.\-'\u2019]|::|->)[\w{_MARKS}]+)*")
RUN = re.compile(rf"[{_UNSPACED}]+|(?:(?![_{_UNSPACED}])[\w{_MARKS}])+")
UNSPACED_RUN = re.compile(rf"[{_UNSPACED}]+")
_POSSESSIVE = re.compile(r"['\u2019]s$", re.IGNORECASE)
_CAMEL = re.compile(r"[A-Z]+(?![^\W\dA-Z])|[A-Z]?[^\W\dA-Z]+|\d+")
_NUMBERED = re.compile(r"([^\W\d]{2,})\d+")


def document_terms(text: str) -> str:
    """The terms of a chunk, in order and as often as they occur, separated by spaces."""
    found: list[str] = []
    for compound in _COMPOUND.findall(unicodedata.normalize("NFKC", text)):
        found += _expand(compound)
    return " ".join(found)


def query_terms(text: str) -> list[str]:
    """The terms of a query, each once, without stop words unless there is nothing else."""
    telling: dict[str, None] = {}
    others: dict[str, None] = {}
    for compound in _COMPOUND.findall(unicodedata.normalize("NFKC", text)):
        terms = _expand(compound)
        if len(terms) == 1 and terms[0] in STOP_WORDS:
            others[terms[0]] = None
        elif UNSPACED_RUN.search(compound):
            telling.update(dict.fromkeys(_pairs_where_possible(terms)))
        else:
            telling.update(dict.fromkeys(terms))
    return list(telling or others)


def _pairs_where_possible(terms: tuple[str, ...]) -> list[str]:
    """Single characters match nearly everything; they count only where the query has nothing longer."""
    longer = [term for term in terms if len(term) > 1]
    return longer or list(terms)


@lru_cache(maxsize=65536)
def _expand(compound: str) -> tuple[str, ...]:
    """The terms of a word with whatever it is joined to."""
    compound = _POSSESSIVE.sub("", compound)
    runs = RUN.findall(compound)
    terms: list[str] = []
    if len(runs) > 1 and not UNSPACED_RUN.search(compound):
        whole = "".join(runs).casefold()
        if len(whole) <= _LONGEST:
            terms.append(whole)
        # Single letters are what is left of "e-mail" and "don't".
        runs = [run for run in runs if len(run) > 1 or run.isdigit()]
    for run in runs:
        terms += _pairs(run) if UNSPACED_RUN.match(run) else _parts(run)
    return tuple(terms)


def _pairs(run: str) -> list[str]:
    return [*run, *(run[start : start + 2] for start in range(len(run) - 1))]


def _parts(run: str) -> list[str]:
    whole = run.casefold()
    if len(whole) > _LONGEST:
        return []  # no word that anyone would type, but perhaps megabytes of base64
    if whole.isalpha() and (run == whole or run[1:] == whole[1:] or run.isupper()):
        return [whole]
    numbered = _NUMBERED.fullmatch(run)
    parts = [numbered[1].casefold()] if numbered else []
    pieces = [piece.casefold() for piece in _CAMEL.findall(run) if piece.isalpha()]
    if len(pieces) > 1:
        parts = [piece for piece in pieces if len(piece) > 1]
    return [whole, *(part for part in parts if part != whole)]


def words(text: str) -> list[str]:
    """The words of a text without regard to case and punctuation; single characters in scripts without spaces."""
    found: list[str] = []
    for run in RUN.findall(unicodedata.normalize("NFKC", text)):
        if UNSPACED_RUN.match(run):
            found += run
        else:
            found.append(run.casefold())
    return found
