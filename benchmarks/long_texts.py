"""Texts that are longer than the encoder reads: cut, or embedded in windows whose vectors are averaged.

    python benchmarks/long_texts.py --pairs docs_sections.jsonl.gz [--set eval/manuals_git_apache] [--manuals 12]
                                    [--sections 400] [--queries 300] [--output DIR]
                                    [--document benchmarks/README.md]

The sections of each manual are joined into one document and split by LlamaIndex's `SentenceSplitter`: with its default
of 1,024 tokens, and, for comparison, into nodes that the encoder reads as a whole. A query is the heading of a section
(or a question of the set), without the heading in the text; relevant are the nodes that contain at least half of its
section. All nodes of all manuals are one collection; scores are nDCG@10 of the vectors alone.

The pairs are training data: on them the way is chosen. The set is held out and confirms the choice.

Writes long_texts.json and long_texts.md to the output folder, and the table between the markers of the document.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_index.core
import numpy as np
import numpy.typing as npt
from bench_common import run_main, say
from results_report import replace_between

from epic_rag import EpicEncoder
from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import DataError
from epic_rag.evaluation.report import markdown_table, versions
from epic_rag.metrics import ndcg_of_scores, unit_rows

_SEED = 7
_HALF = 0.5
_JOINT = "\n\n"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--pairs", type=Path, required=True, metavar="FILE", help="training file with `source`")
    options.add_argument("--set", type=Path, metavar="DIR", help="a BEIR folder whose ids are MANUAL-NUMBER, in order")
    options.add_argument("--manuals", type=int, default=12, help="number of manuals of the training file")
    options.add_argument("--sections", type=int, default=400, help="sections of each")
    options.add_argument("--queries", type=int, default=300, help="queries of each collection")
    options.add_argument("--model", default=DEFAULT_CHECKPOINT)
    options.add_argument("--document", type=Path, metavar="FILE", help="a document with the markers `long_texts`")
    options.add_argument("--output", type=Path, default=Path("runs/long_texts"), metavar="DIR")
    return options


@dataclass(frozen=True)
class Manuals:
    """Sections by manual, in order, and queries with the numbers of their sections."""

    name: str
    sections: dict[str, list[str]]
    queries: list[tuple[str, set[tuple[str, int]]]]


def from_pairs(file: Path, manuals: int, sections: int, queries: int) -> Manuals:
    """Read the manuals in the middle of the file by size, since the largest ones are cut to `sections` in any case."""
    rows = read_rows(file)
    sizes = Counter(row["source"] for row in rows)
    enough = sorted(name for name, size in sizes.items() if size >= sections)
    chosen = random.Random(_SEED).sample(enough, min(manuals, len(enough)))
    texts: dict[str, list[str]] = {name: [] for name in chosen}
    asked: list[tuple[str, set[tuple[str, int]]]] = []
    for row in rows:
        own = texts.get(row["source"])
        if own is not None and len(own) < sections:
            asked.append((row["query"], {(row["source"], len(own))}))
            own.append(row["positive"])
    return Manuals(file.name.partition(".")[0], texts, random.Random(_SEED).sample(asked, min(queries, len(asked))))


def from_set(folder: Path, sections: int, queries: int) -> Manuals:
    """Read a BEIR folder as manuals: the first sections of each, and the queries that they answer."""
    texts: dict[str, list[str]] = {}
    place: dict[str, tuple[str, int]] = {}
    for row in sorted(read_rows(next(folder.glob("corpus.jsonl*"))), key=lambda row: str(row["_id"])):
        manual = row["_id"].rpartition("-")[0]
        if len(texts.get(manual, ())) >= sections:
            continue
        place[row["_id"]] = (manual, len(texts.setdefault(manual, [])))
        texts[manual].append(f"{row.get('title') or ''} {row['text']}".strip())
    relevant: dict[str, set[tuple[str, int]]] = {}
    for line in (folder / "qrels" / "test.tsv").read_text("utf-8").splitlines()[1:]:
        query, passage, grade = line.split("\t")
        if int(grade) > 0 and passage in place:
            relevant.setdefault(query, set()).add(place[passage])
    asked = [
        (row["text"], relevant[row["_id"]])
        for row in read_rows(next(folder.glob("queries.jsonl*")))
        if row["_id"] in relevant
    ]
    return Manuals(folder.name, texts, random.Random(_SEED).sample(asked, min(queries, len(asked))))


def read_rows(file: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in content.decode("utf-8").split("\n") if line]


def nodes_of(manuals: Manuals, splitter: Any) -> tuple[list[str], list[set[tuple[str, int]]]]:
    """Return the texts of all nodes, and the sections of which each contains at least half."""
    texts: list[str] = []
    contents: list[set[tuple[str, int]]] = []
    for name, sections in manuals.sections.items():
        starts, document = [], ""
        for section in sections:
            starts.append(len(document))
            document += section + _JOINT
        position = 0
        for text in splitter.split_text(document):
            # Nodes overlap: the next begins after the start of the last.
            first = document.index(text, position)
            position, end = first + 1, first + len(text)
            contained = set()
            number = bisect_right(starts, first) - 1
            while number < len(sections) and starts[number] < end:
                begin, stop = starts[number], starts[number] + len(sections[number])
                if min(stop, end) - max(begin, first) >= _HALF * (stop - begin):
                    contained.add((name, number))
                number += 1
            texts.append(text)
            contents.append(contained)
    return texts, contents


def ndcg(
    queries: Sequence[tuple[str, set[tuple[str, int]]]],
    vectors: npt.NDArray[np.float32],
    documents: npt.NDArray[np.float32],
    contents: Sequence[set[tuple[str, int]]],
) -> float:
    grades = [{node: 1 for node, sections in enumerate(contents) if sections & wanted} for _, wanted in queries]
    kept = [place for place, grade in enumerate(grades) if grade]
    scores = [vectors[place] @ documents.T for place in kept]
    return 100 * float(np.mean(ndcg_of_scores(scores, [grades[place] for place in kept])))


def ways(encoder: EpicEncoder, texts: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the vectors of texts by each way."""
    parts = [encoder.windows(text) for text in texts]
    pieces = [part for own in parts for part in own]
    windows = encoder.encode_document(pieces)
    starts = np.cumsum([0, *map(len, parts[:-1])])

    def means(weights: Sequence[float]) -> npt.NDArray[np.float32]:
        return unit_rows(np.add.reduceat(windows * np.array(weights, np.float32)[:, None], starts))

    return {
        "cut": encoder.encode_document(texts),
        "windows, averaged by tokens": means(encoder.count_tokens(pieces)),
        "windows, each weighted half as much as the one before": means(
            [0.5**place for own in parts for place in range(len(own))]
        ),
    }


def measure(options: argparse.Namespace) -> int:
    """Print and write the table."""
    # tiktoken's file is in the package; otherwise it would be downloaded.
    static = Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(static))
    from llama_index.core.node_parser import SentenceSplitter

    encoder = EpicEncoder.from_pretrained(options.model)
    fitting = SentenceSplitter(
        chunk_size=encoder.max_document_tokens - 2,
        chunk_overlap=20,
        tokenizer=lambda text: range(encoder.count_tokens([text])[0]),
    )
    collections = [from_pairs(options.pairs, options.manuals, options.sections, options.queries)]
    if options.set is not None:
        collections.append(from_set(options.set, options.sections, options.queries))
    found: dict[str, dict[str, float]] = {}
    sizes: dict[str, dict[str, float]] = {}
    for manuals in collections:
        queries = encoder.encode_query([query for query, _ in manuals.queries], task="docs")
        texts, contents = nodes_of(manuals, SentenceSplitter())
        tokens = encoder.count_tokens(texts)
        sizes[manuals.name] = {"nodes": len(texts), "tokens": float(np.mean(tokens)), "queries": len(manuals.queries)}
        say(f"{manuals.name}: {sizes[manuals.name]}")
        for way, vectors in ways(encoder, texts).items():
            found.setdefault(way, {})[manuals.name] = ndcg(manuals.queries, queries, vectors, contents)
            say(f"{way}: {found[way]}")
        texts, contents = nodes_of(manuals, fitting)
        way = f"nodes of {encoder.max_document_tokens} tokens"
        found.setdefault(way, {})[manuals.name] = ndcg(
            manuals.queries, queries, encoder.encode_document(texts), contents
        )
        sizes[manuals.name]["fitting nodes"] = len(texts)
        say(f"{way}: {found[way]}")
    names = [manuals.name for manuals in collections]
    rows = [[way, *(f"{scores[name]:.2f}" for name in names)] for way, scores in found.items()]
    table = markdown_table(["nodes of 1,024 tokens, embedded as", *names], rows, text_columns=1)
    about = "; ".join(
        f"{name}: {size['nodes']:.0f} nodes of {size['tokens']:.0f} tokens ({size['fitting nodes']:.0f} shorter ones), "
        f"{size['queries']:.0f} queries"
        for name, size in sizes.items()
    )
    text = f"{encoder.name}, nDCG@10. {about}.\n\n{table}"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "long_texts.md").write_text(text + "\n", encoding="utf-8")
    record = {"scores": found, "sizes": sizes, "versions": versions()}
    (options.output / "long_texts.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.document is not None:
        replaced = replace_between(options.document.read_text("utf-8"), "long_texts", text)
        if replaced is None:
            raise DataError(f"{options.document} has no markers `long_texts`. Add them.")
        options.document.write_text(replaced, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
