"""Packages and megabytes of an installation with each extra: the table of docs/install.md.

    python benchmarks/install_sizes.py [--write]

Counts the distributions that epic-rag requires on this machine, and the bytes of their files. All extras have to be
installed, as for `make test`, and torch has the size of the build that is installed. --write puts the table into the
page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from packaging.requirements import Requirement
from results_report import replace_between

from epic_rag.errors import DataError
from epic_rag.evaluation.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.extras import distributions, project, requirements  # noqa: E402

PAGE = ROOT / "docs" / "install.md"
# What every installation brought before the parts had extras; readers of Office files had one.
BEFORE = (
    "chardet chromadb filelock justhtml llama-index-core markdown-it-py platformdirs pydantic pypdfium2 PyStemmer rich "
    "tenacity typer watchfiles webencodings"
)


def measure(wanted: list[Requirement]) -> tuple[int, int]:
    """Return the number of distributions that requirements need, and the bytes of their files."""
    found = distributions(wanted)
    files = {Path(str(each.locate_file(file))) for each in found.values() for file in each.files or ()}
    return len(found), sum(file.stat().st_size for file in files if file.is_file() and file.suffix != ".pyc")


def table() -> str:
    """Return the table in Markdown: the encoder alone, each extra, and what all had before."""
    alone = measure(requirements())
    rows = [["the encoder alone", str(alone[0]), f"{alone[1] / 1e6:,.0f}", ""]]
    listed = {name: requirements(name) for name in project()["optional-dependencies"] if name not in ("files", "dev")}
    listed["before"] = requirements() + [Requirement(name) for name in BEFORE.split()]
    for name, wanted in listed.items():
        count, size = measure(wanted)
        rows.append([name, str(count), f"{size / 1e6:,.0f}", f"{(size - alone[1]) / 1e6:,.0f}"])
    return markdown_table(["installation", "packages", "MB", "beyond the encoder, MB"], rows, text_columns=1)


def main() -> int:
    """Print the table, or write it into the page."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--write", action="store_true", help="put the table into docs/install.md")
    chosen = options.parse_args()
    print(table())
    if chosen.write:
        text = replace_between(PAGE.read_text(encoding="utf-8"), "install_sizes", f"\n{table()}\n")
        if text is None:
            raise DataError(f"{PAGE} has no place for the table. Add its markers.")
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
