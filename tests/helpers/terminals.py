"""A pseudo-terminal that runs a command."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

MODULE = (sys.executable, "-m", "epic_rag_cli")
# The shell opens the terminal, which becomes the controlling one: Ctrl-C and /dev/tty work.
_ON_TERMINAL = 'exec "$@" <"$TTY_NAME" >"$TTY_NAME" 2>&1'


class Terminal:
    """A command on a new terminal; a context manager."""

    def __init__(
        self, *arguments: object, env: Mapping[str, str] | None = None, command: Sequence[str] = MODULE
    ) -> None:
        self._master, slave = pty.openpty()
        name = os.ttyname(slave)
        self._child = subprocess.Popen(
            ["sh", "-c", _ON_TERMINAL, "sh", *command, *map(str, arguments)],
            env={**os.environ, "TERM": "xterm-256color", **(env or {}), "TTY_NAME": name},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Kept open until the child has opened it, or reading would end before it begins.
        self._slave: int | None = slave
        self.shown = ""
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        if self._slave is not None:
            os.close(self._slave)
        os.close(self._master)

    def type(self, text: str) -> None:
        """Press keys; Enter is `\\r`."""
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str, timeout: float = 120) -> re.Match[str]:
        """Return the first match in what was shown since the last one that was waited for."""
        end = time.monotonic() + timeout
        while True:
            found = re.compile(pattern, re.DOTALL).search(self.shown, self._seen)
            if found:
                self._seen = found.end()
                return found
            if not self._read(end):
                raise AssertionError(f"{pattern!r} was not shown; what was: {self.shown[self._seen :]!r}")

    def finish(self, timeout: float = 120) -> int:
        """Read to the end and return the exit status."""
        end = time.monotonic() + timeout
        while self._child.poll() is None:
            self._read(min(end, time.monotonic() + 0.2))
            if time.monotonic() > end:
                raise AssertionError(f"the command is still running; shown: {self.shown!r}")
        while self._read(time.monotonic() + 0.2):
            pass
        return self._child.returncode

    def _read(self, end: float) -> bool:
        wait = max(0.0, end - time.monotonic())
        if not select.select([self._master], [], [], wait)[0]:
            return False
        try:
            part = os.read(self._master, 65536)
        except OSError:  # Linux: the other end is closed
            return False
        if self._slave is not None:
            os.close(self._slave)
            self._slave = None
        self.shown += part.decode(errors="replace")
        return bool(part)


def plain(shown: str) -> str:
    """Return the text without styles and links, and with plain line ends."""
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|\x1b\]8;[^\x1b]*\x1b\\", "", shown).replace("\r", "")
