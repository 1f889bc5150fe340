"""`python -m epic_rag.evaluation`: the same as `epic-rag eval`, without the command line package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from epic_rag.errors import EpicError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m epic_rag.evaluation",
        description="Evaluate encoders on local sets, on mteb's tasks and on held-out pairs.",
        epilog="See docs/evaluation.md for what each option means.",
    )
    parser.add_argument("--model", action="append", default=[], metavar="[LABEL=]MODEL[:plain|:prompted]")
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--tasks", metavar="NAME,...")
    parser.add_argument("--kinds", action="append", metavar="KIND,...")
    parser.add_argument("--num-demonstrations", default="0,8", metavar="K,...")
    parser.add_argument("--strategy", choices=("epic", "text", "none", "task-vector"))
    parser.add_argument("--instructions", type=Path, metavar="FILE.json")
    parser.add_argument("--bank", action="append", default=[], metavar="SET=SOURCE")
    parser.add_argument("--heldout", action="append", default=[], type=Path, metavar="FILE.jsonl.gz")
    parser.add_argument("--heldout-queries", type=int, default=1000, metavar="N")
    parser.add_argument("--heldout-documents", type=int, default=5000, metavar="N")
    parser.add_argument("--heldout-collection", action="append", metavar="NAME,...")
    parser.add_argument("--heldout-instruction", action="append", metavar="NAME,...")
    parser.add_argument("--draws", type=int, default=3, metavar="N")
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--mteb-output", type=Path, metavar="DIR")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.add_argument("--max-document-tokens", type=int, metavar="N")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Without the program's name; None takes the process's own.

    Returns:
        The exit status: 0, or 1 for an error, which is one line on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        table = _evaluate(options, tuple(sys.argv if arguments is None else arguments))
    except EpicError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(table + "\n")
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _evaluate(options: argparse.Namespace, command: tuple[str, ...]) -> str:
    from epic_rag.evaluation.datasets import KINDS, read_mapping
    from epic_rag.evaluation.report import write_json
    from epic_rag.evaluation.runner import (
        COLLECTIONS,
        INSTRUCTION_SOURCES,
        EvaluationRequest,
        parse_banks,
        parse_choices,
        parse_ks,
        parse_models,
        run_evaluation,
        split_names,
    )

    request = EvaluationRequest(
        models=parse_models(options.model),
        data=options.data,
        tasks=None if options.tasks is None else split_names(options.tasks),
        kinds=None if options.kinds is None else parse_choices(options.kinds, KINDS, "--kinds"),
        num_demonstrations=parse_ks(options.num_demonstrations),
        strategy=options.strategy,
        instructions=read_mapping(options.instructions) if options.instructions else {},
        banks=parse_banks(options.bank),
        heldout=tuple(options.heldout),
        heldout_queries=options.heldout_queries,
        heldout_documents=options.heldout_documents,
        heldout_collections=parse_choices(options.heldout_collection or ["own"], COLLECTIONS, "--heldout-collection"),
        heldout_instructions=parse_choices(
            options.heldout_instruction or ["own"], INSTRUCTION_SOURCES, "--heldout-instruction"
        ),
        draws=options.draws,
        controls=options.controls,
        seed=options.seed,
        mteb_output=options.mteb_output,
        cache_dir=options.cache_dir,
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        max_document_tokens=options.max_document_tokens,
        command=command,
    )
    report = run_evaluation(
        request,
        progress=_say,
        on_update=(lambda report: write_json(report, options.output)) if options.output else None,
    )
    return report.to_markdown()


if __name__ == "__main__":
    sys.exit(main())
