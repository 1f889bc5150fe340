"""Hybrid search compared with dense and keyword search on the retrieval sets of a folder.

    python benchmarks/hybrid.py --data DIR [--model NAME] [--dtype bfloat16] [--cache-dir DIR] [--output DIR]
                                [--document docs/search.md]

Words and fusion are the code that an index uses (`IndexDatabase`, `fuse`); vectors are compared by brute force. Queries
are encoded as `epic-rag eval` does at k = 0: with the set's instruction and no demonstrations. All scores are nDCG@10.
A reranking set counts as retrieval among each query's own candidates. Besides the three modes, other constants, depths
and weights of the fusion are scored, and for each set the constant that is best on the others: nothing is chosen on
the set that it is scored on. The last table says which passages of a corpus the search would take for near-duplicates.

Writes hybrid.json and hybrid.md to the output folder, and the tables between the markers of the document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from results_report import replace_between

from epic_rag import EpicEncoder
from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import EpicError
from epic_rag.evaluation.datasets import (
    LocalSet,
    RerankingData,
    RetrievalData,
    entry_for,
    find_local_sets,
    load_local_set,
    set_kind,
)
from epic_rag.evaluation.embedding_store import EmbeddingStore, make_prompt
from epic_rag.evaluation.report import markdown_table
from epic_rag.metrics import ndcg_of_scores
from epic_rag_chroma.search.deduplicate import ComparedText
from epic_rag_chroma.search.fusion import FUSION_DEPTH, RANK_CONSTANT, fuse
from epic_rag_chroma.store.database import IndexDatabase, Record

DEPTH = 1000
CONSTANTS = (1, 2, 5, 10, 20, 60, 100)
DEPTHS = (10, 20, 50, 100, 200, 1000)
WEIGHTS = (0.5, 0.75, 1.5, 2.0)
NEIGHBOURS = 20

Rankings = list[list[int]]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--data", required=True, type=Path, metavar="DIR", help="a folder of evaluation sets")
    options.add_argument("--model", default=DEFAULT_CHECKPOINT)
    options.add_argument("--tasks", metavar="NAME,...", help="these sets only")
    options.add_argument("--dtype")
    options.add_argument("--cache-dir", type=Path, metavar="DIR", help="where vectors are kept between runs")
    options.add_argument("--output", type=Path, default=Path("runs/hybrid"), metavar="DIR")
    options.add_argument("--document", type=Path, help="a document with the markers `hybrid`")
    return options


@dataclass
class Ranked:
    """A set with the rankings of its queries, as numbers of passages."""

    name: str
    relevant: list[dict[int, int]]
    passages: int
    dense: Rankings
    keyword: Rankings
    repeated: int
    pairs: list[tuple[float, str, str]]

    def ndcg(self, rankings: Rankings) -> float:
        """Mean nDCG@10 in percent."""

        def scored() -> list[npt.NDArray[np.float32]]:
            rows = []
            for ranking in rankings:
                row = np.full(self.passages, -np.inf, dtype=np.float32)
                row[ranking[:10]] = -np.arange(len(ranking[:10]))
                rows.append(row)
            return rows

        return 100 * float(np.mean(ndcg_of_scores(scored(), self.relevant)))


def contents(local: LocalSet) -> tuple[list[str], list[str], list[dict[int, int]], list[list[int]] | None]:
    """Passages, queries, each query's relevant passages, and its only candidates, if the set has them."""
    if isinstance(local.data, RetrievalData):
        texts = [f"{document.title} {document.text}".strip() for document in local.data.corpus]
        numbers = {document.id: number for number, document in enumerate(local.data.corpus)}
        grades = [{numbers[each]: grade for each, grade in local.data.relevant[q].items()} for q in local.data.queries]
        return texts, list(local.data.queries.values()), grades, None
    data = local.data
    if not isinstance(data, RerankingData):
        raise EpicError(f"{local.name} is a set of kind {local.kind}; name retrieval or reranking sets with --tasks")
    both = list(zip(data.positives, data.negatives, strict=True))
    texts = list(dict.fromkeys(text for good, bad in both for text in (*good, *bad)))
    numbers = {text: number for number, text in enumerate(texts)}
    relevant = [dict.fromkeys((numbers[text] for text in good), 1) for good, _ in both]
    candidates = [sorted({numbers[text] for text in (*good, *bad)}) for good, bad in both]
    return texts, list(data.queries), relevant, candidates


def rank(local: LocalSet, store: EmbeddingStore) -> Ranked:
    texts, queries, relevant, candidates = contents(local)
    prompt = make_prompt(entry_for(local.name, local.kind).instruction)
    documents = store.documents(texts)
    dense: Rankings = []
    for place, vector in enumerate(store.queries(queries, prompt)):
        allowed = np.arange(len(texts)) if candidates is None else np.array(candidates[place])
        order = np.argsort(-(documents[allowed] @ vector), kind="stable")[:DEPTH]
        dense.append([int(each) for each in allowed[order]])
    repeated, pairs = duplicates(texts, documents)
    return Ranked(local.name, relevant, len(texts), dense, by_words(texts, queries, candidates), repeated, pairs)


def by_words(texts: Sequence[str], queries: Sequence[str], candidates: list[list[int]] | None) -> Rankings:
    # Equal scores are put in the order of the ids, so these are as long as the longest.
    ids = [f"{number:08}" for number in range(len(texts))]
    no_vector = np.zeros(1, dtype=np.float32)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(IndexDatabase.open(Path(folder) / "index.sqlite")) as database,
    ):
        with database.transaction():
            database.put([Record(name, text, {}, no_vector) for name, text in zip(ids, texts, strict=True)])
        found = []
        for place, query in enumerate(queries):
            allowed = None
            if candidates is not None:
                allowed = database.numbers_of([ids[number] for number in candidates[place]])
            found.append([int(each) for each, _ in database.match(query, DEPTH, allowed)])
    return found


def duplicates(texts: Sequence[str], documents: npt.NDArray[np.float32]) -> tuple[int, list[tuple[float, str, str]]]:
    """Count the passages that resemble one of their nearest neighbours; return the pairs with their cosines, too."""
    passages = [ComparedText(text) for text in texts]
    repeated: set[int] = set()
    pairs = []
    for start in range(0, len(texts), 512):
        cosines = documents[start : start + 512] @ documents.T
        nearest = np.argpartition(-cosines, min(NEIGHBOURS, len(texts) - 1), axis=1)[:, :NEIGHBOURS]
        for row, others in enumerate(nearest, start=start):
            for other in sorted(int(each) for each in others if each < row):
                if passages[row].is_near_duplicate(passages[other]):
                    repeated.add(row)
                    pairs.append((float(cosines[row - start, other]), texts[other], texts[row]))
    return len(repeated), pairs


def fused(item: Ranked, *, constant: int = RANK_CONSTANT, depth: int = FUSION_DEPTH) -> Rankings:
    found = []
    for one, other in zip(item.dense, item.keyword, strict=True):
        names = [[f"{number:08}" for number in ranking[:depth]] for ranking in (one, other)]
        found.append([int(each) for each, _ in fuse(*names, constant=constant)])
    return found


def weighted(item: Ranked, weight: float) -> Rankings:
    """Fuse with a weight on the keyword ranking."""
    found = []
    for rankings in zip(item.dense, item.keyword, strict=True):
        scores: dict[int, float] = {}
        for ranking, share in zip(rankings, (1.0, weight), strict=True):
            for place, each in enumerate(ranking[:FUSION_DEPTH], start=1):
                scores[each] = scores.get(each, 0.0) + share / (RANK_CONSTANT + place)
        found.append(sorted(scores, key=lambda each: (-scores[each], each)))
    return found


def tables(items: Sequence[Ranked]) -> tuple[str, dict[str, object]]:
    """Return the tables, and the same figures for the JSON file."""
    names = [item.name for item in items]
    scores: dict[str, list[float]] = {}

    def add(label: str, ranking: Callable[[Ranked], Rankings]) -> None:
        scores[label] = [item.ndcg(ranking(item)) for item in items]

    add("dense", lambda item: item.dense)
    add("keyword", lambda item: item.keyword)
    add("hybrid", fused)
    modes = list(scores)
    for constant in CONSTANTS:
        add(f"constant {constant}", lambda item, constant=constant: fused(item, constant=constant))
    held_out = [best_elsewhere(scores, number) for number in range(len(items))]
    scores["constant chosen on the other sets"] = [
        scores[f"constant {constant}"][number] for number, constant in enumerate(held_out)
    ]
    for depth in DEPTHS:
        add(f"depth {depth}", lambda item, depth=depth: fused(item, depth=depth))
    for weight in WEIGHTS:
        add(f"words weigh {weight:g}", lambda item, weight=weight: weighted(item, weight))
    others = [label for label in scores if label not in modes]
    parts = [
        score_table(names, {label: scores[label] for label in modes}),
        f"Other fusions than with constant {RANK_CONSTANT} to depth {FUSION_DEPTH} (the constants that were best on "
        f"the other sets are {', '.join(map(str, held_out))}):",
        score_table(names, {label: scores[label] for label in others}),
        "Near-duplicates in the corpora:",
        markdown_table(
            ["set", "passages", "that repeat another", "lowest cosine of such a pair"],
            [
                [
                    item.name,
                    str(item.passages),
                    str(item.repeated),
                    f"{min(cosine for cosine, _, _ in item.pairs):.2f}" if item.pairs else "",
                ]
                for item in items
            ],
            text_columns=1,
        ),
    ]
    facts: dict[str, object] = {
        "sets": names,
        "scores": scores,
        "constants_chosen_on_the_other_sets": held_out,
        "repeated": {item.name: item.repeated for item in items},
        "pairs": {item.name: item.pairs for item in items},
    }
    return "\n\n".join(parts), facts


def best_elsewhere(scores: Mapping[str, Sequence[float]], left_out: int) -> int:
    """Return the constant with the highest mean over the other sets; the smallest of equal ones."""

    def mean(constant: int) -> float:
        rest = [score for number, score in enumerate(scores[f"constant {constant}"]) if number != left_out]
        return float(np.mean(rest)) if rest else 0.0

    return max(CONSTANTS, key=mean)


def score_table(names: Sequence[str], scores: Mapping[str, Sequence[float]]) -> str:
    rows = [
        [label, *(f"{score:.2f}" for score in of_sets), f"**{np.mean(of_sets):.2f}**"]
        for label, of_sets in scores.items()
    ]
    return markdown_table(["nDCG@10", *names, "mean"], rows, text_columns=1)


def run(options: argparse.Namespace) -> None:
    encoder = EpicEncoder.from_pretrained(options.model, dtype=options.dtype)
    store = EmbeddingStore(
        encoder,
        folder=options.cache_dir,
        precision=str(encoder.dtype).removeprefix("torch."),
        show_progress=sys.stderr.isatty(),
    )
    names = options.tasks.split(",") if options.tasks else find_local_sets(options.data)
    items = []
    for name in names:
        if set_kind(options.data / name) in ("retrieval", "reranking"):
            print(name, file=sys.stderr)
            items.append(rank(load_local_set(options.data / name), store))
    if not items:
        raise EpicError(f"{options.data} has no retrieval set; give --data the folder that holds the sets' folders")
    text, facts = tables(items)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "hybrid.md").write_text(text + "\n", encoding="utf-8")
    record = {"model": encoder.name, "fingerprint": encoder.fingerprint, **facts}
    (options.output / "hybrid.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)
    if options.document is not None:
        block = f"```text\n{shown(options)}\n```\n\n{text}"
        written = replace_between(options.document.read_text(encoding="utf-8"), "hybrid", block)
        if written is None:
            raise EpicError(f"{options.document} has no markers `hybrid`; add <!-- begin hybrid --> and its end")
        options.document.write_text(written, encoding="utf-8")


def shown(options: argparse.Namespace) -> str:
    dtype = f" --dtype {options.dtype}" if options.dtype else ""
    return f"python benchmarks/hybrid.py --data data/eval --model {options.model}{dtype}"


if __name__ == "__main__":
    try:
        run(parser().parse_args())
    except EpicError as error:
        sys.exit(f"error: {error}")
