"""Acceptance cases: a small folder as people have them, a question, and what has to be found.

`cases.jsonl` has a line for each check, with the public thread in which people met the fault. A folder of `inputs` is
copied, indexed by the command line with the shipped model, and all its questions are asked of that index. `prepare.py`,
if there is one, runs in the copy before: it makes what cannot be kept as a file. Scripts run in the copy by this Python.

A check's `expect` may hold:

    first, found    this file is the best hit, or among the hits
    none            there is no hit
    text, not_text  a hit's text contains this (all of a list), or none does
    row             a line of a hit's text contains these, in this order
    heading         the best hit's headings, outermost first
    lines           the best hit's lines lie within these two
    longest_word    no hit's text has more characters without a space
    max_hits        there are no more hits
    max_passages    the index has no more passages
    skipped, reason the file that was left out, and a part of the reason
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from epic_rag import EpicEncoder
from epic_rag_cli.main import run

HERE = Path(__file__).parent
# Other inputs of the same kinds have the same form, in files of their own.
CHECKS = [json.loads(line) for file in sorted(HERE.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]
CASES = list(dict.fromkeys(check["case"] for check in CHECKS))


@pytest.fixture(scope="module", autouse=True)
def _one_model() -> Iterator[None]:
    """The shipped model, loaded once for all commands."""
    load = functools.cache(EpicEncoder.from_pretrained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpicEncoder, "from_pretrained", load)
        yield


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith(("EPIC_RAG", "GIT_"))]:
        monkeypatch.delenv(name)
    for name in ("CONFIG", "STATE", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [check for check in CHECKS if check["case"] == case]
    source, copy, index = HERE / "inputs" / case, tmp_path / case, tmp_path / "index"
    left_out = {check["script"] for check in checks if "script" in check} | {"prepare.py", "__pycache__"}
    shutil.copytree(source, copy, ignore=lambda _, names: left_out.intersection(names))
    monkeypatch.chdir(copy)
    if (source / "prepare.py").exists():
        subprocess.run([sys.executable, str(source / "prepare.py")], check=True)

    def command(*arguments: object) -> Any:
        capsys.readouterr()
        status = run([*map(str, arguments), "--index-dir", str(index), "--json"])
        out, err = capsys.readouterr()
        assert status == 0, err
        return json.loads(out)

    report: dict[str, Any] = {}
    if any("script" not in check for check in checks):
        report = command("index", copy, "--no-chroma")
    hits: dict[int, list[dict[str, Any]]] = {}
    for args in {tuple(check.get("args", ())) for check in checks}:
        group = [number for number, check in enumerate(checks) if tuple(check.get("args", ())) == args]
        group = [number for number in group if "query" in checks[number]]
        queries = tmp_path / "queries.jsonl"
        queries.write_text("".join(json.dumps({"query": checks[number]["query"]}) + "\n" for number in group), "utf-8")
        answers = command("query", "--batch", queries, *args) if group else []
        hits.update((number, answer["hits"]) for number, answer in zip(group, answers, strict=True))
    problems = []
    for number, check in enumerate(checks):
        if "script" in check:
            problem = failure_of(source / check["script"], copy, tmp_path)
        else:
            problem = problem_of(check["expect"], hits.get(number, []), report)
        if problem:
            problems.append(f"{check.get('script', check.get('query', 'index'))}: {problem} ({check['why']})")
    assert not problems, "\n".join(problems)


def failure_of(script: Path, folder: Path, tmp_path: Path) -> str:
    """The last line of a script that fails; "" if it succeeds."""
    command = tmp_path / "epic-rag"
    command.write_text(f"#!{sys.executable}\nfrom epic_rag_cli.main import main\nmain()\n")
    command.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, "EPIC_RAG": str(command)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    return "" if done.returncode == 0 else (done.stderr.strip() or done.stdout.strip() or "failed").splitlines()[-1]


def problem_of(expect: dict[str, Any], hits: list[dict[str, Any]], report: dict[str, Any]) -> str:
    """What does not hold of a check; "" if all does."""
    texts = [" ".join(hit["text"].split()) for hit in hits]
    first = hits[0] if hits else None
    places = [f"{hit['path']}:{hit['first_line'] or hit['page'] or ''}" for hit in hits]
    skipped = {Path(skip["path"]).name: skip["reason"] for skip in report.get("skipped", ())}
    holds = {
        "first": lambda name: first is not None and is_of(first, name),
        "found": lambda name: any(is_of(hit, name) for hit in hits),
        "none": lambda _: not hits,
        "text": lambda parts: all(has(texts, part) for part in ([parts] if isinstance(parts, str) else parts)),
        "not_text": lambda part: not has(texts, part),
        "row": lambda cells: any(has_row(line, cells) for hit in hits for line in hit["text"].splitlines()),
        "heading": lambda titles: first is not None and first["heading_path"] == titles,
        "lines": lambda lines: (
            first is not None and lines[0] <= (first["first_line"] or 0) <= (first["last_line"] or 0) <= lines[1]
        ),
        "longest_word": lambda most: all(len(word) <= most for text in texts for word in text.split()),
        "max_hits": lambda most: len(hits) <= most,
        "max_passages": lambda most: report["chunks_total"] <= most,
        "skipped": lambda name: expect["reason"].casefold() in skipped.get(name, "").casefold(),
        "reason": lambda _: True,
    }
    wrong = [f"{kind} is not {wanted!r}" for kind, wanted in expect.items() if not holds[kind](wanted)]
    found = [
        f"{place} {hit['heading_path']} {text[:80]!r}" for place, hit, text in zip(places, hits, texts, strict=True)
    ]
    return f"{'; '.join(wrong)}; found: {', '.join(found) or 'nothing'}; skipped: {skipped}" if wrong else ""


def is_of(hit: dict[str, Any], name: str) -> bool:
    """Whether a hit, or a passage that was folded into it, is of a file."""
    paths = [hit["path"], *(place.rpartition(":")[0] for place in hit["duplicates"])]
    return unicodedata.normalize("NFC", name) in {unicodedata.normalize("NFC", path) for path in paths}


def has(texts: list[str], part: str) -> bool:
    return any(" ".join(part.split()) in text for text in texts)


def has_row(line: str, cells: list[str]) -> bool:
    position = 0
    for cell in cells:
        position = " ".join(line.split()).find(cell, position)
        if position < 0:
            return False
        position += len(cell)
    return True
