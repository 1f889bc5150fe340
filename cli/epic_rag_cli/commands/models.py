"""`epic-rag models`: list the checkpoints that ship with the package, and export them for other libraries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from epic_rag.errors import CheckpointError
from epic_rag_cli.options import Command, Json, Quiet, Verbose, new_group
from epic_rag_cli.terminal import columns, emit, emit_json, message, printable, size

__all__ = ["app"]

_CARD = "README.md"

app = new_group("models")


@app.callback()
def models(context: typer.Context, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the models that need no download.

    --model also takes:

    - a folder of epic-rag, Hugging Face, sentence-transformers or model2vec;
    - a name on the Hugging Face hub, for instance BAAI/bge-small-en-v1.5;
    - onnx:FOLDER_OR_NAME[@FILE] for a folder's ONNX file;
    - a remote model: openai:NAME[@URL], ollama:NAME[@URL], tei:URL or cohere:NAME[@URL].

    Examples:
        epic-rag models
        epic-rag models --json
    """
    if context.invoked_subcommand is not None:
        return
    from epic_rag.checkpoints import list_checkpoints

    found = list_checkpoints()
    if as_json:
        emit_json([{**dataclasses.asdict(info), "path": str(info.path)} for info in found])
    elif found:
        rows = [
            (
                "*" if info.default else " ",
                info.name,
                f"{info.dimension} dimensions",
                f"{info.parameters / 1e6:.1f}M parameters",
                size(info.size_bytes),
                ", ".join(info.languages) or "languages unknown",
                info.description,
            )
            for info in found
        ]
        emit(columns(rows, styles=("green", "bold")))
    else:
        message(
            "note", "No model ships with this installation. Pass a checkpoint folder or a Hugging Face name to --model."
        )


@app.command("show", cls=Command)
def show(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name as --model takes it: see `epic-rag models --help`.")
    ],
    as_json: Json = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow Python code in the model's folder to run.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print what is known of a model: prompts, pooling, lengths, dimensions, and where each was found.

    A value with "guessed" as its source is stated by no file of the model.

    Examples:
        epic-rag models show epic-minilm
        epic-rag models show epic-minilm --json
    """
    from epic_rag import EpicEncoder
    from epic_rag.checkpoints import languages_of

    encoder = EpicEncoder.from_pretrained(model, device="cpu", trust_remote_code=trust_remote_code)
    facts = [("name", encoder.name, "argument"), ("fingerprint", encoder.fingerprint, "computed")]
    facts += [(fact.name, fact.value, fact.source) for fact in encoder.describe()]
    languages, source = languages_of(encoder.name, encoder.folder, vars(encoder.config))
    facts.append(("languages", ", ".join(languages) or "unknown", source))
    if as_json:
        emit_json([{"name": name, "value": value, "source": source} for name, value, source in facts])
    else:
        emit(columns([tuple(map(printable, fact)) for fact in facts], styles=("bold", "", "dim")))


@app.command("export", cls=Command)
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A name from `epic-rag models`, a checkpoint folder or a Hugging Face name."
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write, new or empty.")],
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", metavar="NAME", help="Number format of the weights: float32, float16, bfloat16 or int8."
        ),
    ] = "float16",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a model as a folder that other libraries open.

    The models that ship with epic-rag store their weights as int8, which only epic-rag reads. transformers and
    sentence-transformers read the folder, too, unless --dtype is int8.

    Examples:
        epic-rag models export epic-minilm exported
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, a checkpoint is a folder. Pass another name.")
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} holds other files. Pass a new folder.")
    import shutil

    from epic_rag import EpicEncoder
    from epic_rag.checkpoints import resolve

    # CPU and float32 keep all bits of the weights on disk.
    encoder = EpicEncoder.from_pretrained(model, device="cpu", dtype="float32")
    encoder.save_pretrained(folder, dtype=dtype)
    card = resolve(model) / _CARD
    if card.is_file():
        shutil.copyfile(card, folder / _CARD)
    message("note", f"{encoder.name} written with {dtype} weights.")
    emit([printable(str(folder))])
