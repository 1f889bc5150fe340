"""`epic-rag models`: the checkpoints that ship with the package, and folders of them for other libraries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from epic_rag.errors import CheckpointError
from epic_rag_cli.config import add_command, new_app
from epic_rag_cli.options import Json
from epic_rag_cli.terminal import columns, emit, emit_json, message, printable, size

__all__ = ["app"]

_CARD = "README.md"


def models(context: typer.Context, as_json: Json = False) -> None:
    """List the models that need no download.

    --model also takes a checkpoint folder or a Hugging Face name.

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
                info.description,
            )
            for info in found
        ]
        emit(columns(rows, styles=("green", "bold")))
    else:
        message("note", "no model ships with this installation; give --model a checkpoint folder or a hub name")


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
        typer.Option("--dtype", metavar="NAME", help="How weights are stored: float32, float16, bfloat16 or int8."),
    ] = "float16",
) -> None:
    """Write a model as a folder that other libraries open.

    The models that ship with epic-rag store their weights as int8, which only
    epic-rag reads. The folder is one for transformers and sentence-transformers,
    too, unless --dtype is int8.

    Examples:
        epic-rag models export epic-minilm exported
    """
    _require_new(folder)
    import shutil

    from epic_rag import EpicEncoder
    from epic_rag.checkpoints import resolve

    # On the CPU in float32, whatever the machine: a GPU's default dtype has fewer bits than some weights on disk.
    encoder = EpicEncoder.from_pretrained(model, device="cpu", dtype="float32")
    encoder.save_pretrained(folder, dtype=dtype)
    card = resolve(model) / _CARD
    if card.is_file():
        shutil.copyfile(card, folder / _CARD)
    message("note", f"{encoder.name} written with {dtype} weights")
    emit([printable(str(folder))])


def merge(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A name from `epic-rag models`, a checkpoint folder or a Hugging Face name."
        ),
    ],
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="The model that it was trained from, or another one of that kind.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write, new or empty.")],
    weight: Annotated[
        float, typer.Option("--weight", metavar="SHARE", help="OTHER's share of the weights, from 0 to 1.")
    ] = 0.5,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="NAME", help="How weights are stored: float32, float16, bfloat16 or int8."),
    ] = "float16",
) -> None:
    """Write the mean of two models' weights as a new model.

    Training on your pairs makes a model better at them and may make it worse at
    the rest. The mean of the weights before and after often keeps most of both.
    The two must be of one kind. The prompt and all settings are MODEL's; the new
    model has the folder's name.

    Examples:
        epic-rag models merge runs/mine/final epic-minilm runs/mine/merged
    """
    _require_new(folder)
    from epic_rag import EpicEncoder
    from epic_rag.merging import merge as merge_weights
    from epic_rag.training.model_card import write_model_card

    encoder, second = (EpicEncoder.from_pretrained(name, device="cpu", dtype="float32") for name in (model, other))
    told = encoder.name
    merge_weights(encoder, second, weight=weight)
    encoder.name = folder.resolve().name
    encoder.save_pretrained(folder, dtype=dtype)
    write_model_card(folder)
    message("note", f"{encoder.name} is {1 - weight:g} of {told} and {weight:g} of {second.name}, with {dtype} weights")
    emit([printable(str(folder))])


def _require_new(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, a checkpoint is a folder; give another name")
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} holds other files; give a new folder")


app = new_app("models", models)
add_command(app, "export", export)
add_command(app, "merge", merge)
