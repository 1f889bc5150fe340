"""Shared fixtures: seeded tiny random models, made on the spot. Nothing is downloaded."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before transformers or chromadb are imported: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("ANONYMIZED_TELEMETRY", "False")
# Results are those of a machine without a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Two test processes share two cores: with one thread each, tiny models run several times faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from epic_rag.backbone import Backbone, ProjectorKind
from epic_rag.encoder import EpicEncoder
from epic_rag.prompt import PromptBuilder

CORPUS = [
    "Instruct: Given a question, retrieve passages that answer it\nQuery: how do I install the package\nResponse:",
    "To install the package, run pip install in a virtual environment and read the manual.",
    "The quick brown fox jumps over the lazy dog while 42 cats watch it from a warm window.",
    "def encode(texts): return model(texts)  # a function that turns texts into vectors",
    "# Heading\n\nA paragraph of documentation about settings, files, folders, errors and indexes.\n",
]


def make_tokenizer(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences; any text tokenises, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_encoder(
    *, causal: bool = True, projector: ProjectorKind = "linear", seed: int = 0, max_tokens: int = 128
) -> EpicEncoder:
    """A tiny encoder with random weights: 2 layers, 32 wide."""
    tokenizer = make_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if causal:
            model = LlamaModel(LlamaConfig(**shape, num_key_value_heads=2, initializer_range=0.2))
        else:
            model = BertModel(BertConfig(**shape, initializer_range=0.2), add_pooling_layer=False)
        backbone = Backbone(model.eval(), projector=projector).eval()
    builder = PromptBuilder(
        tokenizer,
        append_eos=True,
        max_query_tokens=max_tokens,
        max_document_tokens=max_tokens,
        max_positions=backbone.max_positions,
    )
    return EpicEncoder(backbone, builder, name="tiny", source="tiny")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_counts() -> Iterator[None]:
    """Tests that were started in the background, and what they start, would ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _log_levels() -> Iterator[None]:
    """Programs set the levels of the packages' loggers for their process, which tests share with the next ones."""

    def packages() -> Iterator[logging.Logger]:
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if name.startswith("epic_rag") and isinstance(logger, logging.Logger):
                yield logger

    before = {logger: (logger.level, logger.disabled) for logger in packages()}
    yield
    for logger in packages():
        level, logger.disabled = before.get(logger, (logging.NOTSET, False))
        if logger.level != level:
            logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_encoder() -> EpicEncoder:
    """A tiny causal encoder. Shared: a test that changes it makes its own with `make_encoder`."""
    return make_encoder()


@pytest.fixture(scope="session")
def tiny_bidirectional_encoder() -> EpicEncoder:
    """A tiny BERT with mean pooling."""
    return make_encoder(causal=False)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny causal encoder."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_encoder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with other weights, for everything that must notice the difference."""
    folder = tmp_path_factory.mktemp("checkpoints") / "other"
    make_encoder(seed=1).save_pretrained(folder)
    return folder
