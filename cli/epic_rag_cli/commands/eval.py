"""`epic-rag eval` and `epic-rag ablate`: score models, and train and score the arms of a grid."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from epic_rag_cli.options import Json, Quiet, Strategy, Verbose
from epic_rag_cli.terminal import Interrupted, Verbosity, emit, emit_json, message, verbosity

__all__ = ["ablate", "eval_command"]


def eval_command(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="[LABEL=]MODEL[:plain|:prompted]",
            help="A model, as for `epic-rag index`, or bm25; repeat it to compare several. A model with :plain, and "
            "every model that was not trained with instructions and has no :prompted, gets bare queries.",
            show_default="the default model",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="A folder with one folder for each evaluation set.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="Sets in --data, or MTEB tasks, which are downloaded.",
            show_default="every set in --data",
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kinds",
            metavar="KIND,...",
            help="Only sets of these kinds: retrieval, reranking, sts, classification, clustering.",
            show_default="all",
        ),
    ] = None,
    num_demonstrations: Annotated[
        str | None,
        typer.Option(
            "--num-demonstrations",
            "-n",
            metavar="K,...",
            help="Numbers of demonstrations.",
            show_default="0,8; 1,2,4,8,16,32,64,128,512,1500 with --few-shot",
        ),
    ] = None,
    strategy: Strategy = None,
    bank: Annotated[
        list[str] | None,
        typer.Option(
            "--bank",
            metavar="SET=SOURCE",
            help="Source of a set's demonstrations: a bank, a file of pairs, `train` or `train-labels`.",
            show_default="a built-in bank that fits",
        ),
    ] = None,
    instructions: Annotated[
        Path | None,
        typer.Option("--instructions", metavar="FILE", help="JSON object from names of sets to instructions."),
    ] = None,
    heldout: Annotated[
        list[Path] | None,
        typer.Option(
            "--heldout",
            metavar="FILE",
            help="A file of training pairs (JSON lines) that the models have not seen; repeat it for several.",
        ),
    ] = None,
    few_shot: Annotated[
        bool,
        typer.Option(
            "--few-shot",
            help="Score the gain by 1 to 1,500 demonstrations against baselines, on files (FILE, or FILE#SOURCE for "
            "the rows of one source) and sets (NAME, or NAME#PREFIX for documents with such ids).",
        ),
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="NAME,...", help="Methods of --few-shot.", show_default="all"),
    ] = None,
    wordings: Annotated[
        bool,
        typer.Option("--wordings", help="With --few-shot, also score other wordings of the instruction, and none."),
    ] = False,
    heldout_queries: Annotated[
        int | None,
        typer.Option(
            "--heldout-queries",
            metavar="N",
            min=1,
            help="Test queries from each.",
            show_default="1000; 200 with --few-shot",
        ),
    ] = None,
    heldout_documents: Annotated[
        int | None,
        typer.Option(
            "--heldout-documents",
            metavar="N",
            min=1,
            help="Documents from each.",
            show_default="5000; 2000 with --few-shot",
        ),
    ] = None,
    heldout_collection: Annotated[
        list[str] | None,
        typer.Option(
            "--heldout-collection",
            metavar="NAME,...",
            help="Collection to search: own (the file's documents), pooled (those of all files) or "
            "pooled-with-queries (also other rows' queries).",
            show_default="`own`",
        ),
    ] = None,
    heldout_instruction: Annotated[
        list[str] | None,
        typer.Option(
            "--heldout-instruction",
            metavar="NAME,...",
            help="Instruction of the queries: own (the file's), default (the checkpoint's) or none.",
            show_default="`own`",
        ),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            "--draws",
            metavar="N",
            min=1,
            help="Random draws of demonstrations for each number.",
            show_default="3; 5 with --few-shot",
        ),
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also score shuffled demonstrations and another file's.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of all splits and draws.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write all results as JSON, updated after each score."),
    ] = None,
    mteb_output: Annotated[
        Path | None,
        typer.Option("--mteb-output", metavar="DIR", help="Store and reuse MTEB's result files here."),
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", metavar="DIR", help="Store and reuse embeddings here.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help="cpu, cuda, ..., several with commas.",
            show_default="a GPU if there is one",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.", show_default="the device's"
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", min=1, help="Maximum texts in a batch.", show_default="by tokens"),
    ] = None,
    max_document_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-document-tokens",
            metavar="N",
            min=1,
            help="Maximum tokens of a document.",
            show_default="the model's",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print the scores of one or more models as a Markdown table.

    --data takes sets for retrieval (BEIR's layout), reranking, STS, classification and clustering, which MTEB
    scores. --heldout takes files of pairs: some rows become test queries, scored by nDCG@10, others
    demonstrations. A demonstration is never a test query. Every combination of the values of --heldout-collection
    and --heldout-instruction is scored. --few-shot compares ways of using demonstrations, by their number.
    docs/evaluation.md explains each number.

    Examples:
        epic-rag eval --heldout pairs.jsonl --num-demonstrations 0,1
        epic-rag eval --heldout pairs.jsonl -n 0,1 --controls --output scores.json
        epic-rag eval --heldout pairs.jsonl -n 0,1 --heldout-collection own,pooled-with-queries --model bm25
        epic-rag eval --few-shot --heldout pairs.jsonl -n 1,2 --draws 2 --output gains.json
    """
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
        run_few_shot,
        split_names,
    )

    request = EvaluationRequest(
        # Typer would split the variable of a list option at spaces, which a folder's name may have.
        models=parse_models(model or [name for name in [os.environ.get("EPIC_RAG_MODEL")] if name]),
        data=data,
        tasks=None if tasks is None else split_names(tasks),
        kinds=None if kinds is None else parse_choices(kinds, KINDS, "--kinds"),
        num_demonstrations=parse_ks(num_demonstrations or ("1,2,4,8,16,32,64,128,512,1500" if few_shot else "0,8")),
        strategy=strategy,
        instructions={} if instructions is None else read_mapping(instructions),
        banks=parse_banks(bank or []),
        heldout=tuple(heldout or ()),
        heldout_queries=heldout_queries or (200 if few_shot else 1000),
        heldout_documents=heldout_documents or (2000 if few_shot else 5000),
        heldout_collections=parse_choices(heldout_collection or ["own"], COLLECTIONS, "--heldout-collection"),
        heldout_instructions=parse_choices(
            heldout_instruction or ["own"], INSTRUCTION_SOURCES, "--heldout-instruction"
        ),
        draws=draws or (5 if few_shot else 3),
        controls=controls,
        seed=seed,
        mteb_output=mteb_output,
        cache_dir=cache_dir,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        max_document_tokens=max_document_tokens,
        command=tuple(sys.argv),
    )
    if few_shot:
        gains = run_few_shot(
            request,
            methods=None if methods is None else split_names(methods),
            wordings=wordings,
            progress=lambda line: message("note", line),
        )
        if output is not None:
            gains.write(output)
        if as_json:
            emit_json(gains.to_json())
        else:
            emit([gains.to_markdown()])
        return
    report = run_evaluation(
        request,
        progress=lambda line: message("note", line),
        on_update=None if output is None else lambda report: write_json(report, output),
    )
    if as_json:
        emit_json(report.to_json())
    else:
        emit([report.to_markdown()])


def ablate(
    grid: Annotated[
        str, typer.Argument(metavar="GRID", help="A YAML or JSON file, or the name of a shipped grid: ablation.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of runs and results.", show_default="runs/GRID"),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="NAME,...", help="Train and score only these arms.", show_default="all arms"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Override a setting of all arms, for instance data=pairs, steps=50 or evaluation.queries=100; "
            "can be repeated. It takes precedence over an arm's.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the arms of a grid and print their scores as a table.

    Every arm is scored on files that no arm trains on, and on rows that training leaves out. Arms whose results are
    in the folder are skipped. docs/evaluation.md explains the grid and the table; the examples use a grid.yaml in the
    working directory.

    Examples:
        epic-rag ablate grid.yaml --quiet
        epic-rag ablate grid.yaml --only epic --set steps=3 -o runs/quick --json
    """
    from epic_rag.checkpoints import DEFAULT_CHECKPOINT
    from epic_rag.evaluation.ablation import load_grid, run_ablation
    from epic_rag.evaluation.runner import split_names

    read = load_grid(
        grid,
        settings or (),
        output=output,
        default_model=os.environ.get("EPIC_RAG_MODEL") or DEFAULT_CHECKPOINT,
    )
    try:
        report = run_ablation(
            read,
            only=split_names(only or ""),
            progress=lambda line: message("note", line),
            show_progress=sys.stderr.isatty() and verbosity() is not Verbosity.QUIET,
            command=tuple(sys.argv),
        )
    except KeyboardInterrupt:
        raise Interrupted(
            f"Interrupted. Finished arms are in {read.folder}. Run the same command again to continue."
        ) from None
    if as_json:
        emit_json(report.to_json())
    else:
        emit([report.to_markdown()])
    report.check()
