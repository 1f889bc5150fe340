"""README.md and the links of all pages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from packaging.requirements import Requirement

from tests.helpers.pages import ROOT, blocks, statements

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for block in blocks(README) if block.language == "sh" for line in statements(block.text)]


def test_the_readme_has_at_most_120_lines() -> None:
    assert README.count("\n") <= 120


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [words[1] for words in COMMANDS if words[0] == "make"]
    assert targets == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_installation_from_a_checkout() -> None:
    (words,) = [words for words in COMMANDS if words[0] == "pip"]
    assert words[:3] == ["pip", "install", "-e"]
    project, constraints, file = words[3:]
    extras = Requirement(f"epic-rag{project.removeprefix('.')}").extras
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extras
    assert extras <= set(known)
    assert constraints == "-c"
    assert (ROOT / file).is_file()


def test_links_lead_to_files_and_headings() -> None:
    broken = []
    for page in [
        ROOT / "README.md",
        *ROOT.glob("*/README.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("demos/*/README.md"),
    ]:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            file = page.parent / target if target else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
