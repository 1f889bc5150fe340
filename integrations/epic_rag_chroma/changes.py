"""Which changes of the file system can change an index: the walk's rules, asked about one path at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from epic_rag_chroma.files import NamePatterns, display_name, is_index_folder, is_version_control
from epic_rag_chroma.ignore import EPIC_IGNORE, GIT_IGNORE, Rules
from epic_rag_chroma.readers import is_binary_name
from epic_rag_chroma.types import IndexSettings

__all__ = ["ChangeFilter"]

# What vim writes to see whether it may write.
_PROBES = frozenset({"4913"})


class ChangeFilter:
    """Says of a path that has changed (or is gone) whether a walk may now find something else.

    What an index folder or version control writes, ignored files, binaries and what editors leave behind for a moment
    does not count. When in doubt, a change counts.

    Args:
        roots: The folders and files of the index, resolved.
        settings: The index's settings.
        index_dir: The index folder.
    """

    def __init__(self, roots: Sequence[Path], settings: IndexSettings, index_dir: Path) -> None:
        self._roots = [(str(root), root.is_dir()) for root in roots]
        self._patterns = NamePatterns(settings)
        self._index_dir = str(index_dir)
        self._rules: dict[str, Rules | None] = {}

    def refresh(self) -> None:
        """Forget the ignore files that were read; they may have changed."""
        self._rules.clear()

    def __call__(self, location: str) -> bool:
        """Whether a change of `location` counts."""
        if _below(location, self._index_dir) is not None:
            return False
        for root, is_folder in self._roots:
            path = _below(location, root)
            if path is not None:
                return not path or not is_folder or self._counts(root, path)
        return False

    def _counts(self, root: str, path: str) -> bool:
        rules = self._inside(root, "", Rules.above(Path(root)))
        folder = ""
        *parents, name = path.split("/")
        for parent in parents:
            if rules is None or self._left_out(rules, folder + parent, parent, True):
                return False
            folder = f"{folder}{parent}/"
            rules = self._inside(root, folder, rules)
        if rules is None or name in _PROBES:
            return False
        if name in (GIT_IGNORE, EPIC_IGNORE):
            return True
        if os.path.isdir(os.path.join(root, path)):
            return not self._left_out(rules, path, name, True)
        # What is gone may have been a folder.
        gone = not os.path.lexists(os.path.join(root, path))
        as_file = not self._left_out(rules, path, name, False) and not is_binary_name(name)
        return as_file or (gone and not self._left_out(rules, path, name, True))

    def _left_out(self, rules: Rules, path: str, name: str, is_folder: bool) -> bool:
        return (
            is_version_control(name)
            or display_name(path) != path
            or rules.ignores(path, name, is_folder)
            or self._patterns.exclude(path, is_folder)
        )

    def _inside(self, root: str, prefix: str, rules: Rules) -> Rules | None:
        """The rules in a folder; None if nothing in it counts."""
        folder = os.path.join(root, prefix)
        if folder not in self._rules:
            if prefix and is_index_folder(folder):
                self._rules[folder] = None
            else:
                names = [name for name in (GIT_IGNORE, EPIC_IGNORE) if os.path.lexists(os.path.join(folder, name))]
                self._rules[folder] = rules.entered(folder, prefix, names)
        return self._rules[folder]


def _below(location: str, folder: str) -> str | None:
    """The path of `location` relative to a folder, with slashes; "" for the folder, None if it is elsewhere."""
    if location == folder:
        return ""
    start = folder.rstrip(os.sep) + os.sep
    return location[len(start) :].replace(os.sep, "/") if location.startswith(start) else None
