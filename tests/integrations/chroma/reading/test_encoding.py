"""Decoding: byte order marks, UTF-8, declared and detected encodings, binary files."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag_chroma.reading.document import NotTextError
from epic_rag_chroma.reading.encoding import decode

RUSSIAN = "Это простой текст на русском языке, который проверяет определение кодировки. Он не очень длинный."
FRENCH = "Déjà vu : l’été dernier, nous avons mangé des crêpes à la française près de l’église où naquit Zoé, à côté."
GERMAN = "Für Übungen größerer Männer: Äpfel, Öl und süße Brötchen über Nacht gären lassen, dann schön backen."
CZECH = "Zażółć gęślą jaźń. Pchnąć w tę łódź jeża lub ośm skrzyń fig. Příliš žluťoučký kůň úpěl ďábelské ódy."
GREEK = "Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί. Καλημέρα κόσμε."
JAPANESE = "これは日本語のテキストです。文字コードの判定を確認します。東京は今日も晴れです。"
CHINESE = "这是一个简单的中文文本，用来检测编码。今天天气很好，我们去公园散步。"
TRADITIONAL = "這是一個簡單的中文文本，用來檢測編碼。今天天氣很好，我們去公園散步。"
KOREAN = "이것은 인코딩을 확인하기 위한 간단한 한국어 텍스트입니다. 오늘은 날씨가 좋습니다."


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1251", RUSSIAN),
        ("koi8_r", RUSSIAN),
        ("cp866", RUSSIAN),
        ("cp1252", FRENCH),
        ("latin-1", GERMAN),
        ("cp1250", CZECH),
        ("cp1253", GREEK),
        ("cp932", JAPANESE),
        ("euc_jp", JAPANESE),
        ("iso2022_jp", JAPANESE),
        ("gb18030", CHINESE),
        ("big5", TRADITIONAL),
        ("cp949", KOREAN),
        ("utf-16-le", "no mark, and yet text"),
        ("utf-16-be", "no mark, and yet text"),
        ("utf-32-le", "four bytes each"),
        ("utf-32", "with a mark"),
    ],
)
def test_detection(encoding: str, text: str) -> None:
    assert decode(text.encode(encoding)) == text


@pytest.mark.parametrize("text", ["café", "naïve résumé", "Müller & Söhne", "£5 – “quoted”", "El Niño", "5 °C ± 1"])
def test_too_little_evidence(text: str) -> None:
    assert decode(text.encode("cp1252")) == text


def test_evidence_after_english_text() -> None:
    text = "All of this is plain English.\n" * 5000 + RUSSIAN
    assert decode(text.encode("cp1251")) == text


@pytest.mark.parametrize(
    "line", ['<?xml version="1.0" encoding="{}"?>', "# -*- coding: {} -*-", '@charset "{}";', "<!-- charset={} -->"]
)
def test_declared_encoding(line: str) -> None:
    text = line.format("iso-8859-2") + "\njaźń"
    assert decode(text.encode("iso-8859-2")) == text


@pytest.mark.parametrize("name", ["utf-7", "unicode_escape", "rot13", "base64", "nonsense", "idna"])
def test_declared_codec_is_restricted(name: str) -> None:
    data = f"# coding: {name}\n+ADw-script+AD4- \\x41 é".encode("cp1252")
    assert decode(data) == data.decode("cp1252")


def test_broken_utf8() -> None:
    data = GREEK.encode() + b"\xff\n" + RUSSIAN.encode()[:-1]
    text = decode(data)
    assert text.startswith(GREEK)
    assert "\ufffd" in text


@pytest.mark.parametrize(
    "data",
    [b"a\0b", b"text\0" * 50, bytes(range(1, 256)), b"\xff\xfea", "a\0".encode("utf-16"), b"\0" * 64, b"\0\0a\0b\0\0c"],
)
def test_binary_bytes(data: bytes) -> None:
    with pytest.raises(NotTextError, match="not text"):
        decode(data)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\x1b"), max_size=200))
def test_utf8(text: str) -> None:
    assert decode(text.encode("utf-8-sig")) == text
    if not text.startswith("\ufeff"):
        assert decode(text.encode()) == text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    with suppress(NotTextError):
        assert "\0" not in decode(data)


def test_pictures_in_manuals_of_info() -> None:
    data = (
        b'\x1f\nFile: a.info\n\nBefore\n\0\x08[image src="a.png" alt="x"\n text="y"\0\x08]\nafter\0\x08[index\0\x08]\n'
    )
    assert decode(data) == "\x1f\nFile: a.info\n\nBefore\n\n\nafter\n"
