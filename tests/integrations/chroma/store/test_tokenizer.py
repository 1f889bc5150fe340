"""Terms of texts and queries: one spelling of a word, compounds, numbers, scripts, the syntax of a query."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag_chroma.store.languages import FUNCTION_WORDS
from epic_rag_chroma.store.tokenizer import document_terms, language_of, normalize, parse_query, words


def terms(text: str, language: str = "english") -> set[str]:
    return set(" ".join(document_terms(text, language)).split())


def asked(query: str, *languages: str) -> set[str]:
    return {term for word in parse_query(query).words for term in word.terms(("english", *languages))}


@pytest.mark.parametrize(
    ("text", "sequence", "more"),
    [
        ("Undo the last commit.", "undo the last commit", ""),
        ("committed snapshots", "committed snapshots", "commit snapshot"),
        ("getUserName", "getusername", "get user name"),
        ("get_user_name", "get user name", "getusername"),
        ("os.path.join", "os path join", "ospathjoin"),
        ("std::vector ptr->next", "std vector ptr next", "stdvector ptrnext"),
        ("HTTPServer", "httpserver", "http server"),
        ("python3 utf8 utf-8", "python 3 utf 8 utf 8", "python3 utf8"),
        ("version 3.11", "version 3.11", "3"),
        ("v1.2.3 numpy==1.26.4", "1.2.3 numpy 1.26.4", "1.2 1 1.26"),
        ("10.0.0.1:8080", "10.0.0.1:8080", "10.0.0.1"),
        ("2024-03-15 15.03.2024", "2024-03-15 15.03.2024", "2024-03 2024"),
        ("500mg 2.4GHz", "500 mg 2.4 ghz", "500mg 2.4ghz"),
        ("12,500 12'500 $17,500.00 17.500,00", "12500 12500 17500 17500", ""),
        ("12\u202f500 \u0661\u0662\u066b\u0665", "12500 12.5", "12"),
        ("3,5", "3.5", "3 5"),
        ("--no-ff -v __init__", "no ff v init", "--no-ff noff -v"),
        ("C C++ C# F#, .NET Node.js", "c c++ c# f# net node js", ".net nodejs"),
        ("notepad++", "notepad++", "notepad"),
        ("@app.route $HOME #123", "app route home 123", "@app.route $home #123"),
        ("john.doe@example.com", "john doe example com", "john.doe@example.com"),
        ("src/users/login.py", "src users login py", "src/users/login.py loginpy"),
        ("don't the user's e-mail", "dont the user e mail", "email"),
        ("l\u2019homme", "homme", "lhomme"),
        ("Straße École ﬁle ＡＢＣ", "strasse ecole file abc", "strass ecol"),
        ("Łódź Ørsted İzmir ISPARTA ısparta", "lodz orsted izmir isparta isparta", ""),
        ("ὁ ΛΟΓΟΣ λόγος", "ο λογοσ λογοσ", "λογ"),
        ("comp\u02bcuter комп\u02bcютер комп'ютер", "computer компютер компютер", ""),
        ("ёлка мой", "елка мой", ""),
        ("السُّوق أحمد", "السوق احمد", "سوق"),
        ("می\u200cخواهم", "ميخواهم", ""),
        ("שָׁלוֹם", "שלומ", ""),
        ("दिन दीन ज़रूर हिन्दी", "दिन दीन जरूर हिंदी", ""),
        ("d95241039c16", "d95241039c16", ""),
        ("猫と犬", "猫と と犬", "猫 と 犬"),
        ("한국어", "한국 국어", "한"),
        ("เด็กไทย", "เด็ก กไท ไทย", "เด็"),
        ("x" * 200, "", ""),
        ("\ud800 — …", "", ""),
    ],
)
def test_document_terms(text: str, sequence: str, more: str) -> None:
    found = document_terms(text, "english")
    assert found.sequence == sequence
    assert set(more.split()) <= set(f"{found.parts} {found.wholes}".split())


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("how do I undo the last commit?", "undo last commit"),
        ("commit commit Commit", "commit"),
        ("to be or not to be", "to be or not"),
        ("the getUserName", "getusername get user name"),
        ("検索エンジン", "検索 索エ エン ンジ ジン"),
        ("猫", "猫"),
        ("1.1.11", "1.1.11"),
        ("500mg", "500mg 500 mg"),
        ("C++", "c++"),
        ("git commit -v", "git commit -v v"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_query_terms(query: str, expected: str) -> None:
    assert asked(query) == set(expected.split())


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("Die Häuser sind alt und nicht schön", "Haus"),
        ("Las canciones de la radio no son nuevas", "canción"),
        ("Les chevaux ne sont pas dans le pré", "cheval"),
        ("Talot ovat vanhoja, mutta ne eivät ole huonoja", "talo"),
        ("Он читает книги", "книга"),
        ("κόκκινα πλοία", "πλοίο"),
        ("סוף השוק", "שוק"),
        ("كتاب والسوق", "السوق"),
        ("बहुत किताबें", "किताब"),
        ("The cities", "city"),
    ],
)
def test_forms_of_a_word_have_a_term_in_common(text: str, query: str) -> None:
    language = language_of(text)
    assert asked(query, language) & terms(text, language)


@pytest.mark.parametrize(
    ("text", "query"),
    [("दिन", "दीन"), ("วัน", "วิน"), ("C", "C++"), ("v11.1.1", "1.1.1"), ("1.2.3", "2.3"), ("がく", "かく")],
)  # fmt: skip
def test_different_words_have_no_term_in_common(text: str, query: str) -> None:
    assert not asked(query) & terms(text)


@given(st.text(), st.sampled_from(sorted(FUNCTION_WORDS)))
def test_the_words_of_a_text_find_it_in_every_language(text: str, language: str) -> None:
    own = terms(text, language)
    for word in parse_query(text).words:
        assert set(word.terms(("english",))) & own
        assert set(word.terms(("english", language))) & own
        assert set(word.sequence) <= own


@given(st.text())
def test_normalization_is_idempotent_and_ignores_the_unicode_form(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    for form in ("NFC", "NFD"):
        assert document_terms(unicodedata.normalize(form, text), "english") == document_terms(text, "english")


@given(st.text())
def test_terms_hold_nothing_that_a_query_language_could_read(text: str) -> None:
    for term in [*terms(text), *asked(text)]:
        assert not set(term) & set("\"'*^()!%;=?[]{}|~<>`\0 \n")


@pytest.mark.parametrize(
    ("query", "text", "phrases", "excluded"),
    [
        ('"connection reset" peer', "connection reset peer", ["connection reset"], []),
        ("\u201csmart quotes\u201d \u00abun mot\u00bb", "smart quotes un mot", ["smart quotes", "un mot"], []),
        ('jaguar -car -"race track"', "jaguar", [], ["race track", "car"]),
        ("python -django-rest", "python", [], ["django rest"]),
        ("git commit -v", "git commit -v", [], []),
        ("at -5 degrees", "at -5 degrees", [], []),
        ("e-mail --no-verify", "e-mail --no-verify", [], []),
        ("-only", "-only", [], []),
        ('an "unfinished quote', 'an "unfinished quote', [], []),
        ('5" disk and 3.5" disk', '5" disk and 3.5" disk', [], []),
        ('""', '""', [], []),
        (f'"a phrase" {"word " * 50}', f'"a phrase" {"word " * 50}', [], []),
    ],
)
def test_syntax(query: str, text: str, phrases: list[str], excluded: list[str]) -> None:
    parsed = parse_query(query)
    assert parsed.text == text
    assert [" ".join(phrase) for phrase in parsed.phrases] == phrases
    assert sorted(" ".join(word.sequence) for word in parsed.excluded) == sorted(excluded)


def test_an_option_of_a_command_is_searched_for() -> None:
    assert parse_query("rm -rf").excluded
    assert not parse_query("rm -rf", frozenset({"-rf"})).excluded
    assert "-rf" in {
        term for word in parse_query("rm -rf", frozenset({"-rf"})).words for term in word.terms(("english",))
    }


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("", "english"),
        ("The meeting took place at Hun Sen's villa.", "english"),
        ("Title | no | no | yes", "english"),
        ("Die Häuser sind alt.", "german"),
        ("Las casas son viejas y no hay agua.", "spanish"),
        ("Les maisons sont dans la rue.", "french"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert language_of(text) == language


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert words("To undo (the) last_commit!\n") == words("to UNDO the last commit")
    assert words("猫と犬") == ["猫", "と", "犬"]
