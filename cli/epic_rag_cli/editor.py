"""Opens a hit: text in an editor at its line, documents in the program that the system has for them.

The editor is $VISUAL or $EDITOR, started without a shell. Text is never handed to the system's own opener: it would run
a script, or a file that looks like one.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from epic_rag.errors import DataError, EpicError
from epic_rag_cli.hits import file_of
from epic_rag_cli.locate import display_path
from epic_rag_cli.output import message

if TYPE_CHECKING:
    from epic_rag_chroma import Hit

__all__ = ["editor_command", "open_hit"]

# How editors are told a line; {line} and {file} are filled in.
_SYNTAXES = {
    "+{line} {file}": """vi vim nvim view gvim mvim nano pico emacs emacsclient micro kak joe jove mg ne zile mcedit
        gedit gnome-text-editor bbedit less""",
    "-g {file}:{line}": "code code-insiders codium vscodium cursor windsurf positron",
    "{file}:{line}": "subl sublime_text hx helix zed zeditor lapce pulsar atom",
    "--line {line} {file}": """idea pycharm webstorm phpstorm goland clion rubymine rider rustrover kate kwrite
        intellij-idea-ultimate intellij-idea-community pycharm-community pycharm-professional""",
    "-l {line} {file}": "mate",
    "-n{line} {file}": "notepad++",
}
_SYNTAX_OF = {name: syntax for syntax, names in _SYNTAXES.items() for name in names.split()}
# What Debian has for the purpose, then what there is nearly everywhere.
_USUAL_EDITORS = ("sensible-editor", "editor", "nano", "vi")
# Formats whose bytes no editor shows as text.
_DOCUMENTS = frozenset(["pdf", "docx", "pptx", "xlsx", "opendocument", "rtf", "epub"])


def open_hit(hit: Hit) -> None:
    """Open the file of a hit and wait for the editor, if it is one.

    Raises:
        DataError: The file is gone, or lies outside of the folder that was indexed.
        EpicError: There is nothing to open it with.
    """
    path = file_of(hit)
    if os.path.isabs(hit.path) or ".." in PurePath(hit.path).parts:
        raise DataError(f"{hit.path} is no path below the indexed folder; run `epic-rag index --rebuild`")
    if not os.path.isfile(path):
        raise DataError(f"{display_path(path)} is gone since it was indexed; run `epic-rag index` to update the index")
    if hit.kind in _DOCUMENTS:
        _open_document(path)
    else:
        _run_editor(editor_command(path, hit.first_line))


def editor_command(path: str, line: int | None) -> list[str]:
    """Return the command that opens a text file in the user's editor.

    Args:
        path: The file, absolute: it cannot be taken for an option.
        line: The line to show, from 1; None for the top.

    Raises:
        EpicError: $VISUAL or $EDITOR is no command line, or there is no editor.
    """
    variable = next((name for name in ("VISUAL", "EDITOR") if os.environ.get(name, "").strip()), None)
    if variable is None:
        words = _usual_editor()
    else:
        value = os.environ[variable]
        try:
            words = shlex.split(value, posix=os.name != "nt")
        except ValueError as error:
            raise EpicError(
                f"{variable} is {value!r}, which is no command line ({error}); set it to an editor"
            ) from None
        # On Windows the quotes stay where they were.
        words = [word.strip('"') for word in words] if os.name == "nt" else words
    name = os.path.basename(words[0]).lower().removesuffix(".exe").removesuffix(".cmd")
    if line is None or name not in _SYNTAX_OF:
        return [*words, path]
    return [*words, *(part.format(line=line, file=path) for part in _SYNTAX_OF[name].split())]


def _usual_editor() -> list[str]:
    if sys.platform == "darwin":
        return ["open", "-t"]
    if os.name == "nt":
        return ["notepad.exe"]
    for name in _USUAL_EDITORS:
        if shutil.which(name):
            return [name]
    raise EpicError("EDITOR is not set, and there is no nano or vi; set EDITOR to your editor")


def _run_editor(command: Sequence[str]) -> None:
    program = shutil.which(command[0])
    if program is None:
        raise EpicError(f"there is no editor {command[0]}; set EDITOR to one that there is")
    # After `echo ... | epic-rag query -` standard input is a pipe, and an editor wants the terminal.
    terminal = None
    if os.name == "posix" and not sys.stdin.isatty():
        try:
            terminal = os.open("/dev/tty", os.O_RDWR)
        except OSError:  # there is none: a graphical editor needs none
            terminal = None
    try:
        with subprocess.Popen([program, *command[1:]], stdin=terminal) as child:
            status = _wait(child)
    except OSError as error:
        raise EpicError(f"{program} cannot be started ({error.strerror}); set EDITOR to another editor") from None
    finally:
        if terminal is not None:
            os.close(terminal)
    if status:
        message("warning", f"{command[0]} ended with status {status}")


def _wait(child: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # it is the editor's: Ctrl-C means something in most of them
            continue


def _open_document(path: str) -> None:
    if sys.platform == "win32":
        os.startfile(path)
        return
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    program = shutil.which(opener)
    if program is None:
        raise EpicError(f"there is no {opener} to open {display_path(path)} with; open the file by hand")
    # A session of its own: Ctrl-C here is not meant for what it opens.
    done = subprocess.run(
        [program, path], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, check=False
    )
    if done.returncode:
        raise EpicError(f"{opener} cannot open {display_path(path)} (status {done.returncode}); open the file by hand")
