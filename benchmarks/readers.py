"""Words that an independent extractor finds in real files and our readers do not, by format.

    python benchmarks/readers.py FOLDER... [--limit 300] [--worst 5] [--reasons] [--json FILE]

A word is lacking if the other extractor has it more often than the text that is embedded and searched, with its
headings. Navigation, scripts and front matter, which are left out on purpose, are left out of the other extractor's
words too. Words that the other extractor writes as one and we as several, or the other way round, count as lacking.
Extractors that are not installed are named, and their formats are not measured:

    pip install selectolax docutils Markdown
    apt-get install poppler-utils pandoc libreoffice-writer-nogui libreoffice-calc-nogui libreoffice-impress-nogui

PDF is compared with Poppler's pdftotext; Word, OpenDocument text, EPUB and LaTeX with pandoc; spreadsheets,
presentations (without numbers) and RTF with LibreOffice. To measure an earlier version, run this
file with that version's folders in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import email
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from email.policy import default as default_policy
from pathlib import Path
from typing import Any

from epic_rag_chroma.chunking import chunk_document
from epic_rag_chroma.reading.document import BrokenFileError, Document, NotTextError
from epic_rag_chroma.reading.encoding import decode
from epic_rag_chroma.reading.file_types import kind_of
from epic_rag_chroma.reading.reader import read_document

WORD = re.compile(r"[^\W_]+")
INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]+")
FRONT_MATTER = re.compile(r"(---|\+\+\+)[ \t]*\n.*?\n\1[ \t]*\n", re.DOTALL)


WRITTEN = {"text": (".txt", ".text", ".info"), "latex": (".tex", ".latex", ".ltx")}


def words_of(text: str) -> Counter[str]:
    return Counter(WORD.findall(unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).casefold()))


def rough_tokens(texts: Sequence[str]) -> list[int]:
    return [len(text) // 4 for text in texts]


def passages_of(document: Document) -> list[str]:
    """The texts that are embedded and searched."""
    chunks = chunk_document(document, max_tokens=200, overlap=0, count_tokens=rough_tokens)
    return [getattr(chunk, "words", chunk.text) for chunk in chunks]


def text_of(name: str, data: bytes) -> str:
    """The text of a file, without front matter."""
    text = decode(data).replace("\r\n", "\n").replace("\r", "\n")
    front = FRONT_MATTER.match(text)
    return text if front is None else text[front.end() :]


def of_html(name: str, data: bytes | str) -> str:
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(data if isinstance(data, str) else text_of(name, data))
    hidden = (
        "script style noscript template nav iframe object select title head [hidden] [role=navigation] [role=search]"
    )
    for selector in hidden.split():
        for node in tree.css(selector):
            node.decompose()
    inline = {
        "a",
        "abbr",
        "b",
        "bdi",
        "bdo",
        "big",
        "cite",
        "code",
        "del",
        "dfn",
        "em",
        "font",
        "i",
        "ins",
        "kbd",
        "mark",
    }
    inline |= {"q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "tt", "u", "var", "wbr", "-text"}
    parts: list[str] = []
    for node in tree.root.traverse(include_text=True) if tree.root is not None else ():
        if node.tag == "-text":
            if parts and node.parent is not None and node.prev is None and node.parent.tag not in inline:
                parts.append(" ")
            parts.append(node.text_content or "")
        elif node.tag not in inline:
            parts.append(" ")
        if node.tag == "-text" and node.next is None and node.parent is not None and node.parent.tag not in inline:
            parts.append(" ")
    return "".join(parts)


def of_markdown(name: str, data: bytes) -> str:
    from markdown import markdown

    return of_html(name, markdown(text_of(name, data), extensions=["extra", "sane_lists"]))


def of_rst(name: str, data: bytes) -> str:
    from docutils import nodes
    from docutils.core import publish_doctree
    from docutils.parsers.rst import Directive, directives, roles

    class Unknown(Directive):
        optional_arguments, final_argument_whitespace, has_content, option_spec = 99, True, True, None

        def run(self) -> list[Any]:
            node = nodes.container()
            self.state.nested_parse(self.content, self.content_offset, node)
            return [nodes.paragraph(text=" ".join(self.arguments)), node]

    known = directives.directive
    directives.directive = lambda *arguments: (known(*arguments)[0] or Unknown, [])
    as_text = lambda *arguments: ([nodes.Text(arguments[2])], [])  # noqa: E731
    known_role = roles.role
    roles.role = lambda *arguments: (known_role(*arguments)[0] or as_text, [])
    try:
        settings = {"report_level": 5, "halt_level": 6, "file_insertion_enabled": False, "raw_enabled": False}
        tree = publish_doctree(text_of(name, data), settings_overrides=settings)
    finally:
        directives.directive, roles.role = known, known_role
    for kind in (
        nodes.comment,
        nodes.system_message,
        nodes.target,
        nodes.substitution_definition,
        nodes.meta,
        nodes.raw,
    ):
        for node in list(tree.findall(kind)):
            node.parent.remove(node)
    return " ".join(node.astext() for node in tree.findall(nodes.Text))


def of_mail(name: str, data: bytes) -> str:
    message = email.message_from_bytes(data, policy=default_policy)
    body = message.get_body(("plain", "html"))
    text = "" if body is None else str(body.get_content())
    text = of_html(name, text) if body is not None and body.get_content_type() == "text/html" else text
    return f"{message.get('Subject', '')}\n{message.get('From', '')}\n{text}"


def strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner)
    elif isinstance(value, str):
        yield value


def of_json(name: str, data: bytes) -> str:
    return "\n".join(strings_in(json.loads(decode(data))))


def of_jsonl(name: str, data: bytes) -> str:
    return "\n".join(
        text for line in decode(data).splitlines() if line.strip() for text in strings_in(json.loads(line))
    )


def of_yaml(name: str, data: bytes) -> str:
    import yaml

    return "\n".join(text for part in yaml.load_all(decode(data), Loader=yaml.BaseLoader) for text in strings_in(part))


def of_xml(name: str, data: bytes) -> str:
    from lxml import etree

    root = etree.fromstring(data, etree.XMLParser(resolve_entities=False, recover=True, remove_comments=True))
    return "\n".join(root.itertext())


def of_svg(name: str, data: bytes) -> str:
    from lxml import etree

    root = etree.fromstring(data, etree.XMLParser(resolve_entities=False, recover=True, remove_comments=True))
    shown = ("title", "desc", "text")
    return "\n".join("".join(e.itertext()) for e in root.iter() if str(e.tag).rpartition("}")[2] in shown)


def of_notebook(name: str, data: bytes) -> str:
    cells = json.loads(data)["cells"]
    text = ""
    for cell in cells:
        source = "".join(cell["source"])
        text += "\n" + (of_markdown("a.md", source.encode()) if cell["cell_type"] == "markdown" else source)
    return text


def of_text(name: str, data: bytes) -> str:
    return text_of(name, data)


def output_of(program: str, *arguments: str, data: bytes = b"") -> str:
    """Return the output of a program for data on its standard input."""
    if shutil.which(program) is None:
        raise ImportError(program, name=program)
    done = subprocess.run([program, *arguments], input=data, capture_output=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.decode(errors="replace").strip()[:120] or f"{program} fails")
    return done.stdout.decode("utf-8", "replace")


def of_pdf(name: str, data: bytes) -> str:
    return output_of("pdftotext", "-enc", "UTF-8", "-", "-", data=data)


def of_pandoc(name: str, data: bytes) -> str:
    return output_of("pandoc", "--from", name.rpartition(".")[2].lower(), "--to", "plain", "--wrap=none", data=data)


def of_libreoffice(name: str, data: bytes) -> str:
    """The text of a file as LibreOffice exports it: all sheets as CSV, a presentation as PDF, a text as text."""
    suffix = name.rpartition(".")[2].lower()
    sheets, slides = suffix.startswith(("xl", "ods")), suffix.startswith(("pp", "odp"))
    csv = "csv:Text - txt - csv (StarCalc):44,34,76,1,,0,false,true,false,false,false,-1"
    target = csv if sheets else "pdf" if slides else "txt:Text (encoded):UTF8"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file.{suffix}"
        path.write_bytes(data)
        profile = f"-env:UserInstallation={Path(folder, 'profile').as_uri()}"  # several may run at once
        output_of("soffice", profile, "--headless", "--convert-to", target, "--outdir", f"{folder}/out", str(path))
        made = sorted(Path(folder, "out").glob("*"))
        if slides:  # without numbers: LibreOffice draws those of the axes of charts
            return re.sub(r"[\d.,]+", " ", "\n".join(of_pdf("", file.read_bytes()) for file in made))
        return "\n".join(file.read_text("utf-8-sig") for file in made)


def of_latex(name: str, data: bytes) -> str:
    return of_pandoc("a.latex", data)


def of_opendocument(name: str, data: bytes) -> str:
    return of_pandoc(name, data) if name.lower().endswith(".odt") else of_libreoffice(name, data)


EXTRACTORS: dict[str, Callable[[str, bytes], str]] = {
    "html": of_html, "markdown": of_markdown, "rst": of_rst, "email": of_mail, "json": of_json, "jsonl": of_jsonl,
    "yaml": of_yaml, "xml": of_xml, "svg": of_svg, "latex": of_latex, "notebook": of_notebook, "text": of_text,
    "csv": of_text, "pdf": of_pdf, "docx": of_pandoc, "epub": of_pandoc, "opendocument": of_opendocument,
    "xlsx": of_libreoffice, "pptx": of_libreoffice, "rtf": of_libreoffice,
}  # fmt: skip


@dataclass
class Result:
    """Counts of one format: files, words of the other extractor, those that we lack, and the files that lack most."""

    files: int = 0
    passages: int = 0
    words: int = 0
    lacking: int = 0
    skipped: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0
    worst: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def percent(self) -> float:
        return 100 * self.lacking / self.words if self.words else 0.0


def measure(paths: list[Path]) -> tuple[dict[str, Result], set[str]]:
    """Measure files; also return the names of packages that are not installed."""
    results: defaultdict[str, Result] = defaultdict(Result)
    missing: set[str] = set()
    for path in paths:
        kind = kind_of(path.name)
        if kind not in EXTRACTORS:
            continue
        data = path.read_bytes()
        name = "a.rst" if kind == "rst" else path.name
        result = results[kind]
        started = time.process_time()
        document = None
        try:
            document = read_document(path.name, data)
        except (NotTextError, BrokenFileError) as error:
            result.skipped += 1
            result.reasons[str(error)] = result.reasons.get(str(error), 0) + 1
        passages = [] if document is None else passages_of(document)
        result.seconds += time.process_time() - started
        result.passages += len(passages)
        result.bytes += len(data)
        try:
            other = words_of(EXTRACTORS[kind](name, data))
        except ImportError as error:
            missing.add(str(error.name))
            continue
        except Exception as error:  # what the other extractor cannot read is no measure
            print(f"{path}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
            continue
        titles = [] if document is None else [heading.title for heading in document.headings]
        lacking = other - words_of("\n".join([*titles, *passages]))
        result.files += 1
        result.words += other.total()
        result.lacking += lacking.total()
        share = 100 * lacking.total() / max(1, other.total())
        examples = " ".join(word for word, _ in lacking.most_common(12))
        result.worst.append((round(share, 1), str(path), examples))
    return dict(results), missing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=300, help="files of each format, drawn by chance")
    parser.add_argument("--worst", type=int, default=0, help="files to list for each format")
    parser.add_argument("--kind", action="append", help="only this format")
    parser.add_argument("--reasons", action="store_true", help="list the reasons of skipped files")
    parser.add_argument("--json", type=Path, help="write the results here")
    given = parser.parse_args(arguments)
    by_kind: defaultdict[str, list[Path]] = defaultdict(list)
    for folder in given.folders:
        for path in sorted(folder.rglob("*")):
            kind = kind_of(path.name)
            if not path.is_file() or path.is_symlink() or (given.kind and kind not in given.kind):
                continue
            # Other names may be pictures or programs.
            if path.suffix.lower() in WRITTEN.get(kind, (path.suffix.lower(),)):
                by_kind[kind].append(path)
    chosen = [
        path for paths in by_kind.values() for path in random.Random(0).sample(paths, min(given.limit, len(paths)))
    ]
    results, missing = measure(sorted(chosen))
    print("| format | files | skipped | passages | seconds | words | lacking, % | MB/s |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for kind, result in sorted(results.items()):
        numbers = f"{result.files} | {result.skipped} | {result.passages} | {result.seconds:.1f} | {result.words}"
        speed = result.bytes / 1e6 / max(result.seconds, 1e-9)
        print(f"| {kind} | {numbers} | {result.percent:.2f} | {speed:.1f} |")
        for reason, count in sorted(result.reasons.items(), key=lambda item: -item[1]) if given.reasons else ():
            print(f"    {count} skipped: {reason}", file=sys.stderr)
        for share, path, examples in sorted(result.worst, reverse=True)[: given.worst]:
            print(f"    {share:5.1f} % {path}: {examples}", file=sys.stderr)
    if missing:
        print(f"not installed: {', '.join(sorted(missing))}", file=sys.stderr)
    if given.json is not None:
        given.json.write_text(json.dumps({kind: asdict(result) for kind, result in results.items()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
