"""Retrieval in German, French, Spanish, Chinese and Hindi: sets made of translated texts in Debian's packages.

    apt-get download libreoffice-help-{de,fr,es,zh-cn} manpages-{de,fr,es,zh} console-setup debconf ...
    python benchmarks/languages.py build PACKAGES OUT
    python benchmarks/hybrid.py --data OUT/eval --model NAME
    epic-rag eval --few-shot --heldout OUT/pairs/help-de.jsonl.gz --model NAME

`build` reads the .deb and .udeb files of a folder and writes evaluation sets of 50 questions each, and files of all
pairs for the few-shot evaluation:

    installer-LANGUAGE  texts of Debian's installer and of packages that ask when they are installed (GPL-2.0+): the
                        title of a dialogue as question, its explanation as passage; the same dialogues in all languages
    help-LANGUAGE       guides of LibreOffice's help (MPL-2.0): the heading of a page as question, its text as passage
    manpages-LANGUAGE   manual pages (GPL-3.0+ and the pages' own): the one-line description without the command's name
                        as question, the first section of running text as passage

    python benchmarks/languages.py detect PACKAGES

measures the detection of a text's language on the same texts, and on all other translations of those dialogues.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import re
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_common import run_main, say

from epic_rag.errors import DataError
from epic_rag.evaluation.report import markdown_table
from epic_rag.model_conventions import LANGUAGE_NAMES
from epic_rag_chroma.reading.document import BrokenFileError, Document, NotTextError, substituted
from epic_rag_chroma.reading.reader import read_document
from epic_rag_chroma.store.language_detection import detect_language

__all__ = [
    "Pair",
    "build",
    "debian_members",
    "detection_table",
    "help_pairs",
    "installer_pairs",
    "manual_pairs",
    "parser",
]

LANGUAGES = ("de", "fr", "es", "zh", "hi")
QUESTIONS = 50
PASSAGES = 600
LEAST_CHARACTERS = 100
MOST_CHARACTERS = 800
_HELP = re.compile(
    r"usr/share/libreoffice/help/(?P<language>[a-z]{2})(?:-(?!TW)[A-Z]{2})?/(?P<page>text/\w+/guide/.+\.html)$"
)
_MANUAL = re.compile(r"usr/share/man/(?P<language>[a-z]{2})(?:_(?!TW)[A-Z]{2})?/man[1578]/(?P<page>[^/]+)\.gz$")
_DIALOGUE = re.compile(r"^Template: (.+)$", re.MULTILINE)
_TRANSLATION = re.compile(
    r"^Description(?:-(?!zh_TW)([a-z]{2})(?:_[A-Z]{2})?(?:\.UTF-8)?)?: (.*)\n((?: .*\n?)+)", re.MULTILINE
)


@dataclass(frozen=True)
class Pair:
    """A question and its passage; `page` is the same in all languages."""

    page: str
    question: str
    passage: str


def debian_members(package: Path, part: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the regular files in a Debian package.

    Args:
        package: A .deb file, an archive of `ar`.
        part: "data" for installed files, "control" for the package's own.

    Raises:
        DataError: If the file is no Debian package.
    """
    content = package.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        raise DataError(f"{package} is no Debian package. Name a folder of .deb files.")
    place = 8
    while place < len(content):
        header = content[place : place + 60]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith(f"{part}.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[place + 60 : place + 60 + size])) as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isfile() else None
                    if file is not None:
                        yield member.name.removeprefix("./"), file.read()
        place += 60 + size + size % 2


def installer_pairs(packages: Sequence[Path]) -> dict[str, dict[str, Pair]]:
    """Return the pairs of dialogues by language and name of the dialogue."""
    found: dict[str, dict[str, Pair]] = defaultdict(dict)
    for package in packages:
        for name, content in debian_members(package, "control"):
            if name != "templates":
                continue
            for dialogue in content.decode("utf-8", "replace").split("\n\n"):
                named = _DIALOGUE.search(dialogue)
                if named is None:
                    continue
                for code, title, explanation in _TRANSLATION.findall(dialogue):
                    language = code or "en"
                    passage = "\n".join(line.strip() for line in explanation.splitlines() if line.strip() != ".")
                    least = LEAST_CHARACTERS // 3 if language in ("zh", "ja", "ko") else LEAST_CHARACTERS
                    if len(passage) >= least:
                        pair = Pair(named[1], title.strip(), passage[:MOST_CHARACTERS])
                        found[language].setdefault(named[1], pair)
    return found


def help_pairs(packages: Sequence[Path]) -> dict[str, dict[str, Pair]]:
    """Return the pairs of LibreOffice's help by language and page: the first heading, and the text behind it."""
    found: dict[str, dict[str, Pair]] = defaultdict(dict)
    for package in packages:
        for name, content in debian_members(package, "data"):
            match = _HELP.match(name)
            sections = _sections(_document(name, content)) if match is not None else []
            if match is not None and sections:
                passage = "\n".join(text for _, text in sections)[:MOST_CHARACTERS]
                if len(passage) >= LEAST_CHARACTERS:
                    found[match["language"]][match["page"]] = Pair(match["page"], sections[0][0], passage)
    return found


def manual_pairs(packages: Sequence[Path]) -> dict[str, dict[str, Pair]]:
    """Return the pairs of manual pages by language and page."""
    found: dict[str, dict[str, Pair]] = defaultdict(dict)
    for package in packages:
        for name, content in debian_members(package, "data"):
            match = _MANUAL.match(name)
            if match is None:
                continue
            sections = [text for _, text in _sections(_document(match["page"], gzip.decompress(content)))]
            described = re.split(r"\s+[-\u2013\u2014]+\s+", sections[0], maxsplit=1) if sections else []
            running = next((text for text in sections[2:] if len(text) >= LEAST_CHARACTERS), None)
            if len(described) == 2 and running:
                question = " ".join(described[1].split())
                found[match["language"]][match["page"]] = Pair(match["page"], question, running[:MOST_CHARACTERS])
    return found


def _document(name: str, content: bytes) -> Document | None:
    try:
        return read_document(name, content)
    except (NotTextError, BrokenFileError):
        return None


def _sections(document: Document | None) -> list[tuple[str, str]]:
    """Return heading and text of each section that has both."""
    found = []
    headings = [] if document is None else document.headings
    for number, heading in enumerate(headings):
        assert document is not None
        end = headings[number + 1].line if number + 1 < len(headings) else len(document.lines)
        places = (place for place in range(heading.line + heading.height, end) if place not in document.display_only)
        lines = (substituted(document.lines[place], document.substitutions.get(place, ())).strip() for place in places)
        text = "\n".join(line for line in lines if line and not line.startswith("."))  # no macros of troff
        if heading.title and text:
            found.append((heading.title, text))
    return found


def build(packages: Sequence[Path], folder: Path) -> list[tuple[str, int, int]]:
    """Write the sets.

    Returns:
        For each set its name, the number of its passages, and that of all pairs.

    Raises:
        DataError: If the packages have no such texts.
    """
    dialogues = installer_pairs(packages)
    everywhere = set.intersection(*(set(dialogues.get(language, ())) for language in LANGUAGES))
    sources = {
        "installer": {
            language: {name: pair for name, pair in pairs.items() if name in everywhere}
            for language, pairs in dialogues.items()
        },
        "help": help_pairs(packages),
        "manpages": manual_pairs(packages),
    }
    written = [
        (f"{source}-{language}", *_write(folder, f"{source}-{language}", found[language]))
        for source, found in sources.items()
        for language in LANGUAGES
        if found.get(language)
    ]
    if not written:
        raise DataError("The packages have no translated manuals. See the head of benchmarks/languages.py.")
    return written


def _write(folder: Path, name: str, pairs: Mapping[str, Pair]) -> tuple[int, int]:
    """Write a set and a file of pairs."""
    questions = Counter(pair.question.casefold() for pair in pairs.values())
    passages = Counter(pair.passage for pair in pairs.values())
    # Without questions and passages that several pages have: there would be more than one answer.
    unique = {
        page: pair
        for page, pair in sorted(pairs.items())
        if questions[pair.question.casefold()] == passages[pair.passage] == 1
    }
    order = sorted(unique)
    random.Random(0).shuffle(order)
    chosen, corpus = order[:QUESTIONS], order[:PASSAGES]
    place = folder / "eval" / name
    (place / "qrels").mkdir(parents=True, exist_ok=True)
    _write_lines(place / "corpus.jsonl", ({"_id": page, "title": "", "text": unique[page].passage} for page in corpus))
    _write_lines(place / "queries.jsonl", ({"_id": page, "text": unique[page].question} for page in chosen))
    rows = "".join(f"{page}\t{page}\t1\n" for page in chosen)
    (place / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}", encoding="utf-8")
    (folder / "pairs").mkdir(exist_ok=True)
    with gzip.open(folder / "pairs" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        for page in order:
            row = {"query": unique[page].question, "positive": unique[page].passage}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(corpus), len(unique)


def _write_lines(path: Path, rows: Iterator[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def detection_table(texts: Sequence[tuple[str, str]]) -> str:
    """Return a table of the detected languages: for each language the texts, the share that is right, and the rest."""
    detected: dict[str, Counter[str]] = defaultdict(Counter)
    for language, text in texts:
        code = {"nb": "no", "nn": "no"}.get(language, language)
        detected[code][detect_language(text) or "none"] += 1
    rows = []
    for code in sorted(detected):
        counts = detected[code]
        others = ", ".join(f"{other} {count}" for other, count in counts.most_common() if other != code)
        right = counts[code] / counts.total()
        rows.append([code, LANGUAGE_NAMES.get(code, ""), str(counts.total()), f"{100 * right:.1f}", others])
    covered = [counts for code, counts in detected.items() if code in LANGUAGE_NAMES]
    total = sum(counts.total() for counts in covered)
    right_ones = sum(detected[code][code] for code in detected if code in LANGUAGE_NAMES)
    rows.append(["all that it covers", "", str(total), f"{100 * right_ones / max(1, total):.1f}", ""])
    return markdown_table(["code", "language", "texts", "right, %", "detected instead"], rows, text_columns=2)


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(description="Make evaluation sets of translated manuals.")
    commands = options.add_subparsers(dest="command", required=True)
    making = commands.add_parser("build", help="write evaluation sets and files of pairs")
    detecting = commands.add_parser("detect", help="measure the detection of languages")
    for command in (making, detecting):
        command.add_argument("packages", type=Path, metavar="PACKAGES", help="a folder of .deb and .udeb files")
    making.add_argument("folder", type=Path, metavar="OUT")
    return options


def run(options: argparse.Namespace) -> int:
    """Build, or measure the detection."""
    packages = sorted(options.packages.glob("*.*deb"))
    if not packages:
        raise DataError(f"{options.packages} has no .deb files. Download some with `apt-get download`.")
    if options.command == "build":
        for name, passages, pairs in build(packages, options.folder):
            say(f"{name}: {QUESTIONS} questions, {passages} passages, {pairs} pairs")
        return 0
    for source, found in (
        ("installer", installer_pairs(packages)),
        ("help", help_pairs(packages)),
        ("manpages", manual_pairs(packages)),
    ):
        print(f"\n{source}: passages\n")
        print(detection_table([(code, pair.passage) for code, pairs in found.items() for pair in pairs.values()]))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), run))
