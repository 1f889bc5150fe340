"""Detection of the language of whole texts: by the letters of its script, in Latin script by function words.

It covers more languages than the keyword index has stems for. `benchmarks/languages.py` measures it on translations
into 50 languages; single words and names are too short for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from epic_rag.model_conventions import LANGUAGE_NAMES
from epic_rag_chroma.store.languages import spoken_language
from epic_rag_chroma.store.tokenizer import words

__all__ = ["detect_language", "main_language"]

_CODES = {name.lower(): code for code, name in LANGUAGE_NAMES.items()}

# Letters of a script with the language that writes it; where several do, the first is the one without marks of its own
# among its letters or words. A character of Chinese is about as much text as three letters.
_LETTERS_OF = {
    code: re.compile(letters)
    for code, letters in {
        "": "[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+",
        "zh": "[\u3400-\u4dbf\u4e00-\u9fff]+",
        "ja": "[\u3040-\u30ff\u31f0-\u31ff]+",
        "ko": "[\u1100-\u11ff\uac00-\ud7af]+",
        "ru": "[\u0400-\u052f]+",
        "el": "[\u0370-\u03ff\u1f00-\u1fff]+",
        "ar": "[\u0600-\u06ff\u0750-\u077f]+",
        "he": "[\u0590-\u05ff]+",
        "hi": "[\u0900-\u097f]+",
        "bn": "[\u0980-\u09ff]+",
        "pa": "[\u0a00-\u0a7f]+",
        "gu": "[\u0a80-\u0aff]+",
        "or": "[\u0b00-\u0b7f]+",
        "ta": "[\u0b80-\u0bff]+",
        "te": "[\u0c00-\u0c7f]+",
        "kn": "[\u0c80-\u0cff]+",
        "ml": "[\u0d00-\u0d7f]+",
        "si": "[\u0d80-\u0dff]+",
        "th": "[\u0e00-\u0e7f]+",
        "lo": "[\u0e80-\u0eff]+",
        "my": "[\u1000-\u109f]+",
        "ka": "[\u10a0-\u10ff\u1c90-\u1cbf]+",
        "hy": "[\u0530-\u058f]+",
        "am": "[\u1200-\u137f]+",
        "km": "[\u1780-\u17ff]+",
    }.items()
}
_DENSE = frozenset({"zh", "ja", "ko"})
# Languages that share a script with the one before: what only they write, in at least one of so many letters.
_MARKS = {
    "": (("vi", re.compile("[\u1ea0-\u1ef9\u01a1\u01b0]"), 25),),
    "zh": (("ja", re.compile("[\u3040-\u30ff]"), 20),),
    "ru": (
        ("be", re.compile("[ўЎ]"), 300),
        ("uk", re.compile("[іїєґІЇЄҐ]"), 120),
        ("mk", re.compile("[ѓќѕЃЌЅ]"), 800),
        ("sr", re.compile("[јљњћђџЈЉЊЋЂЏ]"), 120),
        ("bg", re.compile("ъ"), 300),
    ),
    "ar": (("ur", re.compile("[ٹڈڑےں]"), 40), ("fa", re.compile("[پچژگی]"), 40)),
    "hi": (
        ("mr", re.compile(r"ळ|(?<!\S)(?:आहे|आणि|नाही|आहेत|किंवा|हे|तुम्ही|आपण)(?!\S)"), 200),
        ("ne", re.compile(r"(?<!\S)(?:छ|छन्|र|गर्न|भने|यो)(?!\S)|छ[।]"), 200),
    ),
}


def detect_language(text: str) -> str | None:
    """Return the ISO 639-1 code of the language that most of a text is in; None if nothing identifies one."""
    letters = {code: sum(map(len, pattern.findall(text))) for code, pattern in _LETTERS_OF.items()}
    weights = {code: count * (3 if code in _DENSE else 1) for code, count in letters.items()}
    script = max(weights, key=lambda code: weights[code])
    if not weights[script]:
        return None
    if script == "ja":
        return script
    for code, pattern, every in _MARKS.get(script, ()):
        if len(pattern.findall(text)) * every >= letters[script]:
            return code
    if script:
        return script
    spoken = spoken_language(words(text))
    return None if spoken is None else _CODES[spoken]


def main_language(texts: Sequence[str]) -> tuple[str, float] | None:
    """Return the language of most of the texts.

    Returns:
        Its ISO 639-1 code and the share of the texts that are in it; None if there is none of more than half of them.
    """
    counted = Counter(code for code in map(detect_language, texts) if code is not None)
    if not counted:
        return None
    [(code, count)] = counted.most_common(1)
    return (code, count / len(texts)) if 2 * count > len(texts) else None
