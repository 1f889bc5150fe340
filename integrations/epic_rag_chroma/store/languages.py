"""Languages of the keyword index: function words, stems, and the language of a text.

Stems are those of Snowball (PyStemmer), of which one per script is applied, and in Latin script that of the text's
language. Arabic and Hebrew words also lose what is written together with them: the article, "and" and prepositions, as
in Lucene's `light10` (Larkey, Ballesteros and Connell 2007). All words are normalized and case-folded; see
`tokenizer.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

__all__ = ["ENGLISH", "FUNCTION_WORDS", "STOP_WORDS", "spoken_language", "stems_of", "text_language"]

ENGLISH = "english"
_STOP_WORDS = """
    a about am an and any are as at be been being but by can could did do does doing for from had has have having how
    i if in into is it its may me might must my no not of on or our shall should so some such than that the their them
    then there these they this those to was we were what when where which while who whom whose why will with would you
    your arent cant couldnt didnt doesnt dont hows im isnt ive shouldnt thats wasnt werent whats wheres wouldnt youre"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""English words that a query is searched without, unless it has no others."""

# The most frequent words of each language, without diacritics. They identify the language of a text, and a query in
# that language is searched without them.
_FUNCTION_WORDS = {
    "catalan": "amb aquest aquesta com del dels el els en es i la les mes no o per que se seva son un una",
    "czech": "a ale by byl jak jako jsem jsou k nebo o od po pro pri se si s to u v ve z za ze je na do co kde",
    "danish": "af at da de den der det dig din du eller en er et for fra har hun hvad ikke jeg kan med men og om "
    "pa sig som til var vil hvor hvordan",
    "dutch": "aan bij dat de deze die dit door een en er het hij hoe ik in is maar met naar niet of om ook op te tot "
    "uit van voor wat werd wordt ze zich zijn waar",
    "estonian": "aga ei ja kas kes kui kuidas kus ma mis need oli olid on see seda siis ta voi et ka ning",
    "finnish": "ei etta ja joka jos kanssa kun kuin missa mita miten mutta myos on oli olivat ollut ovat ne se sen tai "
    "taman tama voi",
    "french": "a au aux avec ce ces cette comment dans de des du elle en est et etre il ils je la le les leur mais ne "
    "nous ou par pas pour que qui quoi sa se ses son sont sur un une vous",
    "german": "als am an auf aus bei bin bis das dass dem den der des die dies diese durch ein eine einem einen einer "
    "er es fur hat ich ihr im in ist man mein mit nach nicht noch oder sein sich sie sind so uber um und vom von vor "
    "war was wer wie wird wir wo zu zum zur",
    "hungarian": "a az azt egy es ez ezt hogy ha hol is kell meg mely mi mint nem van volt vagy vannak csak de lehet "
    "mit amely",
    "indonesian": "ada adalah akan atau dalam dan dari dengan di ini itu juga karena ke oleh pada saya tidak untuk "
    "yang apa bagaimana",
    "italian": "al alla che chi come con da dal dei del della delle di dove e ed gli ha i il in io la le lo ma nel "
    "nella nelle nei negli degli alle agli sulla sul sulle non o per piu quando questo questa se si sono su un una "
    "anche",
    "lithuanian": "ar bet bus buvo del dar ir is iki jis ji kad kaip kas kur nuo o per prie su tai tik uz yra",
    "norwegian": "av at de den der det du eller en er et for fra har hun hva hvor ikke jeg kan med men og om pa seg "
    "som til var vil hvordan",
    "polish": "a ale byc byl czy dla do gdzie i ich jak jako jest jej jego juz lub ma na nie o od oraz po przez sa sie "
    "ten to tym w we z za ze co",
    "portuguese": "a ao aos as com como da das de do dos e ela ele em entre essa esse esta este foi mais mas na nao "
    "nas no nos o onde os ou para pela pelo por quando que se sem seu sua um uma",
    "romanian": "a acest ai al ale am ar au care ca ce cu cum de din doar este fi in intr la mai nu o pe pentru prin "
    "sa sau se si sunt un unde va",
    "spanish": "al con como cuando de del donde el ella en entre es esta este fue ha hay la las lo los mas no o para "
    "pero por que se ser si sin sobre son su sus un una y",
    "swedish": "att av de den det du ej eller en ett for fran han har hon hur i inte jag kan med men nar och om pa sig "
    "som till var vad vi ar",
    "turkish": "ama bir bu cok da daha de degil gibi her icin ile ise kadar ki mi mu nasil ne nerede o olan olarak "
    "sonra su ve veya",
}
FUNCTION_WORDS = {language: frozenset(words.split()) for language, words in _FUNCTION_WORDS.items()}
_LANGUAGES_OF = {
    word: tuple(name for name, its in (*FUNCTION_WORDS.items(), (ENGLISH, STOP_WORDS)) if word in its)
    for word in STOP_WORDS.union(*FUNCTION_WORDS.values())
    if len(word) > 1
}
# A text in another language than English has at least two different function words of it, or one that no other
# language has and none of English; and they are at least this share of its words.
_LEAST_SHARE = 0.08
_SHORTEST = 3

# Beginning of a script's letters, and the stemmer for them.
_SCRIPTS = (
    ("\u0370", "\u03ff", "greek"),
    ("\u0400", "\u052f", "russian"),
    ("\u0530", "\u058f", "armenian"),
    ("\u0900", "\u097f", "hindi"),
    ("\u0b80", "\u0bff", "tamil"),
)
# The article and what is written before it; endings; "and", "that", the article and prepositions of Hebrew.
_ARABIC_PREFIX = re.compile(
    "(?:\u0648?(?:\u0627\u0644|\u0628\u0627\u0644|\u0643\u0627\u0644|\u0641\u0627\u0644)|\u0644\u0644|\u0648(?=...))(?=..)"
)
_ARABIC_SUFFIX = re.compile(
    "(?<=..)(?:\u0647\u0627|\u0627\u0646|\u0627\u062a|\u0648\u0646|\u064a\u0646|\u064a\u0647|\u064a\u062a|\u0647|\u064a)$"
)
_HEBREW_PREFIX = re.compile("\u05d5?(?:\u05db\u05e9|\u05e9)?[\u05d4\u05d1\u05db\u05dc\u05de]?(?=...)")


def text_language(words: Iterable[str]) -> str:
    """Return the language of a text in Latin script by its function words, English if there are few."""
    return spoken_language(words) or ENGLISH


def spoken_language(words: Iterable[str]) -> str | None:
    """Return the language in Latin script that the function words among these words belong to; None if few do."""
    occurrences = Counter(words)
    found: dict[str, list[str]] = {}
    for word in occurrences.keys() & _LANGUAGES_OF.keys():
        for language in _LANGUAGES_OF[word]:
            found.setdefault(language, []).append(word)
    best = max(found, key=lambda language: (len(found[language]), language == ENGLISH, language), default=ENGLISH)
    own = found.get(best, [])
    is_only = len(own) == 1 and len(_LANGUAGES_OF[own[0]]) == 1 and ENGLISH not in found
    if not (len(own) > 1 or is_only) or sum(occurrences[word] for word in own) < _LEAST_SHARE * occurrences.total():
        return None
    return best


def stems_of(word: str, languages: Sequence[str]) -> tuple[str, ...]:
    """Return the stems of a word in the given languages; a word that has none is its own.

    Args:
        word: A normalized, case-folded word.
        languages: Languages of words in Latin script; words in other scripts have one stemmer.
    """
    if len(word) < _SHORTEST or not (first := word[0]).isalpha():
        return (word,)
    if first < "\u0370":
        return tuple(dict.fromkeys(_stem(word, each) for each in languages)) if word.isalpha() else (word,)
    if "\u0590" <= first <= "\u05ff":
        return (_HEBREW_PREFIX.sub("", word, count=1),)
    if "\u0600" <= first <= "\u06ff":
        return (_ARABIC_SUFFIX.sub("", _ARABIC_PREFIX.sub("", word, count=1), count=1),)
    language = next((name for low, high, name in _SCRIPTS if low <= first <= high), None)
    return (word if language is None else _stem(word, language),)


@lru_cache(maxsize=65536)
def _stem(word: str, language: str) -> str:
    stemmed: str = _stemmer(language).stemWord(word)
    return stemmed or word


@lru_cache(maxsize=64)
def _stemmer(language: str) -> Any:
    import Stemmer  # type: ignore[import-not-found]

    return Stemmer.Stemmer(language)
