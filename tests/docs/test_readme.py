"""What the README and the pages without a test of their own show is run here, with the shipped checkpoint."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(blocks("python")) == 3
    names: dict[str, object] = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    # The toner, and not the jam that the demonstration is about, answers "pages come out grey".
    jam, toner = (float(value) for value in re.findall(r"-?\d\.\d+", capsys.readouterr().out))
    assert toner > jam


def test_commands_run(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("demonstrations.md", "architecture.md"):
        (docs / name).write_text((PROJECT / "docs" / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "pairs.jsonl").write_text(blocks("json")[0], encoding="utf-8")
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("epic-rag ")]
    assert [line.split()[1] for line in lines] == ["index", "query", "bank", "query"]
    # The second query is asked beside the first one's index.
    lines[3] += " --index-dir docs/.epic-rag"
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-m", "epic_rag_cli", *shlex.split(line)[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        if line == lines[1]:
            assert "docs/demonstrations.md:" in done.stdout.splitlines()[0] or "docs/architecture.md:" in done.stdout


def test_links_lead_somewhere() -> None:
    for page in [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE)
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    assert targets == ["demo", "test"]
    for target in targets:
        assert f"\n{target}:" in makefile
