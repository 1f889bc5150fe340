"""What an extra of epic-rag brings: its requirements, and a folder with nothing but its packages."""

from __future__ import annotations

import importlib.metadata
import os
from functools import cache
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
OURS = "epic-rag"


@cache
def project() -> Any:
    """Return the table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(*extras: str) -> list[Requirement]:
    """Return the requirements of epic-rag with some extras, those of the extras that these name among them."""
    found = [Requirement(line) for line in project()["dependencies"]]
    for extra in extras:
        for line in project()["optional-dependencies"][extra]:
            wanted = Requirement(line)
            found += requirements(*wanted.extras) if canonicalize_name(wanted.name) == OURS else [wanted]
    return found


def declared(*extras: str) -> set[str]:
    """Return the names of these requirements, whatever the platform."""
    return {canonicalize_name(wanted.name) for wanted in requirements(*extras)}


def distributions(wanted: list[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions that requirements need on this machine, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(each, "") for each in wanted]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
        for each in {"", *requirement.extras}:
            if (name, each) not in seen:
                seen.add((name, each))
                waiting += [(Requirement(line), each) for line in found[name].requires or ()]
    return found


def link_packages(folder: Path, *extras: str) -> Path:
    """Fill a folder with links to all packages of epic-rag with some extras, as a fresh environment would have them."""
    folder.mkdir()
    for distribution in distributions(requirements(*extras)).values():
        for file in distribution.files or ():
            if file.parts[0] == ".." or file.parts[0] == "__pycache__":
                continue
            # A folder without __init__.py may belong to several distributions.
            depth = 1
            while depth < len(file.parts):
                place = Path(distribution.locate_file(Path(*file.parts[:depth])))  # type: ignore[arg-type]
                if place.suffix == ".dist-info" or place.suffix == ".libs" or (place / "__init__.py").is_file():
                    break
                depth += 1
            link = folder.joinpath(*file.parts[:depth])
            if not os.path.lexists(link) and not any(parent.is_symlink() for parent in link.parents):
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(distribution.locate_file(Path(*file.parts[:depth]))))  # type: ignore[arg-type]
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Return variables for `python -S`, which then sees the packages of a folder and epic-rag's own."""
    roots = [folder, ROOT, *(ROOT / name for name in ("integrations", "cli", "demos"))]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EPIC_RAG_", "PYTHON"))}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, roots)), "HF_HUB_OFFLINE": "1"}
