"""`benchmarks/languages.py`: small packages of translated texts become evaluation sets and files of pairs."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from languages import LANGUAGES, build, debian_members, detection_table, installer_pairs, parser, run

from epic_rag.errors import DataError
from epic_rag.evaluation.datasets import RetrievalData, load_local_set

WORDS = {
    "de": (
        "Tastatur auswählen {}",
        "Die Tastatur wird in diesem Dialog ausgewählt, und sie gilt für alle Benutzer {}. ",
    ),
    "fr": ("Choisir le clavier {}", "Le clavier est choisi dans ce dialogue, et il est le même pour tous {}. "),
    "es": ("Elegir el teclado {}", "El teclado se elige en este diálogo y es el mismo para todos los usuarios {}. "),
    "zh_CN": ("选择键盘 {}", "在此对话框中选择键盘，它适用于所有用户，以后可以在设置中更改它，也可以保留 {}。"),
    "hi": ("कुंजीपटल चुनें {}", "इस संवाद में कुंजीपटल चुना जाता है, और यह सभी उपयोगकर्ताओं के लिए होता है {}। "),
}
MANUAL = """.TH CMD{0} 1
.SH BEZEICHNUNG
cmd{0} \\- kopiert Dateien der Art {0}
.SH ÜBERSICHT
cmd{0} [OPTION]
.SH BESCHREIBUNG
Der Befehl kopiert alle Dateien der Art {0} in einen anderen Ordner, und zwar ohne sie zu verändern.
.PP
Er gibt nichts aus, wenn er nicht mit der Option \\-v aufgerufen wird.
"""


def package(path: Path, *, control: Mapping[str, bytes], data: Mapping[str, bytes]) -> None:
    """Write a Debian package."""
    content = b"!<arch>\n"
    archives = [("debian-binary", b"2.0\n")]
    for name, files in (("control.tar.gz", control), ("data.tar.xz", data)):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:xz" if name.endswith("xz") else "w:gz") as archive:
            for place, body in files.items():
                member = tarfile.TarInfo(f"./{place}")
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))
        archives.append((name, stream.getvalue()))
    for name, body in archives:
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    path.write_bytes(content)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with packages of dialogues, help and manual pages."""
    folder = tmp_path / "packages"
    folder.mkdir()
    dialogues = []
    for number in range(6):
        lines = [f"Template: keyboard/{number}", "Type: select", "Description: Select the keyboard", " In English."]
        for language, (title, text) in WORDS.items():
            if (language, number) != ("hi", 5):
                lines += [f"Description-{language}.UTF-8: {title.format(number)}", f" {text.format(number)}", " ."]
                lines.append(f" {text.format(number * 10)}")
        dialogues.append("\n".join([*lines, "Description-zh_TW.UTF-8: 選擇鍵盤", f" {'選擇鍵盤' * 30}"]))
    package(folder / "keyboard.udeb", control={"templates": "\n\n".join(dialogues).encode()}, data={})
    pages = {
        f"usr/share/libreoffice/help/de/text/scalc/guide/{number}.html": f"<html><body><h1>Zeile {number} einfügen</h1>"
        f"<p>{'Klicken Sie in die Zelle, und wählen Sie dann den Befehl aus. ' * 3}{number}</p></body></html>"
        for number in range(3)
    }
    manuals = {
        f"usr/share/man/de/man1/cmd{number}.1.gz": gzip.compress(MANUAL.format(number).encode()) for number in range(4)
    }
    # The same page as another one under another name: its question would have two answers.
    manuals["usr/share/man/de/man1/alias.1.gz"] = gzip.compress(MANUAL.format(3).encode())
    manuals["usr/share/man/man1/cmd9.1.gz"] = gzip.compress(MANUAL.format(9).encode())
    package(folder / "docs.deb", control={}, data={**{k: v.encode() for k, v in pages.items()}, **manuals})
    return folder


def test_sets(packages: Path, tmp_path: Path) -> None:
    written = {name: (passages, pairs) for name, passages, pairs in build(sorted(packages.iterdir()), tmp_path / "out")}
    # Dialogues that all languages have; zh_TW is no translation to zh.
    assert written == {f"installer-{code}": (5, 5) for code in LANGUAGES} | {"help-de": (3, 3), "manpages-de": (3, 3)}
    data = load_local_set(tmp_path / "out" / "eval" / "manpages-de").data
    assert isinstance(data, RetrievalData)
    questions = sorted(data.queries.values())
    assert questions == [f"kopiert Dateien der Art {number}" for number in range(3)]
    [passage] = [document.text for document in data.corpus if document.id == "cmd1.1"]
    assert passage.startswith("Der Befehl kopiert alle Dateien der Art 1 in")
    assert passage.endswith("mit der Option -v aufgerufen wird.")
    assert ".PP" not in passage
    assert data.relevant["cmd1.1"] == {"cmd1.1": 1}
    with gzip.open(tmp_path / "out" / "pairs" / "installer-hi.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert {row["query"] for row in rows} == {f"कुंजीपटल चुनें {number}" for number in range(5)}
    assert all(row["positive"].startswith("इस संवाद में") for row in rows)


def test_detection(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(parser().parse_args(["detect", str(packages)])) == 0
    tables = capsys.readouterr().out
    assert tables.count("100.0") >= 8
    pairs = installer_pairs([packages / "keyboard.udeb"])
    wrong = [("de", pair.passage) for pair in pairs["hi"].values()] + [("xx", "nothing")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in detection_table(wrong).splitlines()[2:]]
    assert rows == [
        ["de", "German", "5", "0.0", "hi 5"],
        ["xx", "", "1", "0.0", "none 1"],
        ["all that it covers", "", "5", "0.0", ""],
    ]


def test_errors(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no \.deb files"):
        run(parser().parse_args(["build", str(tmp_path / "empty"), str(tmp_path / "out")]))
    (tmp_path / "bad.deb").write_bytes(b"PK")
    with pytest.raises(DataError, match="is no Debian package"):
        list(debian_members(tmp_path / "bad.deb", "data"))
    package(tmp_path / "none.deb", control={}, data={"usr/share/doc/none": b"x"})
    with pytest.raises(DataError, match="no translated manuals"):
        build([tmp_path / "none.deb"], tmp_path / "out")
