"""Models and the files they come in, made on the spot: a BERT, GGUF, a PEFT adapter, a hub cache."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from epic_rag import EpicEncoder
from epic_rag.backbone import Backbone
from epic_rag.prompt import PromptBuilder
from tests.conftest import make_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def word_piece_encoder() -> EpicEncoder:
    """A tiny BERT with the kind of tokenizer that a BERT has."""
    words = ["how", "do", "i", "install", "it", "the", "quick", "brown", "fox", "query", ":", "instruct", "given", "a"]
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                initializer_range=0.2,
            )
        )
    builder = PromptBuilder(tokenizer, append_eos=False, max_query_tokens=64, max_document_tokens=64)
    return EpicEncoder(Backbone(model.eval()).eval(), builder, name="tiny-bert")


def make_adapter(model: PreTrainedModel, folder: Path, **settings: Any) -> PreTrainedModel:
    """Save a random LoRA adapter of a model; the model with the adapter merged in."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT asks transformers for a name that is to go away.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(3)
        # init_lora_weights=False: both matrices random, so that the adapter does something.
        wrapped = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings))
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """A Llama and its tokenizer as llama.cpp's converter writes them."""
    import gguf

    made, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(made.max_position_embeddings)
    writer.add_embedding_length(made.hidden_size)
    writer.add_block_count(made.num_hidden_layers)
    writer.add_feed_forward_length(made.intermediate_size)
    writer.add_head_count(made.num_attention_heads)
    writer.add_head_count_kv(made.num_key_value_heads)
    writer.add_layer_norm_rms_eps(made.rms_norm_eps)
    writer.add_rope_dimension_count(made.hidden_size // made.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(made.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index < 2 else 1 for index in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "token_embd",
        "layers": "blk",
    }
    heads = {"attn_q": made.num_attention_heads, "attn_k": made.num_key_value_heads}
    for name, value in model.state_dict().items():
        array = value.numpy()
        target = "output_norm.weight" if name == "norm.weight" else name
        for long, short in names.items():
            target = target.replace(long, short)
        count = next((number for part, number in heads.items() if part in target), None)
        if count is not None:  # llama.cpp keeps the two halves of a rotary pair side by side
            halves = array.reshape(count, 2, array.shape[0] // count // 2, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_hub_cache(cache: Path, name: str, folder: Path) -> Path:
    """Put a model folder into a hub cache as huggingface_hub lays it out; the folder of its only revision."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for reference in ("main", "v1"):
        (repository / "refs" / reference).write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def save_cross_encoder(folder: Path, outputs: int = 1) -> Path:
    """A tiny random cross-encoder."""
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=outputs,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
