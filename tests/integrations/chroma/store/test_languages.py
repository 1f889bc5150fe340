"""Keyword search in German, French, Spanish, Chinese and Hindi: forms of words and stop words, of texts and queries."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from epic_rag_chroma.store.database import IndexDatabase, Record
from epic_rag_chroma.store.tokenizer import parse_query

TEXTS = {
    "en": ["The printer does not print in colour.", "Passwords are changed in the settings."],
    "de": ["Die Drucker drucken nicht in Farbe, wenn die Patronen leer sind.", "Passwörter ändert man in den Einstellungen."],
    "fr": ["Les imprimantes n'impriment pas en couleur.", "Les mots de passe sont changés dans les paramètres."],
    "es": ["Las impresoras no imprimen en color.", "Las contraseñas se cambian en los ajustes."],
    "zh": ["打印机不能打印彩色。", "可以在设置中更改密码。"],
    "hi": ["प्रिंटर रंगीन पन्नों को नहीं छापते हैं।", "पासवर्डों को सेटिंग्स में बदला जाता है।"],
}  # fmt: skip


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("query", "code", "place"),
    [
        ("Wie ändere ich das Passwort in der Einstellung?", "de", 1),
        ("eine leere Patrone", "de", 0),
        ("Comment changer le paramètre ?", "fr", 1),
        ("l'imprimante", "fr", 0),
        ("¿Cómo se cambia la contraseña en un ajuste?", "es", 1),
        ("una impresora que no imprime", "es", 0),
        ("如何更改密码", "zh", 1),
        ("彩色打印", "zh", 0),
        ("पासवर्ड कैसे बदलें", "hi", 1),
        ("रंगीन पन्ना", "hi", 0),
    ],
)
def test_a_question_finds_its_text(tmp_path: Path, query: str, code: str, place: int, alone: bool) -> None:
    """In an index of one language, and in one of all."""
    with closing(IndexDatabase.open(tmp_path / "index.sqlite")) as database:
        texts = {
            f"{key}{number}": text for key in ([code] if alone else TEXTS) for number, text in enumerate(TEXTS[key])
        }
        with database.transaction():
            database.put([Record(name, text, {}, np.zeros(1, np.float32)) for name, text in texts.items()])
        assert database.match(query, 1)[0][0] == f"{code}{place}"


@pytest.mark.parametrize(
    ("query", "content"),
    [
        ("Wie ändere ich das Passwort in der Einstellung?", ["andere", "passwort", "einstellung"]),
        ("Comment changer le mot de passe dans les paramètres ?", ["changer", "mot", "passe", "parametres"]),
        ("¿Cómo se cambia la contraseña de un usuario?", ["cambia", "contrasena", "usuario"]),
        # Nothing but stop words is searched for as it is.
        ("wie ist das", ["wie", "ist", "das"]),
    ],
)
def test_stop_words_of_a_query(query: str, content: list[str]) -> None:
    assert [word.sequence[0] for word in parse_query(query).words] == content
