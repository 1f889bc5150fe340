"""What was typed into an interactive session, kept for the next: a private file in the user's state folder."""

from __future__ import annotations

import os
from pathlib import Path

from epic_rag_cli.output import message

__all__ = ["History", "history_file"]

_MOST_LINES = 1000
_LONGEST = 10_000


def history_file() -> Path:
    """Return where the history is: below $XDG_STATE_HOME, or the folder that stands for it."""
    given = os.environ.get("XDG_STATE_HOME", "")
    # The specification says to ignore a path that is relative.
    state = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
    return state / "epic-rag" / "query_history"


class History:
    """Lines that were typed, oldest first. One that cannot be kept is no reason to stop."""

    def __init__(self) -> None:
        self._file = history_file()
        self._is_kept = True

    def load(self) -> list[str]:
        """Return the lines of earlier sessions; a long file is shortened."""
        try:
            lines = self._file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return []
        except OSError as error:
            self._give_up(error)
            return []
        lines = [line for line in lines if 0 < len(line) <= _LONGEST and line.isprintable()]
        if len(lines) > 2 * _MOST_LINES:
            lines = lines[-_MOST_LINES:]
            self._write(lines, os.O_TRUNC)
        return lines[-_MOST_LINES:]

    def add(self, line: str) -> None:
        """Keep a line, unless it begins with a space, as shells have it."""
        if line.strip() and not line.startswith(" ") and line.isprintable() and len(line) <= _LONGEST:
            self._write([line], os.O_APPEND)

    def _write(self, lines: list[str], flag: int) -> None:
        if not self._is_kept:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Nobody else's business, also where the file was made by something else.
            handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | flag, 0o600)
            with os.fdopen(handle, "a", encoding="utf-8", errors="replace") as file:
                if hasattr(os, "fchmod"):
                    os.fchmod(handle, 0o600)
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._is_kept = False
        message("warning", f"{self._file}: {error.strerror}; what you type is not kept for the next time")
