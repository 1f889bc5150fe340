"""Ignore files: which entries of a folder `.gitignore` and `.epicignore` leave out, as git reads them."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from epic_rag_chroma.gitpatterns import GitPatterns
from epic_rag_chroma.regular import read_regular

__all__ = ["EPIC_IGNORE", "GIT_IGNORE", "Rules"]

logger = logging.getLogger(__name__)

GIT_IGNORE = ".gitignore"
EPIC_IGNORE = ".epicignore"
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class _Layer:
    """The patterns of one ignore file, and what makes a path relative to its folder of one relative to the root.

    Args:
        patterns: The patterns.
        cut: How many characters of the path to leave out, for a file below the root.
        above: What to put before the path, for a file above the root.
    """

    patterns: GitPatterns
    cut: int = 0
    above: str = ""

    def decide(self, path: str, is_folder: bool) -> bool | None:
        """Whether the file ignores an entry; None if it does not say."""
        return self.patterns.decide(self.above + path[self.cut :], is_folder)


@dataclass(frozen=True)
class Rules:
    """The ignore files that hold for a folder, outermost first; all paths are relative to the root, with slashes."""

    git: tuple[_Layer, ...] = ()
    epic: tuple[_Layer, ...] = ()

    @classmethod
    def above(cls, root: Path) -> Rules:
        """The rules that lie between the top of the repository that a root is in, and the root itself.

        There are none if they ignore the root, which was asked for by name: then only the rules inside it hold.
        """
        folders: list[Path] = []
        for folder in (root, *root.parents):
            if folder != root:
                folders.append(folder)
            if (folder / ".git").exists():
                break
        else:
            return cls()
        rules = cls()
        for folder in reversed(folders):
            names = [name for name in (GIT_IGNORE, EPIC_IGNORE) if (folder / name).is_file()]
            rules = rules._with(str(folder), names, above="/".join(root.relative_to(folder).parts) + "/")
            child = root.relative_to(folder).parts[0]
            beneath = root.relative_to(folder / child)
            if rules._ignored_above("" if beneath == Path() else f"{beneath.as_posix()}/"):
                return cls()
        return rules

    def entered(self, folder: str, prefix: str, names: Collection[str]) -> Rules:
        """The rules inside a folder.

        Args:
            folder: Where it is.
            prefix: Its path with a slash at the end; "" for the root.
            names: The names in it.
        """
        return self._with(folder, names, cut=len(prefix))

    def ignores(self, path: str, name: str, is_folder: bool) -> bool:
        """Whether an entry is left out; names that begin with a dot are, unless an `.epicignore` takes them in."""
        said = _decide(self.epic, path, is_folder)
        if said is None:
            said = True if name.startswith(".") else _decide(self.git, path, is_folder)
        return bool(said)

    def _ignored_above(self, beneath: str) -> bool:
        """Whether a folder above the root is ignored: the one from which the root is `beneath`."""

        def shortened(layers: tuple[_Layer, ...]) -> tuple[_Layer, ...]:
            return tuple(
                replace(layer, above=layer.above[: len(layer.above) - len(beneath)].rstrip("/")) for layer in layers
            )

        said = _decide(shortened(self.epic), "", True)
        return bool(_decide(shortened(self.git), "", True) if said is None else said)

    def _with(self, folder: str, names: Collection[str], *, cut: int = 0, above: str = "") -> Rules:
        git, epic = self.git, self.epic
        if GIT_IGNORE in names:
            git = (*git, _Layer(_read(os.path.join(folder, GIT_IGNORE)), cut, above))
        if EPIC_IGNORE in names:
            epic = (*epic, _Layer(_read(os.path.join(folder, EPIC_IGNORE)), cut, above))
        return self if git is self.git and epic is self.epic else Rules(git, epic)


def _decide(layers: tuple[_Layer, ...], path: str, is_folder: bool) -> bool | None:
    for layer in reversed(layers):
        said = layer.decide(path, is_folder)
        if said is not None:
            return said
    return None


def _read(file: str) -> GitPatterns:
    try:
        # git does not follow a link here either.
        data, _ = read_regular(file, _MOST_BYTES)
    except OSError as error:
        logger.warning("cannot read %s (%s); its patterns do not count", file, error.strerror)
        return GitPatterns([], file)
    # As git has it: lines end with a line feed, before which one carriage return does not count; bytes are bytes.
    lines = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").split("\n")
    return GitPatterns([line.removesuffix("\r") for line in lines], file)
