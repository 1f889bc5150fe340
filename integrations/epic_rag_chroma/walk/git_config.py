"""Ignore files that git keeps outside of the working tree: `.git/info/exclude` and the file of `core.excludesFile`.

The configuration is read as git does: system, user, repository and working tree, with `include` and `includeIf gitdir`.
No git program is needed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from epic_rag_chroma.walk.safe_read import read_regular

__all__ = ["exclude_files"]

_MAX_BYTES = 2**20
_MAX_INCLUDES = 10
_SECTION = re.compile(r'\[\s*([\w.-]+)(?:\s+"((?:[^"\\]|\\.)*)")?\s*\]')
_KEY = re.compile(r"([A-Za-z][\w-]*)\s*(=?)")


def exclude_files(top: str) -> list[str]:
    """Return the ignore files of the repository whose working tree begins at a folder, the weakest first.

    Args:
        top: A folder with `.git`, which is a folder, or a file that names one (in worktrees and submodules).
    """
    folder = _git_folder(top)
    if folder is None:
        return []
    common = folder
    name = _text(os.path.join(folder, "commondir")).strip()
    if name:
        common = os.path.normpath(os.path.join(folder, name))
    excludes = ""
    for path in (*_user_files(), os.path.join(common, "config"), os.path.join(folder, "config.worktree")):
        excludes = _value(path, folder, 0) or excludes
    config_home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    named = os.path.join(top, os.path.expanduser(excludes)) if excludes else os.path.join(config_home, "git", "ignore")
    return [path for path in (named, os.path.join(common, "info", "exclude")) if os.path.isfile(path)]


def _git_folder(top: str) -> str | None:
    path = os.path.join(top, ".git")
    if os.path.isdir(path):
        return path
    kind, _, name = _text(path).partition(":")
    return os.path.normpath(os.path.join(top, name.strip())) if kind == "gitdir" and name.strip() else None


def _user_files() -> list[str]:
    """Return the configuration files of the system and the user."""
    files = []
    if os.environ.get("GIT_CONFIG_NOSYSTEM", "").lower() not in ("1", "true", "yes", "on"):
        files.append(os.environ.get("GIT_CONFIG_SYSTEM", "/etc/gitconfig"))
    if "GIT_CONFIG_GLOBAL" in os.environ:
        return [*files, os.environ["GIT_CONFIG_GLOBAL"]]
    config_home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [*files, os.path.join(config_home, "git", "config"), os.path.expanduser("~/.gitconfig")]


def _text(path: str) -> str:
    try:
        data, _ = read_regular(os.path.realpath(path), _MAX_BYTES)
    except (OSError, ValueError):
        return ""
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _value(path: str, git_folder: str, depth: int) -> str:
    """Return the last value of core.excludesFile in a configuration file and those that it includes."""
    found = ""
    section, subsection = "", ""
    for line in re.sub(r"\\\r?\n", "", _text(path)).splitlines():
        text = line.strip()
        header = _SECTION.match(text)
        if header is not None:
            section, subsection = header.group(1).lower(), re.sub(r"\\(.)", r"\1", header.group(2) or "")
            text = text[header.end() :].strip()
        key = _KEY.match(text)
        if key is None or not key.group(2):
            continue
        name, value = key.group(1).lower(), _unquoted(text[key.end() :])
        if (section, subsection, name) == ("core", "", "excludesfile"):
            found = value
        elif name == "path" and value and depth < _MAX_INCLUDES and _is_included(section, subsection, path, git_folder):
            other = os.path.join(os.path.dirname(path), os.path.expanduser(value))
            found = _value(other, git_folder, depth + 1) or found
    return found


def _is_included(section: str, subsection: str, path: str, git_folder: str) -> bool:
    """Return whether a section `include` or `includeIf` applies to a repository."""
    if section == "include":
        return not subsection
    kind, _, pattern = subsection.partition(":")
    if section != "includeif" or kind not in ("gitdir", "gitdir/i") or not pattern:
        return False
    if pattern.startswith("./"):
        pattern = os.path.join(os.path.dirname(os.path.realpath(path)), pattern[2:])
    pattern = os.path.expanduser(pattern)
    pattern = pattern if pattern.startswith("/") else f"**/{pattern}"
    pattern = f"{pattern}**" if pattern.endswith("/") else pattern
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = "".join(wild.get(part, re.escape(part)) for part in parts)
    flags = re.IGNORECASE if kind == "gitdir/i" else 0
    places = {Path(git_folder).as_posix(), Path(os.path.realpath(git_folder)).as_posix()}
    return any(re.fullmatch(expression, place, flags) for place in places)


def _unquoted(text: str) -> str:
    """Return a value: without quotes, comment and white space around it."""
    out: list[str] = []
    quoted = False
    kept = 0  # the length up to the last character that is no white space outside of quotes
    position = 0
    text = text.strip()
    while position < len(text):
        character = text[position]
        if character == '"':
            quoted = not quoted
        elif character in "#;" and not quoted:
            break
        else:
            if character == "\\" and position + 1 < len(text):
                position += 1
                character = {"n": "\n", "t": "\t", "b": "\b"}.get(text[position], text[position])
            out.append(character)
        if quoted or not character.isspace():
            kept = len(out)
        position += 1
    return "".join(out[:kept])
