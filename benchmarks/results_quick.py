"""Tiny models and data for `benchmarks/results.py --quick`."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

WORDS = [
    "index",
    "query",
    "passage",
    "vector",
    "folder",
    "search",
    "manual",
    "engine",
    "filter",
    "pump",
    "screen",
    "backup",
    "server",
    "disk",
    "night",
    "cable",
]
INSTRUCTION = "Given a question, retrieve the passage that answers it"


def make_tiny_world(folder: Path, commands: Sequence[str]) -> dict[str, str]:
    """Write models and data.

    Args:
        folder: Empty.
        commands: With placeholders like {data}; every file of pairs that they name is made.

    Returns:
        Values of {data} and of the models' placeholders.
    """
    make_encoder(folder / "llm", seed=0, trained=True)
    make_encoder(folder / "minilm", seed=1, trained=False)
    stems = {stem for command in commands for stem in re.findall(r"\{data\}/train/(\w+)\.jsonl", command)}
    for command in commands:
        words = command.split()
        if words[1] == "ablate":
            stems |= grid_files(words[2])
    make_pairs(folder / "data" / "train", sorted(stems))
    make_sets(folder / "data" / "eval")
    places = dict.fromkeys(("llm", "plain", "int8", "default"), str(folder / "llm"))
    others = dict.fromkeys(("minilm", "reader", "static"), str(folder / "minilm"))
    return {"dtype": "float32", "data": str(folder / "data"), **others, **places}


def grid_files(name: str) -> set[str]:
    """Return the files of pairs that a shipped grid trains and scores on."""
    from epic_rag.evaluation.ablation import load_grid

    grid = load_grid(name, ["model=tiny", "data=nowhere"])
    return {*grid.evaluation.heldout, *(task for arm in grid.arms for task in arm.config.tasks)}


def make_encoder(folder: Path, *, seed: int, trained: bool) -> None:
    """Save a causal encoder with random weights: 2 layers, 32 wide; any text tokenises.

    Args:
        folder: The checkpoint's folder.
        seed: Seed of the weights.
        trained: Whether it has a training record, as a shipped checkpoint has; its queries get prompts then.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    from epic_rag.backbone import Backbone
    from epic_rag.encoder import EpicEncoder
    from epic_rag.prompt import PromptBuilder

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), INSTRUCTION], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    backbone = Backbone(LlamaModel(config).eval(), projector="linear").eval()
    builder = PromptBuilder(
        fast, append_eos=True, max_query_tokens=128, max_document_tokens=128, max_positions=backbone.max_positions
    )
    EpicEncoder(backbone, builder, name="tiny", source="tiny").save_pretrained(folder)
    if trained:
        record = json.loads((folder / "epic.json").read_text(encoding="utf-8"))
        record |= {"training": {"steps": 0}, "default_instruction": INSTRUCTION}
        (folder / "epic.json").write_text(json.dumps(record), encoding="utf-8")


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


def make_pairs(folder: Path, stems: Sequence[str]) -> None:
    """Write files of 80 pairs; a query shares words with its passage."""
    for stem in stems:
        rng = random.Random(stem)
        rows = []
        for number in range(80):
            passage = f"{stem} {number} {sentence(rng, 12)}"
            query = f"{number} {' '.join(rng.sample(passage.split(), 3))}"
            rows.append({"query": query, "positive": passage, "source": f"manual {number % 2}"})
        write_jsonl(folder / f"{stem}.jsonl.gz", rows)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict.fromkeys(stems, INSTRUCTION))
    (folder / "instructions.json").write_text(text, encoding="utf-8")


def make_sets(folder: Path) -> None:
    """Write one set of each kind, under names for which there are built-in demonstrations."""
    rng = random.Random(0)
    texts = [f"{number} {sentence(rng, 8)}" for number in range(40)]
    write_jsonl(
        folder / "Cranfield" / "corpus.jsonl.gz", [{"_id": f"d{n}", "text": text} for n, text in enumerate(texts)]
    )
    queries = [{"_id": f"q{n}", "text": " ".join(texts[n].split()[:4])} for n in range(8)]
    write_jsonl(folder / "Cranfield" / "queries.jsonl.gz", queries)
    (folder / "Cranfield" / "qrels").mkdir()
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(8))
    (folder / "Cranfield" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}", encoding="utf-8")
    candidates = [
        {"query": " ".join(texts[n].split()[:4]), "positive": [texts[n]], "negative": texts[n + 1 : n + 4]}
        for n in range(6)
    ]
    write_jsonl(folder / "TrecQA" / "reranking.jsonl.gz", candidates)
    for name in ("STSBenchmark", "STS13"):
        lines = [f"{text}\t{sentence(rng, 4)} {text}\t{rng.uniform(0, 5):.1f}" for text in texts[:12]]
        (folder / name).mkdir()
        (folder / name / "test.tsv").write_text(
            "\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n", encoding="utf-8"
        )
    for split, size in (("train", 24), ("test", 8)):
        rows = [{"text": f"{split} {n} {sentence(rng, 5)}", "label": f"intent {n % 2}"} for n in range(size)]
        write_jsonl(folder / "Banking77" / f"{split}.jsonl.gz", rows)
    rows = [{"text": f"{n} {sentence(rng, 5)}", "label": n % 3} for n in range(30)]
    write_jsonl(folder / "StackOverflowTitles_clustering" / "clustering.jsonl.gz", rows)
