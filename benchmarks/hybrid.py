"""Hybrid search compared with dense and keyword search on the retrieval sets of a folder.

    python benchmarks/hybrid.py --data DIR [--pairs FILE ...] [--model NAME] [--dtype bfloat16] [--cache-dir DIR]
                                [--output DIR] [--document docs/search.md]

Words and fusion are the code that an index uses (`IndexDatabase`, `fuse`); vectors are compared by brute force. Queries
are encoded as `epic-rag eval` does at k = 0: with the set's instruction and no demonstrations, and have no syntax. All
scores are nDCG@10. A reranking set counts as retrieval among each query's own candidates. Besides the three modes,
other weights of the fusion and reciprocal rank fusion are scored, and for each set the weights that are best on the
others: nothing is chosen on the set that it is scored on. Files of training pairs (`--pairs`), 1,000 rows and 250
queries of each, are what the weights were chosen on. The last table says which passages of a corpus the search would
take for near-duplicates.

Writes hybrid.json and hybrid.md to the output folder, and the tables between the markers of the document.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
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
from epic_rag_chroma.search.fusion import FUSION_DEPTH, KEYWORD_WEIGHT, LEAST_COVERAGE, fuse
from epic_rag_chroma.store.database import IndexDatabase, Record
from epic_rag_chroma.store.tokenizer import plain_query

DEPTH = 1000
CONSTANTS = (5, 60)
WEIGHTS = (0.75, 1.1, 1.5, 2.0)
COVERAGES = (0.0, 0.3, 0.5, 1.0)
DEPTHS = (20, 100, 500)
PAIRS = 1000
PAIR_QUERIES = 250
NEIGHBOURS = 20

Rankings = list[list[int]]
Scored = list[list[tuple[int, float]]]
"""For each query numbers of passages with their scores, best first."""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--data", required=True, type=Path, metavar="DIR", help="a folder of evaluation sets")
    options.add_argument("--pairs", nargs="*", default=[], type=Path, metavar="FILE", help="files of training pairs")
    options.add_argument("--model", default=DEFAULT_CHECKPOINT)
    options.add_argument("--tasks", metavar="NAME,...", help="these sets only")
    options.add_argument("--dtype")
    options.add_argument("--cache-dir", type=Path, metavar="DIR", help="where vectors are kept between runs")
    options.add_argument("--output", type=Path, default=Path("runs/hybrid"), metavar="DIR")
    options.add_argument("--document", type=Path, help="a document with the markers `hybrid`")
    return options


@dataclass
class Ranked:
    """A set with the rankings of its queries, as numbers of passages, and the keyword score that each could have."""

    name: str
    relevant: list[dict[int, int]]
    passages: int
    dense: Scored
    keyword: Scored
    attainable: list[float]
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
    return ranked(
        local.name, texts, queries, relevant, candidates, entry_for(local.name, local.kind).instruction, store
    )


def rank_pairs(path: Path, store: EmbeddingStore) -> Ranked:
    """Rank queries of a file of training pairs in its passages; passages of one group are all relevant."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    numbers: dict[str, int] = {}
    relevant: dict[str, dict[int, int]] = {}
    groups: dict[str, dict[int, int]] = {}
    for row in rows[:PAIRS]:
        number = numbers.setdefault(row["positive"], len(numbers))
        relevant.setdefault(row["query"], {})[number] = 1
        if row.get("group"):
            groups.setdefault(row["group"], {})[number] = 1
    for row in rows[:PAIRS]:
        relevant[row["query"]].update(groups.get(row.get("group") or "", {}))
    name = path.name.removesuffix(".jsonl.gz")
    instructions = path.with_name("instructions.json")
    instruction = json.loads(instructions.read_text("utf-8")).get(name) if instructions.exists() else None
    queries = list(relevant)[:PAIR_QUERIES]
    return ranked(name, list(numbers), queries, [relevant[query] for query in queries], None, instruction, store)


def ranked(
    name: str,
    texts: Sequence[str],
    queries: Sequence[str],
    relevant: list[dict[int, int]],
    candidates: list[list[int]] | None,
    instruction: str | None,
    store: EmbeddingStore,
) -> Ranked:
    prompt = make_prompt(instruction)
    documents = store.documents(texts)
    dense: Scored = []
    for place, vector in enumerate(store.queries(queries, prompt)):
        allowed = np.arange(len(texts)) if candidates is None else np.array(candidates[place])
        cosines = documents[allowed] @ vector
        order = np.argsort(-cosines, kind="stable")[:DEPTH]
        dense.append([(int(allowed[each]), float(cosines[each])) for each in order])
    repeated, pairs = duplicates(texts, documents)
    keyword, attainable = by_words(texts, queries, candidates)
    return Ranked(name, relevant, len(texts), dense, keyword, attainable, repeated, pairs)


def by_words(
    texts: Sequence[str], queries: Sequence[str], candidates: list[list[int]] | None
) -> tuple[Scored, list[float]]:
    # Equal scores are put in the order of the ids, so these are as long as the longest.
    ids = [f"{number:08}" for number in range(len(texts))]
    no_vector = np.zeros(1, dtype=np.float32)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(IndexDatabase.open(Path(folder) / "index.sqlite")) as database,
    ):
        with database.transaction():
            database.put([Record(name, text, {}, no_vector) for name, text in zip(ids, texts, strict=True)])
        found: Scored = []
        attainable = []
        for place, query in enumerate(map(plain_query, queries)):
            allowed = None
            if candidates is not None:
                allowed = database.numbers_of([ids[number] for number in candidates[place]])
            found.append([(int(each), score) for each, score in database.match(query, DEPTH, allowed)])
            attainable.append(database.attainable(query))
    return found, attainable


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


def fused(
    item: Ranked, *, weight: float = KEYWORD_WEIGHT, coverage: float = LEAST_COVERAGE, depth: int = FUSION_DEPTH
) -> Rankings:
    found = []
    for dense, keyword, attainable in zip(item.dense, item.keyword, item.attainable, strict=True):
        named = [[(f"{number:08}", score) for number, score in scores[:depth]] for scores in (dense, keyword)]
        fusion = fuse(named[0], named[1], attainable, weight=weight, coverage=coverage, depth=depth)
        found.append([int(each) for each, _ in fusion])
    return found


def reciprocal(item: Ranked, constant: int) -> Rankings:
    """Fuse by reciprocal rank (Cormack, Clarke and Büttcher 2009)."""
    found = []
    for rankings in zip(item.dense, item.keyword, strict=True):
        scores: dict[int, float] = {}
        for ranking in rankings:
            for place, (each, _) in enumerate(ranking[:FUSION_DEPTH], start=1):
                scores[each] = scores.get(each, 0.0) + 1.0 / (constant + place)
        found.append(sorted(scores, key=lambda each: (-scores[each], each)))
    return found


def numbers(scored: Scored) -> Rankings:
    return [[number for number, _ in scores] for scores in scored]


def tables(items: Sequence[Ranked], *, are_pairs: bool = False) -> tuple[str, dict[str, object]]:
    """Return the tables, and the same figures for the JSON file; of files of pairs a single table."""
    names = [item.name for item in items]
    scores: dict[str, list[float]] = {}

    def add(label: str, ranking: Callable[[Ranked], Rankings]) -> None:
        scores[label] = [item.ndcg(ranking(item)) for item in items]

    add("dense", lambda item: numbers(item.dense))
    add("keyword", lambda item: numbers(item.keyword))
    add("hybrid", fused)
    modes = list(scores)
    for weight in WEIGHTS:
        for coverage in COVERAGES:
            add(
                setting(weight, coverage),
                lambda item, weight=weight, coverage=coverage: fused(item, weight=weight, coverage=coverage),
            )
    held_out = [best_elsewhere(scores, number) for number in range(len(items))]
    scores["weights chosen on the other sets"] = [scores[label][number] for number, label in enumerate(held_out)]
    for depth in DEPTHS:
        add(f"depth {depth}", lambda item, depth=depth: fused(item, depth=depth))
    for constant in CONSTANTS:
        add(f"reciprocal rank, constant {constant}", lambda item, constant=constant: reciprocal(item, constant))
    others = [label for label in scores if label not in modes]
    parts = [
        score_table(names, {label: scores[label] for label in modes}),
        f"Other fusions than with {setting(KEYWORD_WEIGHT, LEAST_COVERAGE)} to depth {FUSION_DEPTH}:",
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
    if are_pairs:
        parts = [score_table(names, scores)]
    facts: dict[str, object] = {
        "sets": names,
        "scores": scores,
        "chosen_on_the_other_sets": held_out,
        "repeated": {item.name: item.repeated for item in items},
        "pairs": {item.name: item.pairs for item in items},
    }
    return "\n\n".join(parts), facts


def setting(weight: float, coverage: float) -> str:
    return f"words weigh {weight:g}, coverage {coverage:g}"


def best_elsewhere(scores: Mapping[str, Sequence[float]], left_out: int) -> str:
    """Return the weights with the highest mean over the other sets; the first of equal ones."""

    def mean(label: str) -> float:
        rest = [score for number, score in enumerate(scores[label]) if number != left_out]
        return float(np.mean(rest)) if rest else 0.0

    return max((setting(weight, coverage) for weight in WEIGHTS for coverage in COVERAGES), key=mean)


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
    if options.pairs:
        tuned, pair_facts = tables([rank_pairs(path, store) for path in options.pairs], are_pairs=True)
        text = f"{text}\n\nThe same on files of training pairs, on which the weights were chosen:\n\n{tuned}"
        facts["pairs_of_training"] = pair_facts["scores"]
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
    pairs = " ".join(f"data/train/{path.name}" for path in options.pairs)
    return f"python benchmarks/hybrid.py --data data/eval --model {options.model}{dtype}" + (
        f" \\\n  --pairs {pairs}" if pairs else ""
    )


if __name__ == "__main__":
    try:
        run(parser().parse_args())
    except EpicError as error:
        sys.exit(f"error: {error}")
