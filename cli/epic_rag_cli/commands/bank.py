"""`epic-rag bank`: list, show, build, change and suggest banks of demonstrations."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epic_rag.errors import BankError
from epic_rag.files import read_jsonl
from epic_rag_cli.options import (
    DEFAULT_TASK,
    Command,
    IndexDir,
    Json,
    Model,
    Quiet,
    Verbose,
    new_group,
    require_command,
)
from epic_rag_cli.results import find_index
from epic_rag_cli.terminal import columns, emit, emit_json, message, plural, printable, terminal_width, usage_error

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.text import Text

    from epic_rag import DemonstrationBank, EpicEncoder
    from epic_rag.bank_report import BankReport

    Vectors = npt.NDArray[np.float32]

__all__ = ["app"]

_BANK_FILE = "bank.json"
_SHOWN = 10
_LEAST_PREPARED = 100

app = new_group("bank")


@app.callback()
def bank(context: typer.Context, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List, show, build and change banks of demonstrations.

    A demonstration is a query with a passage that answers it. A few of them adapt the encoder to a task.

    Examples:
        epic-rag bank list
        epic-rag bank show docs
    """
    require_command(context)


@app.command("list", cls=Command)
def list_banks(as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the built-in banks.

    Each line has the name, the number of demonstrations and the instruction. Of a bank that is "off", queries use the
    instruction alone, unless -n names a number: its demonstrations did not help where they were measured.

    Examples:
        epic-rag bank list
        epic-rag bank list --json
    """
    from epic_rag.demonstrations import DemonstrationBank, built_in_banks

    banks = {name: DemonstrationBank.load(name) for name in built_in_banks()}
    if as_json:
        emit_json([{"name": name, **_summary(bank)} for name, bank in banks.items()])
    elif banks:
        rows = [
            (name, f"{len(bank):>2}", "" if bank.enabled else "off", bank.instruction or "")
            for name, bank in banks.items()
        ]
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
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="INDEX",
            help="Fit the bank to the passages of this index, and measure the expected gain among them; without "
            "--model, with its model.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Leave the demonstrations on, even if they make results worse.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a bank from pairs of your own, or embed banks with another model.

    A file of pairs becomes the bank folder --out; a bank folder is embedded with the given model, in place or into
    --out. Pass the folder to `epic-rag query --bank`. With several models, the bank stores embeddings of each of
    them; embeddings of other models are deleted. With ten pairs or more, the expected gain is printed: each pair is
    ranked with the help of the others. With --against, queries move as far as helps among the passages of an index;
    build the bank again after it has changed. Pairs that do not fit, or occur twice, are listed by line.
    Demonstrations that make results worse are off: queries use the instruction alone, unless -n names their number.

    Examples:
        epic-rag bank build pairs.jsonl --out mybank --instruction 'Given a question, retrieve the answer'
        epic-rag bank build mybank
        epic-rag bank build mybank --against docs
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
    corpus = None
    if against is not None:
        passages, own = _passages(against, model[0] if model else None)
        corpus = (passages, own.fingerprint)
        encoders = [own, *(EpicEncoder.from_pretrained(name) for name in (model or [])[1:])]
    else:
        encoders = [EpicEncoder.from_pretrained(name) for name in names]
    used = " and ".join(f"{encoder.name} ({encoder.fingerprint})" for encoder in encoders)
    for source, (built, target) in zip(sources, planned, strict=True):
        built.embed(*encoders)
        message("note", f"{plural(len(built), 'demonstration')} embedded with {used}.")
        harms = _report_gain(built, encoders[0], source, None if corpus is None else corpus[0])
        if harms is not None:
            built.enabled = force or not harms
        if harms and not force:
            message("warning", f"The demonstrations of {target} are off. Correct the pairs, or pass --force.")
        _save(built, target, encoders, None if corpus is None else corpus[0])
        emit([printable(str(target))])


@app.command("add", cls=Command)
def add(
    name: Annotated[str, typer.Argument(metavar="BANK", help="A bank folder; it is made if it is missing.")],
    query: Annotated[
        str | None,
        typer.Option("--query", metavar="TEXT", help="The query.", show_default="the last query"),
    ] = None,
    passage_of: Annotated[
        str | None,
        typer.Option(
            "--passage-of",
            metavar="HIT",
            help="The passage that answers it: the number of a hit of the last query, or PATH:LINE of an indexed file.",
        ),
    ] = None,
    passage: Annotated[str | None, typer.Option("--passage", metavar="TEXT", help="The passage itself.")] = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", metavar="TEXT", help="The instruction of a new bank.")
    ] = None,
    index_dir: IndexDir = None,
    model: Model = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Add a demonstration to a bank. The next query uses it, and nothing is indexed again.

    Examples:
        epic-rag bank add mybank --passage-of 1
        epic-rag bank add mybank --query 'rotate the logs' --passage 'logrotate renames the files every night.'
    """
    from epic_rag import DemonstrationBank, EpicEncoder
    from epic_rag.demonstrations import built_in_banks
    from epic_rag_cli.last_query import load_last_query

    if (passage_of is None) == (passage is None):
        raise usage_error("Pass one of --passage-of and --passage")
    if query is None:
        query = load_last_query().query
    if passage is None:
        passage = _passage_of(str(passage_of), index_dir)
    target = Path(name)
    if (target / _BANK_FILE).is_file():
        if instruction is not None:
            raise usage_error(f"{name} has an instruction already. Leave out --instruction")
        loaded = DemonstrationBank.load(target.absolute())
    elif name in built_in_banks() and target == Path(target.name):
        raise BankError(f"{name} ships with epic-rag. Copy it: `epic-rag bank build {name} --out FOLDER`.")
    else:
        _target(target, target)
        loaded = DemonstrationBank([], task=None if instruction else DEFAULT_TASK, instruction=instruction)
    encoder = EpicEncoder.from_pretrained(model)
    known = loaded.encoder_fingerprints
    if model is None and known and encoder.fingerprint not in known:
        message("note", f"The bank is embedded for {encoder.name} now. Pass --model for another one.")
    changed = loaded.add([(query, passage)], encoder)
    if len(changed) == len(loaded):
        message("note", "The bank has this demonstration already.")
    _save(changed, target, [encoder], None)
    message("note", f"{printable(name)} has {plural(len(changed), 'demonstration')}.")
    emit([printable(str(target))])


@app.command("remove", cls=Command)
def remove(
    name: Annotated[str, typer.Argument(metavar="BANK", help="A bank folder.")],
    numbers: Annotated[
        list[int], typer.Argument(metavar="NUMBER", help="Numbers of demonstrations, as `epic-rag bank show` has.")
    ],
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Remove demonstrations from a bank.

    Examples:
        epic-rag bank remove mybank 3 7
    """
    from epic_rag import DemonstrationBank

    loaded = DemonstrationBank.load(Path(name).absolute())
    changed = loaded.remove(number - 1 for number in numbers)
    changed.save(name)
    message("note", f"{printable(name)} has {plural(len(changed), 'demonstration')}.")
    emit([printable(str(name))])


@app.command("suggest", cls=Command)
def suggest(
    index: Annotated[
        Path | None,
        typer.Argument(
            metavar="INDEX", help="The index folder, or a folder whose .epic-rag it is.", show_default="as for query"
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", metavar="N", min=10, help="Most pairs.")] = 100,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print pairs of headings and sections of an index as JSON lines, to choose demonstrations from.

    Their expected gain is measured among the other passages of the index. Delete the pairs that nobody would ask for,
    rewrite the queries as your users write them, and make a bank of the rest with `epic-rag bank build`.

    Examples:
        epic-rag bank suggest docs > pairs.jsonl
        epic-rag bank suggest --count 50
    """
    import numpy as np

    from epic_rag import DemonstrationBank
    from epic_rag.bank_report import LEAST_PAIRS
    from epic_rag_chroma import ChromaIndexer
    from epic_rag_cli.suggestions import suggest_pairs

    with ChromaIndexer(find_index(None if index is None else [index])) as indexer:
        passages = indexer.passages()
        pairs = suggest_pairs(passages, count)
        if len(pairs) < LEAST_PAIRS:
            raise BankError(
                f"The index has {plural(len(pairs), 'section')} with a heading of their own. Write pairs of your own: "
                'lines {"query": "...", "passage": "..."}.'
            )
        encoder = indexer.encoder
    proposed = DemonstrationBank([(pair.query, pair.passage) for pair in pairs], task=DEFAULT_TASK)
    # The chunk of a pair has the heading in its text, which would answer the query by itself.
    own = {pair.chunk for pair in pairs}
    others = [passage.vector for passage in passages if passage.id not in own]
    report = proposed.evaluate(encoder, np.stack(others) if others else None)
    message("note", _gain_line(report))
    if report.helps:
        message(
            "note",
            "These pairs improve results for queries like headings. Confirm them, then build a bank with --against.",
        )
    else:
        message("note", "A bank of these pairs is not recommended. Queries of your own users are better examples.")
    emit([json.dumps({"query": pair.query, "passage": pair.passage}, ensure_ascii=False) for pair in pairs])


def _passages(against: Path, model: str | None) -> tuple[Vectors, EpicEncoder]:
    """Return the vectors of an index's passages, and its encoder, or that of `model` if they are its vectors.

    Raises:
        IndexMismatchError: If the index has vectors of another model.
    """
    import numpy as np

    from epic_rag import EpicEncoder
    from epic_rag_chroma import ChromaIndexer, IndexMismatchError

    folder = find_index([against])
    load = None if model is None else EpicEncoder.from_pretrained(model)
    with ChromaIndexer(folder, encoder=load) as indexer:
        encoder = indexer.encoder
        if encoder.fingerprint != indexer.fingerprint:
            raise IndexMismatchError(
                f"{folder} was built with another model than {encoder.name}. Leave out --model, or index again with it."
            )
        vectors = [passage.vector for passage in indexer.passages()]
    return (np.stack(vectors) if vectors else np.zeros((0, encoder.dimension), dtype=np.float32)), encoder


def _passage_of(hit: str, index_dir: list[Path] | None) -> str:
    """Return the text of a hit of the last query, or of the chunk at PATH:LINE of an index."""
    from epic_rag_cli.last_query import load_last_query

    if hit.isdecimal():
        passages = load_last_query().passages
        if not 1 <= int(hit) <= len(passages):
            raise BankError(f"The last query has {plural(len(passages), 'hit')}, not {hit}. Run the query again.")
        return passages[int(hit) - 1]
    path, _, line = hit.rpartition(":")
    if not path or not line.isdecimal():
        raise usage_error(f"--passage-of is {hit!r}. Pass a number, or PATH:LINE")
    from epic_rag_chroma import ChromaIndexer

    with ChromaIndexer(find_index(index_dir)) as indexer:
        found = [each for each in indexer.passages() if each.path == path or path.endswith(f"/{each.path}")]
    for passage in found:
        if passage.first_line is not None and passage.first_line <= int(line) <= (passage.last_line or 0):
            return passage.text
    reason = f"has no text at line {line}" if found else "is not in the index"
    raise BankError(f"{path} {reason}. Pass the path and a line as `epic-rag query` prints them.")


def _save(bank: DemonstrationBank, target: Path, encoders: Sequence[EpicEncoder], corpus: Vectors | None) -> None:
    """Write a bank; prepared by encoders that read demonstrations, if it is large, and against an index's passages."""
    for number, encoder in enumerate(encoders):
        # The passages are the first encoder's.
        against = corpus if number == 0 and corpus is not None and len(corpus) else None
        if against is not None or (encoder.strategy == "reader" and len(bank) >= _LEAST_PREPARED):
            bank.prepare(encoder, against)
    bank.save(target)


def _gain_line(report: BankReport) -> str:
    return (
        f"Expected gain in nDCG@10 among {plural(report.passages, 'passage')}: {report.gain:+.2f} (95% interval "
        f"{report.low:+.2f} to {report.high:+.2f}). Without demonstrations: nDCG@10 {report.base:.2f}, recall@10 "
        f"{report.base_recall:.2f}. {report.verdict}"
    )


def _report_gain(bank: DemonstrationBank, encoder: EpicEncoder, source: Path, corpus: Vectors | None) -> bool | None:
    """Print what a bank can be expected to bring, and pairs that do not fit.

    Returns:
        Whether it makes results worse; None if that was not measured.
    """
    from epic_rag.bank_report import LEAST_PAIRS

    if len(bank) < LEAST_PAIRS:
        if corpus is not None:
            message("note", f"The expected gain is measured from {LEAST_PAIRS} pairs on.")
        return None
    report = bank.evaluate(encoder, corpus)
    # Demonstrations in a prompt cannot be measured in this way; their pairs can be read otherwise.
    is_default = encoder.strategy in ("reader", "task-vector")
    prefix = "" if is_default else "With --strategy reader: "
    message("warning" if report.harms else "note", prefix + _gain_line(report))
    is_file = source.is_file()
    places = [number for number, _ in read_jsonl(source)] if is_file else list(range(1, len(bank) + 1))
    unit = "lines" if is_file else "demonstrations"
    for rows, fact in ((report.misfits, "Passages that fit other queries better"), (report.repeated, "Repeated pairs")):
        if rows:
            shown = ", ".join(str(places[row]) for row in sorted(rows[:_SHOWN]))
            more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
            message("note", f"{fact}: {unit} {shown}{more}. Check these pairs.")
    return report.harms if is_default else None


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
        "enabled": bank.enabled,
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
    head.append(f"  {plural(len(bank), 'demonstration')}, {embedded}{'' if bank.enabled else ', off'}")
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
