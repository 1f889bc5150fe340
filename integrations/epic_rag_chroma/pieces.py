"""Pieces of a line that is longer than a chunk: a paragraph in one line, minified code, encoded data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

__all__ = ["WINDOW", "CountTokens", "pieces"]

CountTokens = Callable[[Sequence[str]], list[int]]

# Characters that are cut into sentences at a time.
WINDOW = 4000
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")
_UNSPACED = re.compile(r"[^\s,.;\u3002\uff01\uff1f]{400,}")


def pieces(line: str, budget: int, count: CountTokens) -> Iterator[tuple[int, int]]:
    """Pieces of a line: (start, end) in characters, sentences if there are any.

    Args:
        line: A line without its end.
        budget: The most tokens of a chunk; a piece has about a third, so that chunks are filled.
        count: The encoder's own count.
    """
    size = max(1, budget // 3)
    for start, end in _windows(line):
        window = line[start:end]
        if _UNSPACED.search(window):
            # No words to cut at (encoded data, say); a split by characters would count each one by itself.
            step = max(1, len(window) * size // max(1, count([window])[0]))
            yield from ((start + at, min(start + at + step, end)) for at in range(0, len(window), step))
        else:
            yield from ((start + first, start + last) for first, last in _sentences(window, size, count))


def _sentences(text: str, size: int, count: CountTokens) -> list[tuple[int, int]]:
    from llama_index.core.node_parser import SentenceSplitter

    splitter = SentenceSplitter(
        chunk_size=size,
        chunk_overlap=0,
        tokenizer=lambda part: range(count([part])[0]),
        # The default would load nltk, for seconds, to cut English better than this does.
        chunking_tokenizer_fn=_split_sentences,
    )
    try:
        parts = splitter.split_text(text)
    except ValueError:  # a single character of more tokens than a piece may have
        return [(0, len(text))]
    spans = []
    position = 0
    for part in parts:
        # With no overlap, nothing but stripped white space lies between one part and the next.
        start = text.find(part, position)
        if start < 0:
            return [(0, len(text))]
        spans.append((start, start + len(part)))
        position = start + len(part)
    return spans or [(0, len(text))]


def _split_sentences(text: str) -> list[str]:
    edges = [0, *(match.end() for match in _SENTENCE.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(edges) if end > start]


def _windows(line: str) -> Iterator[tuple[int, int]]:
    """Parts of a line that are short enough to be split in reasonable time, cut at white space if there is any."""
    start = 0
    while len(line) - start > WINDOW:
        end = line.rfind(" ", start + WINDOW // 2, start + WINDOW)
        end = start + WINDOW if end < 0 else end + 1
        yield start, end
        start = end
    yield start, len(line)
