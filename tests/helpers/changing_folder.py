"""A folder of text files that are edited at random, with every text that a file ever had."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

WORDS = ("alpha", "beta", "gamma", "delta", "river", "stone", "cloud", "green", "under", "seven", "paper", "light")

Texts = dict[str, tuple[str, ...]]
"""Texts of a file's chunks, by path."""


class ChangingFolder:
    """A folder of files; each paragraph is one chunk, and no two paragraphs are alike."""

    def __init__(self, folder: Path, chance: random.Random, files: int) -> None:
        self.folder = folder
        self._chance = chance
        self._files_made = 0
        self._texts_made = 0
        self._protected: frozenset[str] = frozenset()
        self.history: defaultdict[str, set[str]] = defaultdict(set)  # every text that a path ever had
        folder.mkdir()
        for _ in range(files):
            self.add()

    def protect(self, *folders: str) -> None:
        """Do not change files in these folders from now on."""
        self._protected = frozenset(folders)

    def texts(self) -> Texts:
        """Return the current content, and add it to `history`."""
        now = {
            path.relative_to(self.folder).as_posix(): tuple(path.read_text().rstrip("\n").split("\n\n"))
            for path in self._all_paths()
        }
        for path, texts in now.items():
            self.history[path].update(texts)
        return now

    def change(self) -> None:
        """Make a random number of changes of every kind."""
        for step, times in ((self.add, 8), (self.edit, 12), (self.rename, 5), (self.move_text, 4), (self.delete, 5)):
            for _ in range(self._chance.randint(0, times)):
                step()

    def change_once(self) -> None:
        """Make one random change."""
        self._chance.choice([self.add, self.edit, self.edit, self.rename, self.move_text, self.delete])()

    def add(self) -> None:
        self._files_made += 1
        path = self.folder / self._chance.choice(["", "sub", "sub/deep"]) / f"file{self._files_made:04}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(self._text() for _ in range(self._chance.randint(1, 6))) + "\n")

    def edit(self) -> None:
        path = self._chance.choice(self._paths())
        texts = path.read_text().rstrip("\n").split("\n\n")
        at = self._chance.randrange(len(texts))
        match self._chance.randrange(3):
            case 0:
                texts[at] = self._text()
            case 1:
                texts.insert(at, self._text())
            case _ if len(texts) > 1:
                del texts[at]
        path.write_text("\n\n".join(texts) + "\n")

    def rename(self) -> None:
        path = self._chance.choice(self._paths())
        self._files_made += 1
        path.rename(path.with_name(f"file{self._files_made:04}.txt"))

    def move_text(self) -> None:
        """Move a text from one file to another."""
        source, target = self._chance.sample(self._paths(), 2)
        texts = source.read_text().rstrip("\n").split("\n\n")
        if len(texts) > 1:
            moved = texts.pop(self._chance.randrange(len(texts)))
            source.write_text("\n\n".join(texts) + "\n")
            target.write_text(target.read_text() + "\n" + moved + "\n")

    def delete(self) -> None:
        paths = self._paths()
        if len(paths) > 2:  # two are needed to move a text
            self._chance.choice(paths).unlink()

    def _text(self) -> str:
        self._texts_made += 1
        words = " ".join(self._chance.choice(WORDS) for _ in range(self._chance.randint(15, 24)))
        return f"unique{self._texts_made:05} {words}"

    def _paths(self) -> list[Path]:
        return [path for path in self._all_paths() if self._protected.isdisjoint(path.parts)]

    def _all_paths(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*.txt") if ".epic-rag" not in path.parts)
