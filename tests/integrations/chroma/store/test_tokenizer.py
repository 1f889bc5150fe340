"""What keyword search takes for a word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag_chroma.store.tokenizer import document_terms, query_terms, words


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Undo the last commit.", "undo the last commit"),
        ("getUserName", "getusername get user name"),
        ("get_user_name", "getusername get user name"),
        ("os.path.join", "ospathjoin os path join"),
        ("std::vector ptr->next", "stdvector std vector ptrnext ptr next"),
        ("HTTPServer", "httpserver http server"),
        ("python3 utf8", "python3 python utf8 utf"),
        ("version 3.11", "version 311 3 11"),
        ("--no-ff __init__", "noff no ff init"),
        ("don't", "dont don"),
        ("the user's e-mail", "the user email mail"),
        ("l\u2019homme", "lhomme homme"),
        ("Straße École ﬁle ＡＢＣ", "strasse école file abc"),
        ("d95241039c16", "d95241039c16"),
        ("猫と犬", "猫 と 犬 猫と と犬"),
        ("한국어", "한 국 어 한국 국어"),
        ("हिन्दी में", "हिन्दी में"),
        ("x" * 200, ""),
        ("\ud800 — …", ""),
    ],
)
def test_document_terms(text: str, terms: str) -> None:
    assert document_terms(text) == terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("how do I undo the last commit?", ["undo", "last", "commit"]),
        ("commit commit Commit", ["commit"]),
        ("to be or not to be", ["to", "be", "or", "not"]),
        ("the getUserName", ["getusername", "get", "user", "name"]),
        ("検索エンジン", ["検索", "索エ", "エン", "ンジ", "ジン"]),
        ("猫", ["猫"]),
        ("", []),
        ("?!", []),
    ],
)
def test_query_terms(text: str, terms: list[str]) -> None:
    assert query_terms(text) == terms


@given(st.text())
def test_a_query_finds_the_text_that_it_is_a_copy_of(text: str) -> None:
    assert set(query_terms(text)) <= set(document_terms(text).split())


@given(st.text())
def test_terms_hold_nothing_that_a_query_language_could_read(text: str) -> None:
    for term in [*query_terms(text), *document_terms(text).split()]:
        assert not set(term) & set("\"'*^():+-{}\0 \n")


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert words("To undo (the) last_commit!\n") == words("to UNDO the last commit")
    assert words("猫と犬") == ["猫", "と", "犬"]
