"""Language of whole texts, and of most of some texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag.model_conventions import LANGUAGE_NAMES
from epic_rag_chroma.store.language_detection import detect_language, main_language

SENTENCES = {
    "ar": "يمكنك تغيير كلمة المرور في أي وقت من إعدادات النظام.",
    "bg": "Файлът се намира в друга папка и трябва да бъде преместен.",
    "bn": "ফাইলটি অন্য ফোল্ডারে আছে।",
    "de": "Die Datei liegt in einem anderen Ordner und muss verschoben werden.",
    "el": "Το αρχείο βρίσκεται σε άλλον φάκελο.",
    "en": "The file is in another folder and has to be moved.",
    "es": "El archivo está en otra carpeta y se debe mover.",
    "fa": "این پرونده در پوشه‌ای دیگر است و باید جابه‌جا شود.",
    "fr": "Le fichier est dans un autre dossier et doit être déplacé.",
    "he": "הקובץ נמצא בתיקייה אחרת.",
    "hi": "यह फ़ाइल दूसरे फ़ोल्डर में है और इसे ले जाना होगा।",
    "it": "Il file è in un'altra cartella e deve essere spostato.",
    "ja": "ファイルは別のフォルダーにあります。",
    "ko": "파일이 다른 폴더에 있습니다.",
    "mr": "ही फाइल दुसऱ्या फोल्डरमध्ये आहे आणि ती हलवावी लागेल.",
    "nl": "Het bestand staat in een andere map en moet worden verplaatst.",
    "pl": "Plik jest w innym folderze i trzeba go przenieść.",
    "pt": "O arquivo está em outra pasta e não pode ser movido.",
    "ru": "Файл находится в другой папке, и его нужно переместить.",
    "ta": "கோப்பு வேறொரு கோப்புறையில் உள்ளது.",
    "th": "ไฟล์อยู่ในโฟลเดอร์อื่น",
    "tr": "Dosya başka bir klasörde ve daha sonra taşınacak olan budur.",
    "uk": "Файл є в іншій теці, і його треба перемістити.",
    "vi": "Tập tin nằm ở thư mục khác và phải được di chuyển.",
    "zh": "文件在另一个文件夹中，需要移动。",
}


@pytest.mark.parametrize(("code", "text"), SENTENCES.items())
def test_languages(code: str, text: str) -> None:
    assert detect_language(text) == code
    # Names of commands and options do not make a text English.
    assert detect_language(f"{text} `ls --all`") == code


@pytest.mark.parametrize("text", ["", "42", "x = foo(bar)", "README.md", "…", "AC/DC"])
def test_texts_without_a_language(text: str) -> None:
    assert detect_language(text) is None


def test_main_language() -> None:
    german, chinese = SENTENCES["de"], SENTENCES["zh"]
    assert main_language([german] * 3) == ("de", 1.0)
    assert main_language([german, german, chinese]) == ("de", pytest.approx(2 / 3))
    assert main_language([german, chinese]) is None
    # Texts without a language count: there is no language of most of the texts.
    assert main_language([german, "x = 1", "y = 2"]) is None
    assert main_language(["x = 1"]) is None
    assert main_language([]) is None


@given(st.text())
def test_any_text(text: str) -> None:
    found = detect_language(text)
    assert found is None or found in LANGUAGE_NAMES
