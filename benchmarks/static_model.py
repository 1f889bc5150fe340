"""WordLlama's static model from its package on PyPI: a folder that every library opens.

    pip install --no-deps wordllama==0.4.0.post1
    python benchmarks/static_model.py OUT [--source WHEEL_OR_FOLDER]
    epic-rag eval --few-shot --model OUT ...

WordLlama (MIT) brings a table of 256 numbers for each token of Llama 2, distilled from the token embeddings of large
models; a text's vector is the mean of its tokens' rows. The folder is a `StaticEmbedding` of sentence-transformers, the
simplest kind of encoder that there is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from bench_common import package_file, require_new_folder, run_main
from safetensors import SafetensorError
from safetensors.torch import load
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer

from epic_rag.errors import CheckpointError

__all__ = ["convert", "parser", "run"]

REQUIREMENT = "wordllama==0.4.0.post1"
WEIGHTS = "weights/l2_supercat_256.safetensors"
TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"


def convert(source: Path | None, folder: Path) -> None:
    """Write the model as a folder of sentence-transformers.

    Args:
        source: Wheel, or the folder that holds the unpacked package; None for the installed one.
        folder: New or empty.

    Raises:
        CheckpointError: If the package has other files, or the folder holds any.
    """
    require_new_folder(folder)
    weights, words = (package_file(REQUIREMENT, name, source) for name in (WEIGHTS, TOKENIZER))
    try:
        table = load(weights)["embedding.weight"].to(torch.float32)
        tokenizer = Tokenizer.from_buffer(words)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"The files of {REQUIREMENT} are damaged ({error}). Download its wheel again.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    module = StaticEmbedding(tokenizer, embedding_weights=table.numpy())
    SentenceTransformer(modules=[module], device="cpu").save(str(folder), create_model_card=False)
    (folder / "README.md").write_text(
        "---\nlicense: mit\nlanguage: en\n---\n\n# WordLlama, 256 dimensions\n\n"
        "Token vectors of wordllama 0.4.0.post1 (MIT), averaged.\n",
        encoding="utf-8",
    )


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(description="Write WordLlama's static model as a folder.")
    options.add_argument("folder", type=Path, metavar="OUT", help="the folder to write, new or empty")
    options.add_argument(
        "--source", type=Path, metavar="PATH", help="wheel, or a folder with the package; without it the installed one"
    )
    return options


def run(options: argparse.Namespace) -> int:
    """Convert."""
    convert(options.source, options.folder)
    print(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), run))
