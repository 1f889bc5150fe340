"""Index a real folder of documentation and ask it three questions; `make demo` runs this.

The folder is the project's `docs/` and the documentation of the installed packages: every distribution's long
description (its README, from the metadata that pip wrote), the output of `pydoc` for the standard library, and a Word,
a PowerPoint and an EPUB file. Nothing is downloaded. All work is done by the `epic-rag` command.

    python demos/examples/demo.py [--work-dir .demo] [--model NAME_OR_FOLDER] [--export-only | --serve]

Exit status 1 when a question's right file is not the first hit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import pydoc
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
import webbrowser
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

# Longer texts, mostly change logs and large modules, are left out.
MAX_CHARACTERS = 6_000
MIN_CHARACTERS = 200  # shorter READMEs only point to a web site
# Sections of pydoc's text that repeat: a notice in every module, inherited methods, the file's path.
PYDOC_SECTIONS = re.compile(r"^(MODULE REFERENCE|CLASSES|FILE)\n(?:(?:[ \t].*)?\n)*", re.MULTILINE)

# Modules that do something when imported (open a browser, print a poem, want a display, put the packages that
# setuptools carries on the path) or that hold no documentation.
NOT_IMPORTED = {
    "antigravity",
    "distutils",
    "idlelib",
    "lib2to3",
    "test",
    "this",
    "tkinter",
    "turtle",
    "turtledemo",
}


@dataclass(frozen=True)
class Question:
    """A question, the file that answers it, and further options of `epic-rag query`."""

    text: str
    answer: str
    options: tuple[str, ...] = ()


QUESTIONS = (
    Question("Do I have to index my documents again when I change the demonstrations?", "architecture.md"),
    Question("How many nights in a hotel does the company pay?", "travel.docx"),
    # Its words (token, password, reset) occur in files about other subjects: search by meaning alone.
    Question("generate a token for a password reset link that nobody can guess", "secrets.txt", ("--mode", "dense")),
)


OFFICE = {
    "travel": (
        ("Trains", "Book second class up to four hours, first class beyond. Keep the ticket for the claim."),
        ("Hotels", "The company pays up to six nights in a hotel for each trip. Breakfast is included."),
    ),
    "roadmap": (
        ("Spring", "The new billing service goes live in April. The old one stays readable until June."),
        ("Autumn", "The data centre moves in October. No releases are planned for the two weeks around it."),
    ),
    "handbook": (
        ("First day", "Your badge is at the reception. The help desk on the second floor has your laptop."),
        ("Leaving", "Return badge and laptop to the help desk. Mail is forwarded for three months."),
    ),
}


def write_office_files(folder: Path) -> int:
    """Write a Word, a PowerPoint (by python-docx and python-pptx) and an EPUB file; return their number."""
    folder.mkdir(parents=True, exist_ok=True)
    chapters = "".join(f"<h1>{heading}</h1><p>{text}</p>" for heading, text in OFFICE["handbook"])
    with zipfile.ZipFile(folder / "handbook.epub", "w") as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
            '<rootfile full-path="book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        )
        book.writestr(
            "book.opf",
            '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><manifest>'
            '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest>'
            '<spine><itemref idref="a"/></spine></package>',
        )
        book.writestr("a.xhtml", f'<html xmlns="http://www.w3.org/1999/xhtml"><body>{chapters}</body></html>')
    try:
        import docx
        import pptx
    except ImportError:
        print("Word and PowerPoint files are left out: install python-docx and python-pptx to write them.", flush=True)
        return 1
    document = docx.Document()
    for heading, text in OFFICE["travel"]:
        document.add_heading(heading, 1)
        document.add_paragraph(text)
    document.save(str(folder / "travel.docx"))
    presentation = pptx.Presentation()
    for heading, text in OFFICE["roadmap"]:
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text = heading
        slide.placeholders[1].text = text
    presentation.save(str(folder / "roadmap.pptx"))
    return 3


def readmes() -> Iterator[tuple[str, str]]:
    """Yield (file name, text) of every installed distribution's long description but the project's own.

    The project's README is left out because it may quote this demo, questions included.
    """
    suffixes = {"text/markdown": ".md", "text/x-rst": ".rst"}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        name = re.sub(r"[-_.]+", "-", metadata["Name"]).lower()
        text = metadata.json.get("description")
        if name == "epic-rag" or not isinstance(text, str):
            continue
        content_type = str(metadata.json.get("description_content_type")).split(";")[0].strip()
        yield f"packages/{name}{suffixes.get(content_type, '.txt')}", text


def module_docs() -> Iterator[tuple[str, str]]:
    """Yield (file name, text) of the public modules of the standard library, as `pydoc` prints them."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in NOT_IMPORTED:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                text = PYDOC_SECTIONS.sub("", pydoc.plain(pydoc.render_doc(name)) + "\n")
            except ImportError:  # not on this platform, or built without it
                continue
        yield f"stdlib/{name}.txt", text


def export_documentation(folder: Path) -> None:
    """Write the installed documentation to `folder`, one file a package or module.

    A second call writes nothing while the same packages are installed.

    Args:
        folder: Where the files go. Files of a package that is no longer installed are removed.
    """
    installed = sorted(f"{d.metadata['Name']} {d.version}" for d in importlib.metadata.distributions())
    state = {
        "python": platform.python_version(),
        "limits": [MIN_CHARACTERS, MAX_CHARACTERS],
        "installed": installed,
    }
    stamp = folder.parent / "exported.json"
    if stamp.is_file() and json.loads(stamp.read_text("utf-8")) == state:
        print(f"documentation of the installed packages: unchanged in {shown(folder)}", flush=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    written = short = long = 0
    for name, text in itertools.chain(readmes(), module_docs()):
        if len(text) > MAX_CHARACTERS:
            long += 1
        elif len(text) < MIN_CHARACTERS:
            short += 1
        else:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            written += 1
    written += write_office_files(folder / "office")
    stamp.write_text(json.dumps(state, indent=2), "utf-8")
    print(f"documentation of the installed packages: {written} files written to {shown(folder)}")
    left_out = f"{short} shorter than {MIN_CHARACTERS} characters, {long} longer than {MAX_CHARACTERS:,}"
    print(f"  left out: {left_out}", flush=True)


def shown(path: Path) -> str:
    """Return `path` relative to the working directory where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def epic_rag(*arguments: str, capture: bool = False) -> tuple[str, float]:
    """Run the `epic-rag` command of this environment, offline.

    Args:
        arguments: The command line after `epic-rag`.
        capture: Return its standard output instead of showing it.

    Returns:
        The captured output ("" without `capture`) and the seconds the command took, start-up included.

    Raises:
        subprocess.CalledProcessError: If the command fails; its message is on stderr.
    """
    command = shutil.which("epic-rag", path=sysconfig.get_path("scripts"))
    if command is None:
        raise SystemExit("error: the epic-rag command is not installed beside this Python; run: make demo")
    # Offline: the model ships with the package, so a hub look-up would be a bug.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [command, *arguments],
        env=environment,
        stdout=subprocess.PIPE if capture else None,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return done.stdout or "", time.perf_counter() - started


def index(folders: list[str], index_dir: Path, model: list[str]) -> float:
    """Update the demo's index, or rebuild one that another checkpoint made. Return the seconds."""
    arguments = ["index", *folders, "--exclude", "*.svg", "--index-dir", shown(index_dir), *model]
    print(f"\n$ epic-rag {shlex.join(arguments)}", flush=True)
    existed = index_dir.exists()
    try:
        return epic_rag(*arguments)[1]
    except subprocess.CalledProcessError:
        if not existed:
            raise
    # The index belongs to the demo, so a rebuild loses nothing.
    print(f"\n$ epic-rag {shlex.join(arguments)} --rebuild", flush=True)
    return epic_rag(*arguments, "--rebuild")[1]


def answer(question: Question, index_dir: Path) -> tuple[bool, float]:
    """Query the index, print the answer, and return True if the right file is first, and the seconds."""
    arguments = ["query", question.text, "-k", "3", *question.options, "--index-dir", shown(index_dir)]
    print(f"\n$ epic-rag {shlex.join(arguments)}", flush=True)
    output, seconds = epic_rag(*arguments, capture=True)
    print(output.rstrip())
    first_line = output.partition("\n")[0]  # "1  cosine 0.612  path:first-last  headings"
    right = question.answer in first_line
    verdict = f"right, {question.answer} is first" if right else f"wrong, {question.answer} should be first"
    print(f"-> {verdict} ({seconds:.1f} s, most of it starting Python and loading the model)", flush=True)
    return right, seconds


def serve(index_dir: Path, banks: Path, port: str) -> int:
    """Serve the search page until Ctrl-C, open it in a browser, and return the exit status."""
    command = shutil.which("epic-rag", path=sysconfig.get_path("scripts")) or "epic-rag"
    arguments = ["serve", "--index-dir", shown(index_dir), "--bank-dir", shown(banks), "--port", port]
    print(f"\n$ epic-rag {shlex.join(arguments)}", flush=True)
    with subprocess.Popen([command, *arguments], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            for line in server.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                address = re.search(r"is served at (http://[^\s]+?)\.? ", line)
                if address:
                    print(f"The search page: {address[1]}/", flush=True)
                    webbrowser.open(f"{address[1]}/")
        except KeyboardInterrupt:
            server.send_signal(signal.SIGINT)
        return server.wait()


def main() -> int:
    """Run the demo; 0 when every question's first hit is the right file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=PROJECT / ".demo", help="where documents and index go")
    parser.add_argument("--model", help="another checkpoint than the shipped one: a folder or a hub name")
    parser.add_argument("--export-only", action="store_true", help="write the documents and stop")
    parser.add_argument("--serve", action="store_true", help="serve the search page and open it, instead of asking")
    parser.add_argument("--port", default="8400", help="port of --serve; 0 for a free one")
    options = parser.parse_args()
    work_dir: Path = options.work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    index_dir = work_dir / "index"

    started = time.perf_counter()
    export_documentation(work_dir / "docs")
    exported = time.perf_counter() - started
    if options.export_only:
        return 0

    model = ["--model", options.model] if options.model else []
    try:
        indexed = index([shown(PROJECT / "docs"), shown(work_dir / "docs")], index_dir, model)
        if options.serve:
            return serve(index_dir, work_dir / "banks", options.port)
        status = json.loads(epic_rag("status", "--index-dir", shown(index_dir), "--json", capture=True)[0])
        print("read: " + ", ".join(f"{count} {kind}" for kind, count in sorted(status["kinds"].items())), flush=True)
        questions = [each for each in QUESTIONS if not each.answer.endswith(".docx") or "docx" in status["kinds"]]
        answers = [answer(question, index_dir) for question in questions]
    except subprocess.CalledProcessError as error:
        print(f"error: epic-rag {error.cmd[1]} failed with exit status {error.returncode}", file=sys.stderr)
        return 1
    right = sum(correct for correct, _ in answers)
    queried = ", ".join(f"{seconds:.1f}" for _, seconds in answers)
    print(f"\n{right} of {len(answers)} questions answered with the right file first.")
    print(f"export {exported:.1f} s, index {indexed:.1f} s, queries {queried} s")
    print("The search page, which learns from marks: run `make demo-serve`, then open http://127.0.0.1:8400/")
    return 0 if right == len(answers) else 1


if __name__ == "__main__":
    sys.exit(main())
