"""Tokenizer of the keyword index: the terms of a text and of a query.

FTS5's tokenizers keep `getUserName` and a whole Chinese sentence as one word each, split `3.11` and `C++`, and take the
vowel signs of India for separators. So texts are tokenized here, and FTS5 gets terms separated by spaces:

* `normalize` makes one spelling of a text: NFKC, no diacritics (also strokes, as in "Łódź"), one apostrophe, Arabic and
  Hebrew letters without points and final forms. Signs that make another word stay: vowel signs of India, tone marks
  of Thai, the voicing of kana, "й".
* A text gives its words in order, for phrases, and further terms: stems, the parts of a compound and the whole of it
  without punctuation (`get_user_name`, `os.path.join`, "e-mail", `--no-verify`), so that it is found by a part, and
  best by its full name in any spelling.
* Numbers keep their order and borders: "v1.2.3" gives "1.2.3", "1.2" and "1", so that it is found by what it begins
  with. Thousands separators are dropped; a number and its unit are two words and one.
* Scripts without spaces between words (Chinese, Japanese, Thai, Khmer, ...; also Korean, whose words carry particles)
  give pairs of characters, and single ones for queries of one character.

Words are stemmed by the Snowball stemmer of the language: by the script, and in Latin script by a text's function
words. A query gives the stems of all languages of the index.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from epic_rag_chroma.store.languages import ENGLISH, FUNCTION_WORDS, STOP_WORDS, stems_of, text_language

__all__ = [
    "SPLIT_RUN",
    "TERMS_VERSION",
    "DocumentTerms",
    "ParsedQuery",
    "Piece",
    "QueryWord",
    "document_terms",
    "language_of",
    "normalize",
    "parse_query",
    "pieces",
    "plain_query",
    "possible_options",
    "words",
]


# Increased whenever a text gives other terms than before; stored keyword indexes are then rebuilt.
TERMS_VERSION = 2
_LONGEST = 128

# Characters that are drawn as nothing, and marks that a word is the same word without. Vowel signs and tone marks of
# other scripts are letters of their words.
_IGNORED = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\U000e0000-\U000e0fff"
)
_DIACRITICS = (
    "\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670"
    "\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed\u0711\u0730-\u074a\u0898-\u089f\u08ca-\u08ff\u093c\u1ab0-\u1aff"
    "\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
)
_REMOVED = re.compile(f"[{_IGNORED}]+")
_DIACRITIC = re.compile(f"[{_DIACRITICS}]")
# Letters that no decomposition relates, or that are not to be decomposed.
_LETTERS: dict[int, str] = {
    ord(letter): to
    for letters, to in {
        "ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "þ": "th", "Þ": "Th", "ðđ": "d", "ÐĐ": "D",
        "\u0131": "i", "ŋ": "n", "Ŋ": "N", "ĸ": "k", "\u017f": "s", "ə": "e", "Ə": "E", "ς": "\u03c3",
        "\u0439": "\u0439", "\u0419": "\u0419", "ँ": "ं", "\u066b": ".", "\u066c": ",", "\u00b7\u05f4": "",
        "\u0622\u0623\u0625\u0671": "\u0627", "\u0649\u06cc\u0626\u06cd\u06d0\u06d2": "ي", "\u0624": "و",
        "\u0629\u06c0\u06c1\u06be\u06d5\u06c2": "\u0647", "\u06a9\u06aa": "ك",
        "ך": "כ", "ם": "מ", "\u05df": "נ", "ף": "פ", "ץ": "צ",
        "`\u00b4\u2018\u2019\u201b\u2032\u02b9\u02bb\u02bc\u02bd\u02be\u02bf\u055a\u05f3\ua78c": "'",
        "\u2010\u2011\u2212\u05be": "-",
    }.items()
    for letter in letters
}  # fmt: skip
_VARIANT = re.compile(r"((?:LATIN|CYRILLIC|GREEK)(?: (?:SMALL|CAPITAL))? LETTER(?: DOTLESS)? \w+) WITH ")
_DEAD_NASAL = re.compile("ङ्(?=[क-घ])|ञ्(?=[च-झ])|ण्(?=[ट-ढ])|न्(?=[त-ध])|म्(?=[प-भ])")

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u3005\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaadf\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
# In normalized text, all that is neither ASCII nor white space is part of a word.
_WORD = r"[^\x00-/:-@\[-^`{-\x7f]"
_JOINER = r"(?:://|::|->|[.\-'@/\\&:]|,(?=\d))"
_COMPOUND = re.compile(
    rf"(?:(?<![\w.\-])(?:--?(?=[^\W\d])|\.(?=[^\W\d]))|[@#](?={_WORD})|\$(?=[^\W\d]))?"
    rf"{_WORD}+(?:{_JOINER}{_WORD}+)*(?:\+\+|[+#](?![\w+#]))?"
)
_ATOM = re.compile(
    rf"\d{{4}}-\d\d-\d\d(?!\d)|\d+(?:[.,:']\d+)*|[{_UNSPACED}]+"
    rf"|(?:(?![_{_UNSPACED}])[^\W\d])(?:(?![{_UNSPACED}])(?:[^\W\d_]|[^\x00-\x7f\w]))*"
)
_SYLLABLE = re.compile(
    r"[\u0e40-\u0e44\u0ec0-\u0ec4]*."
    r"(?:[\u17d2\u1039\u1a60].|[\u0e30-\u0e3a\u0e45\u0e47-\u0e4e\u0eb0-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u1056-\u109d"
    r"\u17b4-\u17d1\u17d3\u17dd\u1a55-\u1a7f\u3099\u309a])*",
    re.DOTALL,
)
SPLIT_RUN = re.compile(rf"[{_UNSPACED}]+")
"""A run of characters of scripts without spaces between words, in normalized text."""
_UPPER = r"A-Z\u0391-\u03a9\u0410-\u042f\u0531-\u0556"
_CAMEL = re.compile(rf"[{_UPPER}]+(?![^\W\d{_UPPER}])|[{_UPPER}]?[^\W\d{_UPPER}]+")
_POSSESSIVE = re.compile(r"'[sS]$")
_ELISION = re.compile(
    r"(?:[cdjlmnst]|qu|jusqu|lorsqu|puisqu|quoiqu|un|[dns]?ell|all|dall|sull|quest|quell)'(?=[^\W\d]{2})", re.IGNORECASE
)
_WITHIN_WORD = re.compile(r"(?<=[^\W\d])'(?=[^\W\d])")
_SEGMENTS = re.compile(r"://|[@/\\&]|(?<!:)(?<!\d):(?!:)|(?<!:):(?![:\d])")
_THOUSANDS = re.compile(r"((?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:'\d{3})+))(\.\d+)?")
_POINT_THOUSANDS = re.compile(r"(\d{1,3}(?:\.\d{3})+)(?:,(\d+))?")
_NARROW_THOUSANDS = re.compile("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))")
_ISO_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_POINT_DATE = re.compile(r"(\d\d?)\.(\d\d?)\.(\d{4})")
_SERIAL_NUMBER = re.compile(r"\d+(?:-\d+)+X?", re.IGNORECASE)
_SERIAL_DIGITS = 7
_MOST_PIECES = 3
_ABBREVIATION = re.compile('(?<=[\u05d0-\u05ea])["\u05f4](?=[\u05d0-\u05ea])')
_ASCII_RUN = re.compile(r"[a-z0-9]+")


class _Folding(dict[int, str]):
    """Table for `str.translate` from a character to its letters without diacritics, filled as characters occur."""

    def __missing__(self, code: int) -> str:
        self[code] = folded = _fold(chr(code))
        return folded


def _fold(character: str) -> str:
    if _DIACRITIC.match(character):
        return ""
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category[0] not in "LMN":
        return " "
    base = unicodedata.normalize("NFD", character)
    if len(base) > 1 and _DIACRITIC.search(base):
        return normalize(_DIACRITIC.sub("", base))
    plain = _VARIANT.match(unicodedata.name(character, ""))
    if plain is not None:
        try:
            return unicodedata.lookup(plain[1].replace(" DOTLESS", ""))
        except KeyError:
            pass
    return character


_FOLDING = _Folding(_LETTERS)
_FOLDING.update({code: chr(code) for code in range(128) if code != ord("`")})


def normalize(text: str) -> str:
    """Return a text in the one spelling in which words are compared, except for case; line ends stay.

    All that is neither ASCII nor part of a word becomes a space.
    """
    if text.isascii():
        return text.replace("`", "'") if "`" in text else text
    text = _ABBREVIATION.sub("", _NARROW_THOUSANDS.sub("", text))
    text = unicodedata.normalize("NFKC", _REMOVED.sub("", text))
    text = unicodedata.normalize("NFKC", text.translate(_FOLDING))
    return _DEAD_NASAL.sub("ं", text) if "\u094d" in text else text


class DocumentTerms(NamedTuple):
    """Terms of a text, separated by spaces: its words in order, stems and parts of them, and wholes and numbers."""

    sequence: str
    parts: str
    wholes: str


class _Analysis(NamedTuple):
    """Terms of a compound.

    Args:
        sequence: Its words in order.
        parts: Words within a word, and other words that are stemmed but are not in order.
        more: Terms of a document besides, which are not stemmed.
        asked: Terms of a query besides, which are not stemmed.
        skipped: Words of the sequence that no query is searched by, unless in a phrase.
    """

    sequence: tuple[str, ...]
    parts: tuple[str, ...]
    more: tuple[str, ...]
    asked: tuple[str, ...]
    skipped: frozenset[str]


def document_terms(text: str, language: str) -> DocumentTerms:
    """Return the terms of a text in a language."""
    sequence: list[str] = []
    parts: list[str] = []
    wholes: list[str] = []
    languages = (ENGLISH,) if language == ENGLISH else (ENGLISH, language)
    for compound in _COMPOUND.findall(normalize(text)):
        found = _analyse(compound)
        sequence += found.sequence
        parts += found.parts
        wholes += found.more
        wholes += (stem for whole in found.more for stem in stems_of(whole, (ENGLISH,)) if stem != whole)
        for word in (*found.sequence, *found.parts):
            parts += (stem for stem in stems_of(word, languages) if stem != word)
    return DocumentTerms(" ".join(sequence), " ".join(parts), " ".join(wholes))


def language_of(text: str) -> str:
    """Return the language of a text in Latin script; see `text_language`."""
    return text_language(words(text))


@lru_cache(maxsize=65536)
def _analyse(compound: str) -> _Analysis:
    """Return the terms of a compound."""
    core = compound.lstrip("-@$#.")
    suffix = core[len(core.rstrip("+#")) :]
    core = core[: len(core) - len(suffix)]
    symbol = compound[: len(compound) - len(core) - len(suffix)]
    core = _POSSESSIVE.sub("", core)
    sequence: list[str] = []
    parts: list[str] = []
    more: list[str] = []
    asked: list[str] = []
    skipped: set[str] = set()
    segments = [segment for segment in _SEGMENTS.split(core) if segment]
    if (symbol or len(segments) > 1) and len(core) <= _LONGEST:
        whole = (symbol + core + suffix).casefold().replace("'", "")
        more.append(whole)
        asked.append(whole)
    for segment in segments:
        found = _analyse_segment(segment)
        sequence += found.sequence
        parts += found.parts
        more += found.more
        asked += found.asked
        skipped |= found.skipped
    if suffix and sequence:
        # "C++" is another word than "C", but "notepad++" is also found as "notepad".
        bare = sequence[-1]
        sequence[-1] = bare + suffix
        if len(bare) > 1:
            parts.append(bare)
    return _Analysis(
        tuple(sequence),
        tuple(dict.fromkeys(parts)),
        tuple(dict.fromkeys(more)),
        tuple(dict.fromkeys(asked)),
        frozenset(skipped),
    )


def _analyse_segment(segment: str) -> _Analysis:
    more: list[str] = []
    asked: list[str] = []
    elided = _ELISION.match(segment)
    if elided is not None:
        more.append(_WITHIN_WORD.sub("", segment).casefold())
        segment = segment[elided.end() :]
    segment = _WITHIN_WORD.sub("", segment)
    groups: list[list[str]] = []  # atoms without anything between them
    end = -1
    for match in _ATOM.finditer(segment):
        if len(match[0]) <= _LONGEST or SPLIT_RUN.match(match[0]):  # others are perhaps megabytes of base64
            if match.start() == end:
                groups[-1].append(match[0])
            else:
                groups.append([match[0]])
        end = match.end()
    sequence: list[str] = []
    parts: list[str] = []
    skipped: set[str] = set()
    for group in groups:
        if len(group) > 1 and group[0] in ("v", "V") and "." in group[1]:
            del group[0]
        joined = "".join(group).casefold()
        if len(group) > _MOST_PIECES and joined.isascii() and joined.isalnum():
            group[:] = [joined]  # a hash
        elif len(group) > 1 and len(joined) <= _LONGEST and not SPLIT_RUN.search(joined):
            more.append(joined)
            asked.append(joined)
        for atom in group:
            if SPLIT_RUN.match(atom):
                syllables = _SYLLABLE.findall(atom)
                pairs = ["".join(pair) for pair in pairwise(syllables)]
                sequence += pairs or syllables
                more += syllables
            elif atom[0].isdigit():
                numbers, begins, same = _number(atom)
                sequence += numbers
                more += begins + same
                asked += same
            else:
                sequence.append(atom.casefold())
                if not atom.isupper() and atom[1:] != atom[1:].lower():
                    pieces = _CAMEL.findall(atom)
                    if len(pieces) > 1:
                        parts += (piece.casefold() for piece in pieces if len(piece) > 1)
                        asked.append(sequence[-1])
                        skipped.add(sequence[-1])
    if len(groups) > 1 and not SPLIT_RUN.search(segment):
        whole = "".join(sequence)
        if len(whole) <= _LONGEST:
            more.append(whole)
            asked.append(whole)
        if _SERIAL_NUMBER.fullmatch(segment) and sum(map(str.isdigit, segment)) >= _SERIAL_DIGITS:
            more.append(segment)
            asked.append(segment)
    # Single letters of "e-mail" and "H2O" are in too many texts.
    if asked:
        skipped |= {each for each in sequence if len(each) == 1 and each.isascii() and each.isalpha()}
    return _Analysis(tuple(sequence), tuple(parts), tuple(more), tuple(asked), frozenset(skipped))


def _number(atom: str) -> tuple[list[str], list[str], list[str]]:
    """Return the numbers of an atom in order, what they begin with, and other spellings of them."""
    if atom.isdigit():
        return [atom], [], []
    if _ISO_DATE.fullmatch(atom):
        return [atom], [atom[:7], atom[:4]], []
    thousands = _THOUSANDS.fullmatch(atom)
    if thousands is not None:
        whole = thousands[1].replace(",", "").replace("'", "")
        fraction = (thousands[2] or "").rstrip("0").rstrip(".")
        return [whole + fraction], [whole] if fraction else [], []
    points = _POINT_THOUSANDS.fullmatch(atom)
    if points is not None and (points[2] or "," not in atom):
        whole = points[1].replace(".", "")
        if points[2] is not None:
            fraction = points[2].rstrip("0")
            return [f"{whole}.{fraction}" if fraction else whole], [whole] if fraction else [], []
        return [atom], _beginnings(atom), [whole]
    date = _POINT_DATE.fullmatch(atom)
    if date is not None:
        return [atom], _beginnings(atom), [f"{date[3]}-{int(date[2]):02}-{int(date[1]):02}"]
    if atom.count(",") == 1 and "." not in atom and ":" not in atom:
        return [atom.replace(",", ".")], atom.split(","), []
    numbers = re.split("[,']", atom)
    return numbers, [begin for number in numbers for begin in _beginnings(number)], []


def _beginnings(number: str) -> list[str]:
    """Return "1.2" and "1" for "1.2.3"."""
    return [number[: match.start()] for match in re.finditer("[.:]", number)]


class QueryWord(NamedTuple):
    """A word of a query: its words in order (several for a compound), and what it is searched by.

    Args:
        sequence: Its words in order.
        wholes: Terms that are not stemmed.
        words: Words whose stems are terms; the sequence without single letters, and words within words.
    """

    sequence: tuple[str, ...]
    wholes: tuple[str, ...]
    words: tuple[str, ...]

    def terms(self, languages: Sequence[str]) -> tuple[str, ...]:
        """Return the terms that the word is searched by in an index of these languages."""
        stems = (stem for each in self.words for stem in stems_of(each, languages))
        return tuple(dict.fromkeys((*self.wholes, *stems)))


@dataclass(frozen=True)
class ParsedQuery:
    """A query with its syntax read.

    Args:
        text: The query without its syntax and without what it excludes: the text to embed.
        words: The words to rank by, also those of phrases; without stop words unless there is nothing else.
        phrases: Words in quotes, of which every hit has all, in order.
        excluded: Phrases and words that no hit has.
    """

    text: str
    words: tuple[QueryWord, ...]
    phrases: tuple[tuple[str, ...], ...] = ()
    excluded: tuple[QueryWord, ...] = ()

    @property
    def has_syntax(self) -> bool:
        """True if hits are restricted by phrases or excluded words."""
        return bool(self.phrases or self.excluded)


_QUOTED = re.compile(
    r"(?<![^\s(])(-?)(?:\"([^\"]*)\"|\u201c([^\u201c\u201d]*)\u201d|\u201e([^\u201c-\u201e]*)[\u201c\u201d]"
    r"|\u00ab([^\u00ab\u00bb]*)\u00bb)(?!\w)"
)
# A letter behind the dash is an option ("-v"), a digit a negative number.
_EXCLUDED = re.compile(r"(?<!\S)-(?=[^\W\d_]{2})(\S+)")
_MOST_WORDS_WITH_SYNTAX = 40


@lru_cache(maxsize=256)
def parse_query(text: str, options: frozenset[str] = frozenset()) -> ParsedQuery:
    """Parse a query: words, "quoted phrases", and -excluded words or -"phrases".

    A query that only excludes has no syntax, nor has a long text.

    Args:
        text: The query.
        options: Words that are searched for with the dash before them.
    """
    if ('"' not in text and "-" not in text and text.isascii()) or len(text.split()) > _MOST_WORDS_WITH_SYNTAX:
        return plain_query(text)
    phrases: list[tuple[str, ...]] = []
    excluded: list[QueryWord] = []

    def quoted(match: re.Match[str]) -> str:
        content = next((group for group in match.groups()[1:] if group is not None), "")
        sequence = tuple(each for compound in _compounds(content) for each in _analyse(compound).sequence)
        if not sequence:
            return f" {content} "
        if match[1]:
            excluded.append(QueryWord(sequence, (), ()))
            return " "
        phrases.append(sequence)
        return f" {content} "

    def without(match: re.Match[str]) -> str:
        compounds = _compounds(match[1])
        if match[0] in options or not compounds:
            return match[0]
        excluded.extend(QueryWord(found.sequence, (), found.sequence) for found in map(_analyse, compounds))
        return " "

    rest = _EXCLUDED.sub(without, _QUOTED.sub(quoted, text))
    found = _query_words(rest)
    if not found:
        return plain_query(text)
    if not phrases and not excluded:
        return ParsedQuery(text, found)
    return ParsedQuery(" ".join(rest.split()), found, tuple(phrases), tuple(excluded))


def plain_query(text: str) -> ParsedQuery:
    """Return a query without syntax: quotes and dashes have no meaning."""
    return ParsedQuery(text, _query_words(text))


def possible_options(query: str) -> list[str]:
    """Return the words of a query that begin with a dash, which are either excluded or options of a command."""
    return [match[0] for match in _EXCLUDED.finditer(query)] if "-" in query else []


def _compounds(text: str) -> list[str]:
    return _COMPOUND.findall(normalize(text))


def _query_words(text: str) -> tuple[QueryWord, ...]:
    """Return the distinct words of a text, without stop words unless there is nothing else."""
    content: dict[QueryWord, None] = {}
    stop_words: dict[QueryWord, None] = {}
    compounds = _compounds(text)
    spoken = text_language(compound.casefold() for compound in compounds)
    skipped = STOP_WORDS | FUNCTION_WORDS.get(spoken, frozenset())
    for compound in compounds:
        found = _analyse(compound)
        if not found.sequence:
            continue
        is_stop_word = len(found.sequence) == 1 and not found.asked and found.sequence[0] in skipped
        searched = (*(each for each in found.sequence if each not in found.skipped), *found.parts)
        (stop_words if is_stop_word else content)[QueryWord(found.sequence, found.asked, searched)] = None
    return tuple(content or stop_words)


def words(text: str) -> list[str]:
    """Return the words of a text, case-folded and without punctuation; characters in scripts without spaces."""
    if text.isascii():  # five times as fast
        return _ASCII_RUN.findall(text.lower())
    found: list[str] = []
    for atom in _ATOM.findall(normalize(text)):
        if SPLIT_RUN.match(atom):
            found += atom
        else:
            found.append(atom.casefold())
    return found


class Piece(NamedTuple):
    """A piece of a normalized text: a compound, a word, or a part of one.

    Args:
        start: Its first character.
        end: The character after its last.
        text: Its characters.
        depth: 0 for a compound, 1 for a word or number, 2 for a word in a camel-case word or a pair of characters.
    """

    start: int
    end: int
    text: str
    depth: int

    def terms(self, languages: Sequence[str]) -> list[str]:
        """Return the terms that the piece as a whole is found by."""
        if self.depth == 2:
            return [self.text, *stems_of(self.text.casefold(), languages)]
        if self.depth == 1 and SPLIT_RUN.match(self.text):
            return [self.text]
        found = _analyse(self.text)
        if len(found.sequence) == 1:
            return [found.sequence[0], *found.more, *stems_of(found.sequence[0], languages)]
        return list(found.asked)

    def parts(self) -> list[Piece]:
        """Return the next smaller pieces."""
        if self.depth == 0:
            spans = [match.span() for match in _ATOM.finditer(self.text)]
        elif self.depth == 1 and SPLIT_RUN.match(self.text):
            ends = [match.end() for match in _SYLLABLE.finditer(self.text)]
            starts = [0, *ends]
            spans = [*zip(starts, ends[1:], strict=False), *zip(starts, ends, strict=False)]
        elif self.depth == 1:
            spans = [match.span() for match in _CAMEL.finditer(self.text)]
        else:
            spans = []
        return [
            Piece(self.start + start, self.start + end, self.text[start:end], self.depth + 1) for start, end in spans
        ]


def pieces(normalized: str) -> list[Piece]:
    """Return the compounds of a normalized text, in order."""
    return [Piece(match.start(), match.end(), match[0], 0) for match in _COMPOUND.finditer(normalized)]
