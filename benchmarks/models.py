"""Compare `EpicEncoder` with sentence-transformers on replicas of published models.

    python benchmarks/models.py [--output FOLDER]

For each replica (see `replicas.py`): the largest difference in a number of a query's and a document's vector, in a
batch and one by one; and what `epic-rag models show` prints of it. Vectors of models without a normalising module are
normalised before they are compared, because an encoder returns unit vectors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import Bar, bars_table, run_main, write
from replicas import REPLICAS, TEXTS, Replica

from epic_rag import EpicEncoder
from epic_rag.backbone import quiet
from epic_rag.evaluation.report import markdown_table
from epic_rag.metrics import unit_rows

__all__ = ["Comparison", "compare", "measure", "parser", "reference"]

LIMIT = 1e-5
SHOWN = ("pooling", "query prompt", "document prompt", "longest text", "dimensions", "similarity")


@dataclass(frozen=True)
class Comparison:
    """Differences between an encoder and sentence-transformers.

    Attributes:
        name: The replica.
        run_by: "epic-rag" or "sentence-transformers".
        modules: Its modules.
        query: Largest difference in a number of a query's vector.
        document: Largest difference in a number of a document's vector.
        shown: Value of each fact of SHOWN that `epic-rag models show` prints, with * if it is guessed.
    """

    name: str
    run_by: str
    modules: str
    query: float
    document: float
    shown: dict[str, str]


def reference(replica: Replica, folder: Path) -> Any:
    """Return the model as sentence-transformers loads it, with the prompts of its model card."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    if not (folder / "modules.json").is_file():
        static = StaticEmbedding.load(str(folder))
        static.embedding.float()
        return SentenceTransformer(modules=[static], device="cpu")
    prompts = {role: text for role, text in (("query", replica.query), ("document", replica.document)) if text}
    with quiet():
        return SentenceTransformer(str(folder), device="cpu", prompts=prompts or None)


def compare(replica: Replica, folder: Path) -> Comparison:
    """Build a replica and compare its vectors."""
    place = folder / replica.name.rsplit("/", 1)[-1]
    with quiet():
        replica.build(place)
        encoder = EpicEncoder.from_pretrained(place, device="cpu", dtype="float32")
    model = reference(replica, place)
    differences = []
    for ours, theirs in ((encoder.encode_query, model.encode_query), (encoder.encode_document, model.encode_document)):
        expected = unit_rows(np.stack([theirs(text, show_progress_bar=False) for text in TEXTS]))
        batch, single = ours(TEXTS), np.stack([ours(text) for text in TEXTS])
        differences.append(float(max(np.abs(batch - expected).max(), np.abs(single - expected).max())))
    return Comparison(
        replica.name,
        "epic-rag" if encoder.external is None else "sentence-transformers",
        ", ".join(type(module).__name__ for module in model),
        *differences,
        {
            fact.name: value + ("*" if "guessed" in fact.source else "")
            for fact in encoder.describe()
            if fact.name in SHOWN and (value := fact.value.removeprefix("'").removesuffix("'"))
        },
    )


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(description="Compare EpicEncoder with sentence-transformers.")
    options.add_argument("--only", metavar="TEXT", default="", help="replicas whose name holds this")
    options.add_argument("--output", type=Path, default=Path("runs/bench"), metavar="DIR")
    return options


def measure(options: argparse.Namespace) -> int:
    """Print the table, and write it."""
    with tempfile.TemporaryDirectory() as folder:
        found = [compare(replica, Path(folder)) for replica in REPLICAS if options.only in replica.name]
    markdown = markdown_table(
        ["model", "run by", "modules", "query", "document"],
        [[item.name, item.run_by, item.modules, f"{item.query:.1e}", f"{item.document:.1e}"] for item in found],
        text_columns=3,
    )
    shown = markdown_table(
        ["model", *SHOWN],
        [
            [item.name.rsplit("/", 1)[-1], *(f"`{text}`" if (text := item.shown.get(name)) else "" for name in SHOWN)]
            for item in found
        ],
        text_columns=1 + len(SHOWN),
    )
    largest = max(max(item.query, item.document) for item in found)
    bars = [Bar("largest difference", largest, LIMIT, True)]
    rows = [asdict(item) for item in found]
    write(
        options.output, "models", f"{markdown}\n\n{bars_table(bars)}\n\n{shown}", bars, torch.device("cpu"), rows=rows
    )
    return 0 if bars[0].met else 1


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
