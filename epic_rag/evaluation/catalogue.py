"""What is known of data sets by name: their queries' instruction, and where demonstrations come from.

Evaluation sets bring test queries and nothing else, and a demonstration may never be a test query. So each
set names one of the built-in banks (made of other data), or, where it has a training split, that split.
Everything here can be overridden on the command line (`--instructions FILE.json`, `--bank SET=SOURCE`).
"""

from __future__ import annotations

from dataclasses import dataclass

from epic_rag.evaluation.local_sets import Kind
from epic_rag.tasks import get_task

__all__ = ["CATALOGUE", "SYMMETRIC_PAIRS", "TRAIN_LABELS", "TRAIN_PAIRS", "SetEntry", "entry_for"]

TRAIN_PAIRS = "train"
"""Demonstrations from a classification set's training split: two texts with the same label."""
TRAIN_LABELS = "train-labels"
"""Demonstrations from a classification set's training split: a text and the name of its label."""

SYMMETRIC_PAIRS = frozenset({"coco_captions_val2017", "newsgroup_same_topic", "snips_same_intent"})
"""Files of training pairs whose two sides are of one kind, both encoded as queries."""


@dataclass(frozen=True)
class SetEntry:
    """How one evaluation set is asked.

    Args:
        instruction: The task in words.
        demonstrations: A built-in bank's name, the path of a bank folder or of a JSONL file, `TRAIN_PAIRS`,
            `TRAIN_LABELS`, or None when there are none to be had.
    """

    instruction: str
    demonstrations: str | None


def _of_task(name: str) -> SetEntry:
    """A known task's own instruction and bank."""
    task = get_task(name)
    return SetEntry(task.instruction, task.bank)


CATALOGUE: dict[str, SetEntry] = {
    # retrieval
    "manuals_git_apache": _of_task("docs"),
    "Cranfield": _of_task("papers"),
    "acl_title_abstract": SetEntry("Given the title of a paper, retrieve its abstract", "papers"),
    "nq_open_gold": _of_task("qa"),
    "wikitablequestions": SetEntry("Given a question, retrieve the table that answers it", "qa"),
    "LIMITSmall": _of_task("qa"),
    # reranking
    "TrecQA": SetEntry("Given a question, retrieve the sentence that answers it", "qa"),
    # semantic similarity
    "STSBenchmark": _of_task("sts"),
    "STS12": _of_task("sts"),
    "STS13": _of_task("sts"),
    "STS15": _of_task("sts"),
    "SICK-R": _of_task("sts"),
    # classification
    "Banking77": _of_task("intent"),
    "CLINC150": _of_task("intent"),
    "AmazonCounterfactual": SetEntry(
        "Given a sentence of a product review, identify whether it says what would have been but was not",
        TRAIN_PAIRS,
    ),
    # clustering
    "StackOverflowTitles_clustering": SetEntry("Given a message, retrieve a message on the same topic", "intent"),
}

_BY_KIND: dict[Kind, SetEntry] = {
    "retrieval": SetEntry(get_task("qa").instruction, None),
    "reranking": SetEntry(get_task("qa").instruction, None),
    "sts": _of_task("sts"),
    "classification": SetEntry("Given a text, identify its category", TRAIN_PAIRS),
    "clustering": SetEntry("Given a message, retrieve a message on the same topic", None),
}


def entry_for(name: str, kind: Kind) -> SetEntry:
    """Return a set's entry, or what its kind gets when its name is not known."""
    return CATALOGUE.get(name, _BY_KIND[kind])
