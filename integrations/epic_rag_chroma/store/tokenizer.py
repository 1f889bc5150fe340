"""Tokenizer of the keyword index: the terms of a text, the same for chunks and for queries.

FTS5's tokenizer keeps `getUserName` and a whole Chinese sentence as one word each, and splits `3.11`. So texts are
tokenized here, and FTS5 gets the terms separated by spaces:

* A compound (`get_user_name`, `os.path.join`, `git-rebase`, `3.11`) gives its parts and the whole without punctuation:
  it is found by a part, and best by its full name in any spelling.
* CamelCase gives the whole and its parts; so does a word that ends in digits (`python3`).
* Scripts without spaces between words (Chinese, Japanese, Thai, ...; also Korean, whose words carry particles) give
  character bigrams, and single characters for queries of one character.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

__all__ = ["RUN", "STOP_WORDS", "TERMS_VERSION", "UNSPACED_RUN", "document_terms", "query_terms", "words"]


# Increased whenever a text gives other terms than before; stored keyword indexes are then rebuilt.
TERMS_VERSION = 1
_LONGEST = 128

_STOP_WORDS = """
    a about am an and any are as at be been being but by can could did do does doing for from had has have having how
    i if in into is it its may me might must my no not of on or our shall should so some such than that the their them
    then there these they this those to was we were what when where which while who whom whose why will with would you
    your"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

# Combining marks within words that `\w` does not match: Hebrew, Arabic, the scripts of India and stop_words.
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
_ASCII_RUN = re.compile(r"[a-z0-9]+")
_POSSESSIVE = re.compile(r"['\u2019]s$", re.IGNORECASE)
_CAMEL = re.compile(r"[A-Z]+(?![^\W\dA-Z])|[A-Z]?[^\W\dA-Z]+|\d+")
_NUMBERED = re.compile(r"([^\W\d]{2,})\d+")


def document_terms(text: str) -> str:
    """Return the terms of a chunk, in order and with repetitions, separated by spaces."""
    found: list[str] = []
    for compound in _COMPOUND.findall(unicodedata.normalize("NFKC", text)):
        found += _expand(compound)
    return " ".join(found)


def query_terms(text: str) -> list[str]:
    """Return the distinct terms of a query, without stop words unless there is nothing else."""
    content: dict[str, None] = {}
    stop_words: dict[str, None] = {}
    for compound in _COMPOUND.findall(unicodedata.normalize("NFKC", text)):
        terms = _expand(compound)
        if len(terms) == 1 and terms[0] in STOP_WORDS:
            stop_words[terms[0]] = None
        elif UNSPACED_RUN.search(compound):
            content.update(dict.fromkeys(_pairs_where_possible(terms)))
        else:
            content.update(dict.fromkeys(terms))
    return list(content or stop_words)


def _pairs_where_possible(terms: tuple[str, ...]) -> list[str]:
    """Drop single characters, which match nearly everything, unless the query has nothing longer."""
    longer = [term for term in terms if len(term) > 1]
    return longer or list(terms)


@lru_cache(maxsize=65536)
def _expand(compound: str) -> tuple[str, ...]:
    """Return the terms of a compound."""
    compound = _POSSESSIVE.sub("", compound)
    runs = RUN.findall(compound)
    terms: list[str] = []
    if len(runs) > 1 and not UNSPACED_RUN.search(compound):
        whole = "".join(runs).casefold()
        if len(whole) <= _LONGEST:
            terms.append(whole)
        # Single letters come from "e-mail" and "don't".
        runs = [run for run in runs if len(run) > 1 or run.isdigit()]
    for run in runs:
        terms += _pairs(run) if UNSPACED_RUN.match(run) else _parts(run)
    return tuple(terms)


def _pairs(run: str) -> list[str]:
    return [*run, *(run[start : start + 2] for start in range(len(run) - 1))]


def _parts(run: str) -> list[str]:
    whole = run.casefold()
    if len(whole) > _LONGEST:
        return []  # perhaps megabytes of base64
    if whole.isalpha() and (run == whole or run[1:] == whole[1:] or run.isupper()):
        return [whole]
    numbered = _NUMBERED.fullmatch(run)
    parts = [numbered[1].casefold()] if numbered else []
    pieces = [piece.casefold() for piece in _CAMEL.findall(run) if piece.isalpha()]
    if len(pieces) > 1:
        parts = [piece for piece in pieces if len(piece) > 1]
    return [whole, *(part for part in parts if part != whole)]


def words(text: str) -> list[str]:
    """Return the words of a text, case-folded and without punctuation; characters in scripts without spaces."""
    if text.isascii():  # five times as fast
        return _ASCII_RUN.findall(text.lower())
    found: list[str] = []
    for run in RUN.findall(unicodedata.normalize("NFKC", text)):
        if UNSPACED_RUN.match(run):
            found += run
        else:
            found.append(run.casefold())
    return found
