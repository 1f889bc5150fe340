"""Build the built-in banks, and measure what each brings on sets that it was not made from.

    python benchmarks/built_in_banks.py build --data DIR [--only NAME,...]
    python benchmarks/built_in_banks.py embed
    python benchmarks/built_in_banks.py evaluate --data DIR --eval DIR [--model NAME] [--sizes 16,64] [--cache-dir DIR]

`build` keeps the first demonstrations of each bank, which are written by hand and are a mixed choice, and appends
demonstrations that are drawn from openly licensed training pairs (`SOURCES` has files, licences and filters) with a
fixed seed; then it writes `bank.json`. `embed` computes the vectors of all banks for every shipped checkpoint, in half
precision; run it after a checkpoint has changed.

`evaluate` ranks the queries of other sets of each task with the bank's instruction, without and with its
demonstrations, among the set's own documents and among those of all sets with other queries, by cosine and fused with
BM25.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_common import run_main

from epic_rag import DemonstrationBank, EpicEncoder, get_task, list_checkpoints
from epic_rag.demonstrations import Demonstration, built_in_banks
from epic_rag.evaluation.datasets import normalize_text
from epic_rag.evaluation.embedding_store import EmbeddingStore, make_prompt
from epic_rag.evaluation.few_shot import load_few_shot_tasks
from epic_rag.evaluation.few_shot_collections import TaskVectors, families_of_tasks
from epic_rag.evaluation.report import markdown_table
from epic_rag.files import read_jsonl
from epic_rag.task_vector import apply_task_vector

SEED = 0
LARGEST = 500
COLLECTIONS = ("own", "pooled-with-queries")
SHORT = {"own": "own", "pooled-with-queries": "mixed"}
# Documentation under licences without copyleft: BSD, MIT, Apache-2.0, PSF, ISC, BSL, curl, Tcl, OpenSSL (Apache-2.0).
NAMES = """
    ant-doc barbican-doc cargo-doc cinder-doc clang-15-doc cmake-doc
    designate-doc glance-doc heat-doc ironic-doc keystone-doc krb5-doc
    libboost1.74-doc libcurl4-doc libssl-doc llvm-15-doc manila-doc neutron-doc
    nova-doc nsd octavia-doc openssh-client openssh-server podman
    python-aiohttp-doc python-attr-doc python-celery-doc python-dask-doc python-djangorestframework-doc python-flask-doc
    python-ipython-doc python-jinja2-doc python-notebook-doc python-pytest-doc python-requests-doc python-scipy-doc
    python-sklearn-doc python-sqlalchemy-doc python-sympy-doc python-tornado-doc python-xarray-doc python3.11-doc
    restic swift-doc tcl8.6-doc tk8.6-doc tomcat10-docs twisted-doc
    unbound varnish-doc
"""
PACKAGES = frozenset(NAMES.split())
# Words of papers from 2018 on, when the ACL Anthology is under CC BY 4.0.
RECENT = re.compile(r"\b(BERT|RoBERTa|GPT-?[234]|XLM-R|T5|large language models?|LLMs?|COVID-19)\b")
TESTED = re.compile(r"\b(git|apache|httpd|postgres(ql)?|psql)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """Pairs that a bank is drawn from.

    Args:
        files: Files of pairs; rows are taken from each in turn.
        origin: Origin and licence, for the bank's record.
        accept: Rows that may be taken.
        query: Rewrites a query.
        words: Fewest and most words of a passage; None for passages that are no prose.
    """

    files: tuple[str, ...]
    origin: str
    accept: Callable[[dict[str, str]], bool] = lambda row: True
    query: Callable[[str], str] = str.strip
    words: tuple[int, int] | None = (20, 160)


BY_HAND = {"claims": 14, "code": 14, "commands": 16, "docs": 16, "intent": 16, "papers": 14, "qa": 14, "sts": 14}
"""Demonstrations of each bank that are written by hand; they come first."""
SIZES: dict[str, int] = {}
"""Demonstrations of each bank, by measurement; those by hand where it is missing."""


def is_docs(row: dict[str, str]) -> bool:
    return row.get("source") in PACKAGES and not TESTED.search(row["query"] + " " + row["positive"])


SOURCES = {
    "docs": Source(
        ("docs_questions", "docs_sections"),
        "documentation packages of Debian 12 under BSD, MIT, Apache-2.0, PSF, BSL, curl and Tcl licences",
        is_docs,
    ),
    "qa": Source(("squad_sentence", "medquad"), "SQuAD 1.1 (CC BY-SA 4.0) and MedQuAD (CC BY 4.0)", words=(10, 160)),
    "code": Source(
        ("python_docstring_code",), "docstrings of 48 PyPI packages under BSD, MIT and Apache-2.0 licences", words=None
    ),
    "commands": Source(
        ("tldr_pages",),
        "tldr-pages, CC BY 4.0",
        query=lambda text: re.sub(r"\s*\([^()]*\)\s*$", "", text).strip(),
        words=None,
    ),
    "papers": Source(
        ("acl_title_abstract",),
        "ACL Anthology, papers from 2018 on, CC BY 4.0",
        lambda row: bool(RECENT.search(row["query"] + " " + row["positive"])),
        words=(60, 250),
    ),
    "sts": Source(("coco_captions_val2017",), "captions of MS COCO val2017, CC BY 4.0", words=(6, 30)),
    "intent": Source(("snips_same_intent",), "SNIPS, CC0", words=(4, 20)),
}
"""Sources of the built-in banks; a bank that is missing here is written by hand."""

TASKS = {
    "docs": ("manuals_git_apache#git", "manuals_git_apache#httpd"),
    "qa": ("TrecQA", "nq_open_gold"),
    "claims": ("climate_fever",),
    "code": (),
    "commands": ("nl2bash",),
    "papers": ("scitldr", "Cranfield"),
    "sts": (),
    "intent": ("Banking77", "CLINC150", "StackOverflowTitles_clustering"),
}
"""Sets of each bank's task that it was not made from, and that no checkpoint was trained on."""
FILES = ("nl2bash", "foldoc", "scitldr", "climate_fever")


def enlarged(name: str, data: Path, count: int) -> DemonstrationBank:
    """Return a built-in bank's demonstrations by hand, and drawn ones behind them up to `count`."""
    stored = DemonstrationBank.load(name)
    by_hand = stored.demonstrations[: BY_HAND[name]]
    drawn = draw(name, data, max(0, count - len(by_hand))) if name in SOURCES else []
    origin = "The first {} are written for this project, Apache-2.0; the others are from {}."
    return DemonstrationBank(
        [*by_hand, *drawn],
        task=name,
        origin=origin.format(len(by_hand), SOURCES[name].origin) if drawn else stored.origin,
        enabled=stored.enabled,
    )


def draw(name: str, data: Path, count: int = LARGEST) -> list[Demonstration]:
    """Draw demonstrations of a bank from its source: varied, clean, each query and passage once."""
    source = SOURCES[name]
    columns = []
    for file in source.files:
        rows = [row for _, row in read_jsonl(data / f"{file}.jsonl.gz") if source.accept(row)]
        random.Random(f"{SEED}-{name}-{file}").shuffle(rows)
        columns.append(rows)
    found: dict[str, Demonstration] = {}
    passages: set[str] = set()
    per_source: dict[str, int] = {}
    for row in (row for group in zip(*columns, strict=False) for row in group):
        if len(found) == count:
            break
        query, passage = source.query(row["query"]), row["positive"].strip()
        key, origin = normalize_text(query), row.get("source", row.get("group", ""))
        words = len(passage.split())
        too_long = len(passage) > 1200 if source.words is None else not source.words[0] <= words <= source.words[1]
        if too_long or "\n" in query or not 2 <= len(query.split()) <= 25 or not (query + passage).isascii():
            continue
        if key in found or normalize_text(passage) in passages or key in normalize_text(passage):
            continue
        # No manual, picture or intent may be most of a bank.
        if origin and per_source.get(origin, 0) >= max(2, count // (4 if name == "intent" else 25)):
            continue
        per_source[origin] = per_source.get(origin, 0) + 1
        passages.add(normalize_text(passage))
        found[key] = Demonstration(query, passage)
    return list(found.values())


def build(data: Path, names: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Write `bank.json` of the named banks."""
    for name in names:
        bank = enlarged(name, data, sizes.get(name, 0))
        bank.save(built_in_banks()[name])
        print(f"{name}: {len(bank)} demonstrations", file=sys.stderr)


def embed(names: Sequence[str]) -> None:
    """Compute the vectors of banks for every shipped checkpoint."""
    encoders = [EpicEncoder.from_pretrained(info.name, device="cpu") for info in list_checkpoints()]
    for name in names:
        bank = DemonstrationBank.load(name)
        bank.embed(*encoders)
        bank.save(built_in_banks()[name], precision="float16")
        print(f"{name}: embedded", file=sys.stderr)


def evaluate(arguments: argparse.Namespace) -> str:
    """Return the table of gains: bank, number of demonstrations, set, collection, ranking."""
    encoder = EpicEncoder.from_pretrained(arguments.model, device="cpu", dtype="auto")
    precision = str(encoder.dtype).removeprefix("torch.")
    store = EmbeddingStore(encoder, folder=arguments.cache_dir, precision=precision)
    named = [*FILES, *(name for names in TASKS.values() for name in names if name not in FILES)]
    named = [name for name in named if not arguments.sets or name in arguments.sets]
    tasks = load_few_shot_tasks(
        [arguments.data / f"{name}.jsonl.gz" for name in named if name in FILES],
        arguments.eval,
        [name for name in named if name not in FILES],
        queries=200,
        documents=2000,
        sizes=(1500,),
        instruction="default",
        default_instruction=encoder.default_instruction,
    )
    vectors = {task.name: TaskVectors(store, task) for task in tasks}
    banks = {name: candidates(name, arguments) for name in arguments.only}
    found: dict[tuple[str, int, str], dict[tuple[str, str], dict[str, np.ndarray]]] = {}
    families_of = families_of_tasks(list(vectors.values()), COLLECTIONS)
    for known, families in zip(vectors.values(), families_of, strict=True):
        name = known.split.name
        for bank_name, sized in banks.items():
            if name not in {each.replace("#", "-") for each in TASKS[bank_name]}:
                continue
            queries = store.queries(known.split.queries, make_prompt(get_task(bank_name).instruction))
            zero = scores(families, queries)
            for bank in sized:
                pairs = pairs_of(store, bank)
                for strategy in arguments.strategies:
                    if strategy == "reader":
                        moved = encoder.reader.prepare(pairs).apply(queries)
                    else:
                        moved = apply_task_vector(queries, [pairs] * len(queries))
                    place = found.setdefault((bank_name, len(bank), strategy), {})
                    for key, values in scores(families, moved).items():
                        place.setdefault(key, {})[name] = 100 * (values - zero[key])
        print(f"{name}: scored", file=sys.stderr)
    columns = [(collection, ranking) for collection in COLLECTIONS for ranking in ("dense", "hybrid")]
    rows = [
        [bank, str(size), strategy, str(len(next(iter(place.values())))), *(cell(place[key]) for key in columns)]
        for (bank, size, strategy), place in sorted(
            found.items(), key=lambda item: (item[0][0], item[0][2], item[0][1])
        )
    ]
    header = ["bank", "demonstrations", "strategy", "sets", *(f"{SHORT[name]}, {kind}" for name, kind in columns)]
    return markdown_table(header, rows, text_columns=3)


def cell(gains: Mapping[str, np.ndarray]) -> str:
    """Return the mean gain over sets ± its standard error, and the sets whose own gain is two of its errors or more."""
    means = {name: float(values.mean()) for name, values in gains.items()}
    errors = {name: float(values.std(ddof=1)) / len(values) ** 0.5 for name, values in gains.items()}
    error = sum(each**2 for each in errors.values()) ** 0.5 / len(errors)
    sure = [name for name in means if abs(means[name]) >= 2 * errors[name] > 0]
    notes = [f"{name} {means[name]:+.2f}" for name in sorted(sure, key=means.__getitem__)]
    text = f"{np.mean(list(means.values())):+.2f} ± {error:.2f}"
    return f"{text} ({', '.join(notes)})" if notes and len(means) > 1 else text


def candidates(name: str, arguments: argparse.Namespace) -> list[DemonstrationBank]:
    """Return the stored bank, and banks of other sizes."""
    found = {len(bank): bank for bank in (DemonstrationBank.load(name),)}
    for size in arguments.sizes:
        bank = enlarged(name, arguments.data, size)
        found.setdefault(len(bank), bank)
    return [found[size] for size in sorted(found)]


def pairs_of(store: EmbeddingStore, bank: DemonstrationBank) -> np.ndarray:
    """Return (k, 3, dim) vectors of a bank, from the cache."""
    prompt = make_prompt(bank.instruction)
    queries = store.queries([item.query for item in bank.demonstrations], prompt)
    texts = [item.passage for item in bank.demonstrations]
    if bank.symmetric:
        return np.stack([queries, store.queries(texts, prompt), queries], axis=1)
    as_documents = store.documents([item.query for item in bank.demonstrations])
    return np.stack([queries, store.documents(texts), as_documents], axis=1)


def scores(families, vectors) -> dict[tuple[str, str], np.ndarray]:
    """Return nDCG@10 of each query by collection and ranking."""
    return {
        (collection, kind): values
        for family in families
        for collection, found in family.ndcg(vectors @ family.documents.documents.T)
        for kind, values in found.items()
    }


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="benchmarks/built_in_banks.py", description=(__doc__ or "").partition("\n")[0]
    )
    options.add_argument("command", choices=("build", "embed", "evaluate"))
    options.add_argument("--data", type=Path, metavar="DIR", help="files of training pairs")
    options.add_argument("--eval", type=Path, metavar="DIR", help="evaluation sets")
    options.add_argument("--only", metavar="NAME,...", help="banks")
    options.add_argument("--sets", default="", metavar="NAME,...", help="sets that are searched, instead of all")
    options.add_argument("--sizes", default="", metavar="N,...", help="further numbers of demonstrations")
    options.add_argument("--strategies", default="reader,task-vector", metavar="NAME,...")
    options.add_argument("--model", default=None, metavar="MODEL")
    options.add_argument("--cache-dir", type=Path, default=None, metavar="DIR")
    return options


def run(given: argparse.Namespace) -> int:
    given.only = given.only.split(",") if given.only else list(built_in_banks())
    given.strategies = given.strategies.split(",")
    given.sets = [name for name in given.sets.split(",") if name]
    sizes = [part for part in given.sizes.split(",") if part]
    if given.command == "build":
        chosen = dict(part.split("=") for part in sizes)
        build(given.data, given.only, {**SIZES, **{name: int(size) for name, size in chosen.items()}})
    elif given.command == "embed":
        embed(given.only)
    else:
        given.sizes = [int(size) for size in sizes]
        print(evaluate(given))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
