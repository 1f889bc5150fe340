"""`epic-rag bank`: list, show and build banks of demonstrations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epic_rag.errors import BankError
from epic_rag_cli.options import Command, Json, Quiet, Verbose, new_group, require_command
from epic_rag_cli.terminal import columns, emit, emit_json, message, plural, printable, terminal_width

if TYPE_CHECKING:
    from rich.text import Text

    from epic_rag import DemonstrationBank, EpicEncoder

__all__ = ["app"]

_BANK_FILE = "bank.json"

app = new_group("bank")


@app.callback()
def bank(context: typer.Context, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List, show and build banks of demonstrations.

    A demonstration is a query with a passage that answers it. A few of them adapt the encoder to a task.

    Examples:
        epic-rag bank list
        epic-rag bank show docs
    """
    require_command(context)


@app.command("list", cls=Command)
def list_banks(as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the built-in banks.

    Each line has the name, the number of demonstrations and the instruction.

    Examples:
        epic-rag bank list
        epic-rag bank list --json
    """
    from epic_rag.demonstrations import DemonstrationBank, built_in_banks

    banks = {name: DemonstrationBank.load(name) for name in built_in_banks()}
    if as_json:
        emit_json([{"name": name, **_summary(bank)} for name, bank in banks.items()])
    elif banks:
        rows = [(name, f"{len(bank):>2}", bank.instruction or "") for name, bank in banks.items()]
        emit(columns(rows, styles=("bold",)))
    else:
        message("note", "No bank ships with this installation. Run `epic-rag bank build` to make one.")


@app.command("show", cls=Command)
def show(
    name: Annotated[str, typer.Argument(metavar="BANK", help="A name from `epic-rag bank list`, or a bank folder.")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print a bank: its instruction and its demonstrations.

    Examples:
        epic-rag bank show docs
        epic-rag bank show docs --json
    """
    from epic_rag import DemonstrationBank

    loaded = DemonstrationBank.load(name)
    if as_json:
        pairs = [{"query": pair.query, "passage": pair.passage} for pair in loaded.demonstrations]
        emit_json({"name": name, **_summary(loaded), "demonstrations": pairs})
    else:
        emit(_lines(name, loaded))


@app.command("build", cls=Command)
def build(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE",
            help='A file of lines {"query": "...", "passage": "..."} (.jsonl or .jsonl.gz), or bank folders.',
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="The bank folder to write; required for a file of pairs."),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            "--instruction", metavar="TEXT", help="The instruction: what to retrieve for a query, in one sentence."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="TASK", help="Use the instruction of a known task, for example docs."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A name from `epic-rag models`, a checkpoint folder or a Hugging Face name; repeat it for several. "
            "Without it: the model of EPIC_RAG_MODEL, or the default model.",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a bank from pairs of your own, or embed banks with another model.

    A file of pairs becomes the bank folder --out; a bank folder is embedded with the given model, in place or into
    --out. Pass the folder to `epic-rag query --bank`. With several models, the bank stores embeddings of each of
    them; embeddings of other models are deleted. With ten pairs or more, the expected gain is printed: each pair is
    ranked with the help of the others. Pairs that do not fit are listed.

    Examples:
        epic-rag bank build pairs.jsonl --out mybank --instruction 'Given a question, retrieve the answer'
        epic-rag bank build mybank
    """
    if out is not None and len(sources) > 1:
        raise typer.BadParameter(f"one SOURCE is allowed, not {len(sources)}", param_hint="'--out'")
    if instruction is not None and not instruction.strip():
        raise typer.BadParameter("it is empty", param_hint="'--instruction'")
    if task is not None:
        from epic_rag import get_task

        get_task(task)
    # Check all input before a model is loaded and the first folder written.
    planned = [(_read(source, instruction, task), _target(source, out)) for source in sources]

    from epic_rag import EpicEncoder

    # Typer would split the variable of a list option at spaces, which a folder's name may have.
    names: list[str | None] = [*model] if model else [os.environ.get("EPIC_RAG_MODEL") or None]
    encoders = [EpicEncoder.from_pretrained(name) for name in names]
    used = " and ".join(f"{encoder.name} ({encoder.fingerprint})" for encoder in encoders)
    for built, target in planned:
        built.embed(*encoders)
        built.save(target)
        message("note", f"{plural(len(built), 'demonstration')} embedded with {used}.")
        _note_expected_gain(built, encoders[0])
        emit([printable(str(target))])


def _note_expected_gain(bank: DemonstrationBank, encoder: EpicEncoder) -> None:
    """Print what a bank can be expected to bring, and the pairs that do not fit."""
    from epic_rag.bank_report import LEAST_PAIRS

    if len(bank) < LEAST_PAIRS or encoder.strategy not in ("reader", "task-vector"):
        return
    report = bank.evaluate(encoder)
    message(
        "warning" if report.high < 0 else "note",
        f"Expected gain in nDCG@10 among the bank's passages: {report.gain:+.2f} (95% interval {report.low:+.2f} to "
        f"{report.high:+.2f}; {report.base:.2f} without demonstrations). {report.verdict}",
    )
    if report.misfits:
        shown = ", ".join(str(row + 1) for row in sorted(report.misfits[:10]))
        more = f" and {len(report.misfits) - 10} more" if len(report.misfits) > 10 else ""
        message("note", f"Passages that fit other queries better: demonstrations {shown}{more}. Check these pairs.")


def _read(source: Path, instruction: str | None, task: str | None) -> DemonstrationBank:
    from epic_rag import DemonstrationBank

    if source.is_dir():
        # The absolute path cannot be the name of a built-in bank.
        stored = DemonstrationBank.load(source.absolute())
        if instruction is None and task is None:
            return stored
        return DemonstrationBank(
            stored.demonstrations,
            instruction=instruction,
            task=task or stored.task,
            symmetric=stored.symmetric if task is None else None,
            origin=stored.origin,
        )
    if not source.exists():
        raise BankError(
            f"No such file or bank folder: {source}. Run `epic-rag bank build PAIRS.jsonl --out FOLDER` with a file "
            'of lines {"query": "...", "passage": "..."}.'
        )
    if instruction is None and task is None:
        raise BankError(
            f"The pairs of {source} need an instruction. Run `epic-rag bank build {source} --out FOLDER --instruction "
            "'Given a ..., retrieve ...'`, or pass --task."
        )
    return DemonstrationBank.from_jsonl(source, instruction=instruction, task=task)


def _target(source: Path, out: Path | None) -> Path:
    target = out
    if target is None:
        if not source.is_dir():
            raise BankError(f"The bank of {source} needs a folder. Run `epic-rag bank build {source} --out FOLDER`.")
        target = source
    if target.exists() and not target.is_dir():
        raise BankError(f"{target} is a file, a bank is a folder. Pass another --out.")
    if target.is_dir() and not (target / _BANK_FILE).is_file() and any(target.iterdir()):
        raise BankError(f"{target} holds other files and no {_BANK_FILE}. Pass a new folder or a bank to --out.")
    return target


def _summary(bank: DemonstrationBank) -> dict[str, Any]:
    return {
        "task": bank.task,
        "instruction": bank.instruction,
        "symmetric": bank.symmetric,
        "num_demonstrations": len(bank),
        "fingerprint": bank.fingerprint,
        "encoder_fingerprint": bank.encoder_fingerprint,
        "encoder_fingerprints": list(bank.encoder_fingerprints),
        "origin": bank.origin,
    }


def _lines(name: str, bank: DemonstrationBank) -> list[Text]:
    import textwrap

    from rich.text import Text

    width = terminal_width() - 4
    fingerprints = bank.encoder_fingerprints
    embedded = f"embedded with {', '.join(fingerprints)}" if fingerprints else "not embedded"
    head = Text()
    head.append(printable(name), style="bold")
    head.append(f"  {plural(len(bank), 'demonstration')}, {embedded}")
    lines = [head]
    for label, value in (("instruction", bank.instruction), ("origin", bank.origin)):
        if value:
            lines.append(Text(f"{label}: {printable(value)}", style="dim" if label == "origin" else ""))
    for number, pair in enumerate(bank.demonstrations, start=1):
        lines.append(Text())
        line = Text()
        line.append(f"{number:>2}  ", style="dim")
        lines.append(line.append(printable(pair.query), style="bold cyan"))
        lines.extend(
            Text("    " + part) for part in textwrap.wrap(printable(pair.passage), width, break_on_hyphens=False)
        )
    return lines
