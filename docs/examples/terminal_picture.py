"""Draws docs/images/terminal.svg: what a terminal shows of `epic-rag index` and `epic-rag query`.

    python docs/examples/terminal_picture.py [--output FILE]

The commands run on a copy of this project's docs/ in a terminal of their own (pty), so the picture has their colours.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).resolve().parents[1]
WIDTH = 100
COMMANDS = (
    ["index", "docs"],
    ["query", "how do I use my own examples?", "-k", "3", "--index-dir", "docs/.epic-rag"],
    ["query", "which formats can be read?", "-k", "2", "--path", "*.md", "--index-dir", "docs/.epic-rag"],
)
_HYPERLINK = re.compile(r"\x1b\]8;[^\x1b\x07]*(?:\x1b\\|\x07)")
_REDRAWN = re.compile(r"[^\n]*\r(?!\n)|\x1b\[[0-9]*[AKJGh-l]|\x1b\[\?[0-9]+[hl]")


def run(arguments: list[str], folder: Path) -> str:
    """What a command writes to a terminal; progress bars, which it draws over, are left out."""
    main, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        [sys.executable, "-m", "epic_rag_cli", *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(terminal)
        written = b""
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not part:
                break
            written += part
        errors = process.communicate()[1]
    os.close(main)
    if process.returncode:
        sys.exit(f"epic-rag {' '.join(arguments)} ended with {process.returncode}: {errors.decode()}")
    return _REDRAWN.sub("", _HYPERLINK.sub("", written.decode("utf-8").replace("\r\n", "\n")))


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--output", type=Path, default=DOCS / "images" / "terminal.svg")
    given = options.parse_args()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(DOCS, folder / "docs", ignore=shutil.ignore_patterns("images", "examples", ".epic-rag"))
        for arguments in COMMANDS:
            shown = " ".join(f"'{word}'" if re.search(r"[ ?*]", word) else word for word in arguments)
            console.print(Text(f"$ epic-rag {shown}", style="bold"))
            console.print(Text.from_ansi(run(arguments, folder).rstrip()))
            console.print()
    console.save_svg(str(given.output), title="epic-rag", clear=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
