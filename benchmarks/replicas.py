"""Tiny replicas of published embedding models: their files' shapes, random weights, a small tokenizer.

A replica has what decides how a model is run: the class of its transformer and attention, the tokenizer's special
tokens and padding side, modules, pooling, prompts, lengths. Values are those of the published configuration files and
model cards; sizes are small.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerFast

from epic_rag.backbone import quiet

__all__ = ["REPLICAS", "TEXTS", "Replica"]

WEB = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
SEARCH = "Represent this sentence for searching relevant passages: "
TEXTS = [
    "How do I restore a backup?",
    "",
    "Stop the server, copy the files of the last night back, and start it again. " * 4,
    "Die Datenbank läuft nicht an",
    "def encode(texts): return model(texts)",
    "word " * 300,
]
_CORPUS = [*TEXTS, "query: passage: search_query search_document", "Instruct: task title none | text", SEARCH, WEB]
_WIDTH = 32


@dataclass(frozen=True)
class Replica:
    """A published model in small.

    Attributes:
        name: Name on the hub.
        build: Writes the model's folder.
        query: Query prompt that no file states, but the model card does.
        document: Document prompt, likewise.
    """

    name: str
    build: Callable[[Path], None]
    query: str = ""
    document: str = ""


def tokenizer(style: str, max_length: int = 128, *, lower: bool = False) -> PreTrainedTokenizerFast:
    """Return a small tokenizer in the style of a family: its special tokens, where they stand, and the padding side."""
    specials = {
        "bert": ("[CLS]", "[SEP]", "[PAD]"),
        "roberta": ("<s>", "</s>", "<pad>"),
        "qwen": (None, "<|endoftext|>", "<|pad|>"),
        "gpt": (None, "<|endoftext|>", "<|pad|>"),
        "gemma": ("<bos>", "<eos>", "<pad>"),
        "mistral": ("<s>", "</s>", "<pad>"),
        "t5": (None, "</s>", "<pad>"),
    }
    start, end, pad = specials[style]
    backend = Tokenizer(models.BPE())
    if lower:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[token for token in (start, pad, end, "<unk>") if token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start + ' ' if start else ''}$A {end}",
        special_tokens=[(token, backend.token_to_id(token)) for token in (start, end) if token],
    )
    names = {"pad_token": pad, "unk_token": "<unk>", "model_max_length": max_length}
    if style == "bert":
        names |= {"cls_token": start, "sep_token": end}
    else:
        names |= {"eos_token": end, **({"bos_token": start} if start else {})}
    side = "left" if style in ("qwen", "mistral") else "right"
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, **names)


def shape(tokens: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    """Return the sizes of a tiny transformer."""
    return {
        "vocab_size": len(tokens),
        "hidden_size": _WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": tokens.pad_token_id,
        **changes,
    }


def write(
    folder: Path,
    config: transformers.PretrainedConfig,
    tokens: PreTrainedTokenizerFast,
    modules: Sequence[nn.Module],
    *,
    settings: dict[str, Any] | None = None,
    length: int = 128,
    model_class: Any = AutoModel,
) -> None:
    """Write a sentence-transformers folder: a random transformer of a configuration, and the modules behind it."""
    with tempfile.TemporaryDirectory() as plain, torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        model = model_class.from_config(config) if model_class is AutoModel else model_class(config)
        model.eval().save_pretrained(plain)
        tokens.save_pretrained(plain)
        transformer = Transformer(plain)
        transformer.max_seq_length = length
        built = SentenceTransformer(modules=[transformer, *modules], device="cpu")
        built.save(str(folder), create_model_card=False)
    file = folder / "config_sentence_transformers.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "prompts": {"query": "", "document": ""}, **(settings or {})}))


def dense(width: int = _WIDTH, out: int = 48, activation: nn.Module | None = None, *, bias: bool = True) -> Dense:
    """Return a random dense module."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Dense(width, out, bias=bias, activation_function=activation or nn.Identity())


def bert(pooling: Any, *, lower: bool = True, **settings: Any) -> Callable[[Path], None]:
    """Return a builder of a BERT with a pooling and normalisation."""

    def build(folder: Path) -> None:
        tokens = tokenizer("bert", lower=lower)
        write(
            folder,
            transformers.BertConfig(**shape(tokens)),
            tokens,
            [Pooling(_WIDTH, pooling), Normalize()],
            **settings,
        )

    return build


def _mpnet(folder: Path) -> None:
    tokens = tokenizer("roberta")
    write(folder, transformers.MPNetConfig(**shape(tokens)), tokens, [Pooling(_WIDTH, "mean"), Normalize()])


def _distilroberta(folder: Path) -> None:
    tokens = tokenizer("roberta")
    config = transformers.RobertaConfig(**shape(tokens, max_position_embeddings=514))
    write(folder, config, tokens, [Pooling(_WIDTH, "mean"), Normalize()])


def _e5(folder: Path) -> None:
    tokens = tokenizer("roberta")
    write(folder, transformers.BertConfig(**shape(tokens)), tokens, [Pooling(_WIDTH, "mean"), Normalize()])


def _qwen3(folder: Path) -> None:
    tokens = tokenizer("qwen", 512)
    config = transformers.Qwen3Config(**shape(tokens, num_key_value_heads=2, head_dim=8))
    settings = {"prompts": {"query": WEB, "document": ""}, "similarity_fn_name": "cosine"}
    write(folder, config, tokens, [Pooling(_WIDTH, "lasttoken"), Normalize()], settings=settings, length=512)


def _gemma(folder: Path) -> None:
    tokens = tokenizer("gemma", 512)
    config = transformers.Gemma3TextConfig(
        **shape(tokens, num_key_value_heads=2, head_dim=8, sliding_window=16, use_bidirectional_attention=True)
    )
    prompts = {"query": "task: search result | query: ", "document": "title: none | text: "}
    modules = [Pooling(_WIDTH, "mean"), dense(_WIDTH, 64, bias=False), dense(64, _WIDTH, bias=False), Normalize()]
    write(folder, config, tokens, modules, settings={"prompts": prompts}, length=512)


def _modernbert(pooling: str, prompts: dict[str, str]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        tokens = tokenizer("bert", 512)
        config = transformers.ModernBertConfig(
            **shape(tokens, local_attention=16, cls_token_id=tokens.cls_token_id, sep_token_id=tokens.sep_token_id)
        )
        write(
            folder, config, tokens, [Pooling(_WIDTH, pooling), Normalize()], settings={"prompts": prompts}, length=512
        )

    return build


def _labse(folder: Path) -> None:
    tokens = tokenizer("bert")
    modules = [Pooling(_WIDTH, "cls"), dense(_WIDTH, _WIDTH, nn.Tanh()), Normalize()]
    write(folder, transformers.BertConfig(**shape(tokens)), tokens, modules)


def _distiluse(folder: Path) -> None:
    tokens = tokenizer("bert")
    values = shape(tokens)
    config = transformers.DistilBertConfig(
        vocab_size=values["vocab_size"], dim=_WIDTH, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=512
    )
    write(folder, config, tokens, [Pooling(_WIDTH, "mean"), dense(_WIDTH, 24, nn.Tanh())])


def _mistral(folder: Path) -> None:
    tokens = tokenizer("mistral", 512)
    config = transformers.MistralConfig(**shape(tokens, num_key_value_heads=2, head_dim=8, sliding_window=64))
    prompts = {"web_search_query": "Instruct: Given a web search query, retrieve passages\nQuery: "}
    write(
        folder, config, tokens, [Pooling(_WIDTH, "lasttoken"), Normalize()], settings={"prompts": prompts}, length=256
    )


def _t5(include_prompt: bool, prompts: dict[str, str]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        tokens = tokenizer("t5", 512)
        config = transformers.T5Config(
            vocab_size=len(tokens),
            d_model=_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            pad_token_id=tokens.pad_token_id,
            decoder_start_token_id=tokens.pad_token_id,
        )
        pooling = Pooling(_WIDTH, "mean", include_prompt=include_prompt)
        modules = [pooling, dense(_WIDTH, 48, bias=False), Normalize()]
        settings = {"prompts": prompts}
        model_class = transformers.T5EncoderModel
        write(folder, config, tokens, modules, settings=settings, model_class=model_class)

    return build


def _sgpt(folder: Path) -> None:
    tokens = tokenizer("gpt")
    config = transformers.GPTNeoConfig(
        vocab_size=len(tokens),
        hidden_size=_WIDTH,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=512,
        window_size=16,
        pad_token_id=tokens.pad_token_id,
    )
    write(folder, config, tokens, [Pooling(_WIDTH, "weightedmean")])


def _layer_norm(folder: Path) -> None:
    tokens = tokenizer("bert")
    modules = [Pooling(_WIDTH, ("cls", "mean")), LayerNorm(2 * _WIDTH), dense(2 * _WIDTH, 40), Normalize()]
    settings = {"truncate_dim": 20}
    write(folder, transformers.BertConfig(**shape(tokens)), tokens, modules, settings=settings)


def _static(folder: Path) -> None:
    tokens = tokenizer("bert")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = StaticEmbedding(tokens, embedding_dim=64)
    SentenceTransformer(modules=[module], device="cpu").save(str(folder), create_model_card=False)


def _model2vec(folder: Path) -> None:
    folder.mkdir(parents=True)
    tokens = tokenizer("bert")
    tokens.backend_tokenizer.save(str(folder / "tokenizer.json"))
    table = torch.randn(len(tokens), 64, generator=torch.Generator().manual_seed(0))
    save_file({"embeddings": table.half()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True, "hidden_dim": 64}))


def _words(folder: Path) -> None:
    vocabulary = sorted({word.lower() for text in _CORPUS for word in text.split()})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        table = torch.randn(len(vocabulary), _WIDTH)
    words = WordEmbeddings(WhitespaceTokenizer(vocab=vocabulary, do_lower_case=True), table.numpy(), max_seq_length=128)
    model = SentenceTransformer(modules=[words, Pooling(_WIDTH, "mean")], device="cpu")
    model.save(str(folder), create_model_card=False)


REPLICAS: tuple[Replica, ...] = (
    Replica("sentence-transformers/all-MiniLM-L6-v2", bert("mean")),
    Replica("sentence-transformers/all-mpnet-base-v2", _mpnet),
    Replica("sentence-transformers/all-distilroberta-v1", _distilroberta),
    Replica("BAAI/bge-small-en-v1.5", bert("cls"), query=SEARCH),
    Replica("intfloat/multilingual-e5-small", _e5, query="query: ", document="passage: "),
    Replica("mixedbread-ai/mxbai-embed-large-v1", bert("cls", settings={"prompts": {"query": SEARCH}})),
    Replica(
        "Snowflake/snowflake-arctic-embed-m-v1.5", bert("cls", settings={"prompts": {"query": SEARCH, "document": ""}})
    ),
    Replica("ibm-granite/granite-embedding-small-english-r2", _modernbert("cls", {})),
    Replica(
        "nomic-ai/modernbert-embed-base",
        _modernbert("mean", {"query": "search_query: ", "document": "search_document: "}),
    ),
    Replica("Qwen/Qwen3-Embedding-0.6B", _qwen3),
    Replica("google/embeddinggemma-300m", _gemma),
    Replica("intfloat/e5-mistral-7b-instruct", _mistral, query=f"{WEB} "),
    Replica("sentence-transformers/LaBSE", _labse),
    Replica("sentence-transformers/distiluse-base-multilingual-cased-v2", _distiluse),
    Replica("sentence-transformers/gtr-t5-base", _t5(True, {})),
    Replica("hkunlp/instructor-base", _t5(False, {"query": "Represent the question: ", "document": "Represent it: "})),
    Replica("Muennighoff/SGPT-125M-weightedmean-msmarco-specb-bitfit", _sgpt),
    Replica("layer norm, two poolings, truncated", _layer_norm),
    Replica("sentence-transformers/static-retrieval-mrl-en-v1", _static),
    Replica("minishlab/potion-base-8M", _model2vec),
    Replica("sentence-transformers/average_word_embeddings_glove.6B.300d", _words),
)
