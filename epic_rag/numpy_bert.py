"""BERT in numpy: the forward pass of the shipped encoder without torch, for a handful of texts.

Importing torch and transformers and loading a model takes seconds; a new process that encodes one query with numpy
needs neither (`benchmarks/cold_start.py`, table in benchmarks/README.md).

    ids ──► token, position and type embeddings ──► layers ──► pool ──► head ──► L2

Weights stay memory-mapped in the dtype that they are stored in (int8 rows, float16 or float32). A matrix is converted
to float32 when it is multiplied, and of the embeddings only the rows of the texts' tokens are. Rows are not padded:
linear layers take the tokens of all rows at once, attention takes row by row. The results are those of
`epic_rag.backbone.Backbone` in float32, up to rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from epic_rag.checkpoints import HEAD_FOLDER, PROJECTOR_FILE, QUERY_FILES, QUERY_FORMAT_VERSION, hash_weights
from epic_rag.prompt import EncoderInput, PromptBuilder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["LightTokenizer", "NumpyBert", "open_numpy_bert", "record_hash"]

Array = npt.NDArray[Any]
Vectors = npt.NDArray[np.float32]

_MOST_TOKENS = 4096
"""Tokens for which loading torch pays."""
_QUERY_TOKENS = 128
"""Tokens of a call that torch embeds no faster."""
_DTYPES = {"I8": np.int8, "F16": np.float16, "F32": np.float32}
_SCALE = ".scale"
# Coefficients of x², highest power first, of a rational approximation of erf(x) / x on [-4, 4]; error below 3e-7.
_ERF_ABOVE = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
_ERF_BELOW = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03),
    -1.42647390514189e-02,
)


class NumpyBert:
    """A BERT encoder with its pooling and head.

    Args:
        config: Contents of `config.json`.
        weights: Tensors by name: `transformer.*`, `projector.*`, `head.*`, and `*.scale` of int8 rows;
            `query_transformer.*` for those that queries are read with instead.
        pooling: "mean", "cls" or "last".
        projector_kind: Kind of the projector, which is part of the fingerprint alone: slots need torch.
        weights_hash: Hash of the weights that `hash_weights` would compute; None if it is unknown.

    Attributes:
        dimension: Width of the vectors.
        has_query_weights: Whether queries are read with weights of their own.
        tokens_left: Tokens of calls with more than a query that are still embedded here.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Array],
        *,
        pooling: str,
        projector_kind: str,
        weights_hash: str | None = None,
    ) -> None:
        self._config = config
        own = {name.removeprefix("query_") for name in weights if name.startswith("query_transformer.")}
        self._weights = {name: array for name, array in weights.items() if not name.startswith("query_transformer.")}
        # A matrix of queries' own brings its own scales, or has none.
        shared = {name: array for name, array in self._weights.items() if name.removesuffix(_SCALE) not in own}
        self._query_weights = {**shared, **{name: weights[f"query_{name}"] for name in own}}
        self.has_query_weights = bool(own)
        self.pooling = pooling
        self.projector_kind = projector_kind
        self.dimension = int(weights["head.weight"].shape[0] if "head.weight" in weights else config["hidden_size"])
        self._weights_hash = weights_hash
        self.tokens_left = _MOST_TOKENS

    def takes(self, rows: Sequence[EncoderInput]) -> bool:
        """Return whether to embed the rows here; if False, torch should be loaded for them.

        A single query is always embedded here. Larger calls share `tokens_left`, so that where torch is needed after
        all, no more time is lost than loading it takes.
        """
        tokens = sum(len(row.ids) for row in rows)
        if tokens <= _QUERY_TOKENS:
            return True
        self.tokens_left -= tokens
        return self.tokens_left >= 0

    def embed(self, rows: Sequence[EncoderInput]) -> Vectors:
        """Embed rows without slots, all of them queries or none.

        Returns:
            (rows, dim) float32 unit vectors.
        """
        if not rows:
            return np.zeros((0, self.dimension), dtype=np.float32)
        spans = _consecutive([len(row.ids) for row in rows])
        if self.pooling == "mean":
            pooled_spans = [
                slice(span.start + row.pool_start, span.stop) for row, span in zip(rows, spans, strict=True)
            ]
        elif self.pooling == "cls":
            pooled_spans = [slice(span.start, span.start + 1) for span in spans]
        else:
            pooled_spans = [slice(span.stop - 1, span.stop) for span in spans]
        weights = self._query_weights if rows[0].is_query else self._weights
        states = self._forward(weights, np.concatenate([row.ids for row in rows]), spans, pooled_spans)
        pooled = np.stack([each.mean(axis=0) for each in states])
        if "head.weight" in weights:
            pooled = self._linear(weights, pooled, "head")
        # torch's normalize has the same lower bound.
        vectors: Vectors = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return vectors

    def weights_hash(self) -> str:
        """Return the hash that `epic_rag.backbone.hash_tensors` has for the same model in torch."""
        if self._weights_hash is not None:
            return self._weights_hash
        tensors = {}
        for prefix, weights in (("", self._weights), ("query_", self._query_weights)):
            scales = {name + _SCALE for name in weights}
            for name in weights:
                # torch has all weights of both transformers, shared ones twice.
                if name not in scales and (not prefix or (self.has_query_weights and name.startswith("transformer."))):
                    tensors[prefix + name] = partial(self._rows, weights, name, slice(None))
        return hash_weights(tensors)

    def _forward(
        self, weights: Mapping[str, Array], ids: Array, spans: Sequence[slice], pooled_spans: Sequence[slice]
    ) -> list[Vectors]:
        """Run the transformer.

        Args:
            weights: Those of queries, or of documents.
            ids: (tokens,) token ids of all rows.
            spans: The tokens of each row.
            pooled_spans: Those of them that are pooled; the last layer computes no others.

        Returns:
            For each row (pooled tokens, width) states.
        """
        config, eps = self._config, float(self._config.get("layer_norm_eps", 1e-12))
        heads, width, layers = (
            int(config[name]) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
        )
        scratch = np.empty(width * int(config["intermediate_size"]), dtype=np.float32)
        linear, norm = partial(self._linear, weights, scratch=scratch), partial(self._norm, weights, eps=eps)

        def split(x: Vectors) -> Vectors:
            parts: Vectors = x.reshape(len(x), heads, -1).transpose(1, 0, 2)  # (heads, tokens, width / heads)
            return parts

        embeddings = "transformer.embeddings."
        x = self._rows(weights, f"{embeddings}word_embeddings.weight", ids)
        x += self._rows(weights, f"{embeddings}token_type_embeddings.weight", slice(0, 1))
        longest = max(span.stop - span.start for span in spans)
        positions = self._rows(weights, f"{embeddings}position_embeddings.weight", slice(0, longest))
        for span in spans:
            x[span] += positions[: span.stop - span.start]
        x = norm(x, f"{embeddings}LayerNorm")
        parts = spans
        for number in range(layers):
            layer = f"transformer.encoder.layer.{number}."
            k, v = split(linear(x, f"{layer}attention.self.key")), split(linear(x, f"{layer}attention.self.value"))
            if number == layers - 1:
                x = np.concatenate([x[span] for span in pooled_spans])
                parts = _consecutive([span.stop - span.start for span in pooled_spans])
            q = split(linear(x, f"{layer}attention.self.query")) * np.float32((width // heads) ** -0.5)
            mixed = np.empty_like(x)
            for part, span in zip(parts, spans, strict=True):
                scores = q[:, part] @ k[:, span].transpose(0, 2, 1)
                scores -= scores.max(axis=2, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(axis=2, keepdims=True)
                mixed[part] = (scores @ v[:, span]).transpose(1, 0, 2).reshape(-1, width)
            x = norm(x + linear(mixed, f"{layer}attention.output.dense"), f"{layer}attention.output.LayerNorm")
            inner = _gelu(linear(x, f"{layer}intermediate.dense"))
            x = norm(x + linear(inner, f"{layer}output.dense"), f"{layer}output.LayerNorm")
        return [x[part] for part in parts]

    @staticmethod
    def _linear(weights: Mapping[str, Array], x: Vectors, name: str, *, scratch: Vectors | None = None) -> Vectors:
        """Map (tokens, in) to (tokens, out); a stored weight that is not float32 is converted into `scratch`."""
        weight, scale = weights[f"{name}.weight"], weights.get(f"{name}.weight{_SCALE}")
        if weight.dtype != np.float32:
            if scratch is None or weight.size > scratch.size:
                scratch = np.empty(weight.size, dtype=np.float32)
            converted = scratch[: weight.size].reshape(weight.shape)
            np.copyto(converted, weight)
            weight = converted
        # BLAS multiplies a short batch in 0.7 of the time when the weight comes first.
        y: Vectors = np.ascontiguousarray((weight @ np.ascontiguousarray(x.T)).T)
        if scale is not None:
            y *= scale
        if f"{name}.bias" in weights:
            y += weights[f"{name}.bias"]
        return y

    @staticmethod
    def _norm(weights: Mapping[str, Array], x: Vectors, name: str, *, eps: float) -> Vectors:
        width = np.float32(x.shape[1])
        x = x - np.add.reduce(x, axis=1, keepdims=True) / width
        x /= np.sqrt(np.einsum("td,td->t", x, x) / width + np.float32(eps))[:, np.newaxis]
        x *= weights[f"{name}.weight"]
        x += weights[f"{name}.bias"]
        return x

    @staticmethod
    def _rows(weights: Mapping[str, Array], name: str, which: Any) -> Vectors:
        """Return rows of a tensor in float32."""
        stored, scale = weights[name], weights.get(name + _SCALE)
        rows: Vectors = stored[which].astype(np.float32) if stored.ndim else stored.astype(np.float32)
        if scale is not None:
            rows *= scale[which].reshape(-1, *[1] * (rows.ndim - 1))
        return rows


def _consecutive(lengths: Sequence[int]) -> list[slice]:
    """Return slices of these lengths, one behind the other."""
    ends = np.cumsum(lengths).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _gelu(x: Vectors) -> Vectors:
    """Return x Φ(x), computed in place."""
    z = np.clip(x * np.float32(0.5**0.5), -4, 4)
    square = z * z
    above, below = _polynomial(_ERF_ABOVE, square), _polynomial(_ERF_BELOW, square)
    above *= z
    above /= below  # erf(z)
    above += 1
    above *= np.float32(0.5)
    x *= above
    return x


def _polynomial(coefficients: Sequence[float], x: Vectors) -> Vectors:
    result: Vectors = x * np.float32(coefficients[0])
    for coefficient in coefficients[1:-1]:
        result += np.float32(coefficient)
        result *= x
    result += np.float32(coefficients[-1])
    return result


def open_numpy_bert(
    folder: Path, epic: Mapping[str, Any], *, max_query_tokens: int | None, max_document_tokens: int | None
) -> tuple[NumpyBert, PromptBuilder] | None:
    """Open a checkpoint folder, if numpy can run its model.

    Args:
        folder: The folder.
        epic: Contents of its `epic.json`.
        max_query_tokens: Overrides the stored limit.
        max_document_tokens: Overrides the stored limit.

    Returns:
        The model and its prompt builder; None for another kind of model, and for a folder that is incomplete or broken,
        which `epic_rag.checkpoint_io` reports.

    Raises:
        ConfigError: If a limit is below 1.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not _is_supported(config, epic):
            return None
        weights = _read_weights(folder)
        has_query_weights = any(name.startswith("query_transformer.") for name in weights)
        if has_query_weights is not (epic.get("format_version") == QUERY_FORMAT_VERSION):
            return None
        if {name: array.shape for name, array in weights.items()} != _expected_shapes(config, epic, weights):
            return None
        tokenizer = _open_tokenizer(folder)
        if tokenizer is None:
            return None
        positions = int(config["max_position_embeddings"])
        # transformers' class has many methods; the builder needs those of LightTokenizer.
        prompt = PromptBuilder.from_settings(
            cast(Any, tokenizer),
            epic,
            append_eos=bool(epic["append_eos"]),
            limit=positions,
            max_positions=positions,
            max_query_tokens=max_query_tokens,
            max_document_tokens=max_document_tokens,
        )
        recorded = epic.get("weights_hash") or {}
        known = recorded.get("values") if recorded.get("files") == _hash_files(folder) else None
        model = NumpyBert(
            config, weights, pooling=epic["pooling"], projector_kind=epic["projector"], weights_hash=known
        )
        return model, prompt
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def record_hash(folder: Path, epic: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the entry `weights_hash` of `epic.json`: the hash of the weights, and that of the files that hold them.

    The hash of 23 million weights takes 0.1 s, that of their files 0.02 s. As long as the files are the same, so are
    the weights.

    Args:
        folder: A checkpoint folder.
        epic: Contents of its `epic.json` without the entry.

    Returns:
        The entry; None for a model that numpy does not run.
    """
    opened = open_numpy_bert(folder, epic, max_query_tokens=None, max_document_tokens=None)
    return None if opened is None else {"files": _hash_files(folder), "values": opened[0].weights_hash()}


def _hash_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in _weight_files(folder):
        digest.update(f"{file.relative_to(folder).as_posix()}{file.stat().st_size}".encode())
        with open(file, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _is_supported(config: Mapping[str, Any], epic: Mapping[str, Any]) -> bool:
    return (
        config["model_type"] == "bert"
        and config.get("hidden_act", "gelu") == "gelu"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder", False)
        and not config.get("add_cross_attention", False)
        and config["num_hidden_layers"] > 0
        and epic["pooling"] in ("mean", "cls", "last")
        and epic["projector"] in ("linear", "scale", "mlp")
        and {"append_eos", "max_query_tokens", "max_document_tokens"} <= epic.keys()
        and isinstance(epic.get("truncate_dim"), (int, type(None)))
    )


def _weight_files(folder: Path) -> dict[Path, str]:
    """Return the files that hold the weights, and the prefix of their names in the state of `Backbone`.

    Raises:
        ValueError: If the folder has another head than `save_pretrained` writes.
    """
    shards = sorted(folder.glob("model-int8-*.safetensors")) or [folder / "model.safetensors"]
    files = {**dict.fromkeys(shards, "transformer."), folder / PROJECTOR_FILE: "projector."}
    files |= {folder / name: "query_transformer." for name in QUERY_FILES if (folder / name).is_file()}
    modules = folder / "modules.json"
    listed = json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []
    for path in (entry["path"] for entry in listed if entry["type"].endswith(".Dense")):
        settings = json.loads((folder / path / "config.json").read_text(encoding="utf-8"))
        if path != HEAD_FOLDER or not settings["activation_function"].endswith("Identity"):
            raise ValueError(f"{folder} has another head")
        files[folder / path / "model.safetensors"] = "head."
    return files


def _read_weights(folder: Path) -> dict[str, Array]:
    """Map the tensors of a checkpoint folder, named as in the state of `Backbone`."""
    return {
        prefix + name.removeprefix("linear." if prefix == "head." else ""): array
        for file, prefix in _weight_files(folder).items()
        for name, array in _map_safetensors(file).items()
    }


def _map_safetensors(file: Path) -> dict[str, Array]:
    """Map the tensors of a safetensors file, without reading them."""
    data = np.asarray(np.memmap(file, np.uint8, mode="r"))
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        # A ValueError for a file that is cut short.
        tensors[name] = data[start + first : start + last].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _expected_shapes(
    config: Mapping[str, Any], epic: Mapping[str, Any], weights: Mapping[str, Array]
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all tensors that the model must have, given which of the optional ones there are."""
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    dim = weights["head.weight"].shape[0] if "head.weight" in weights else width
    attention = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    layer: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(attention, (width, width)),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
        **dict.fromkeys(("attention.output.LayerNorm", "output.LayerNorm"), (width,)),
    }
    # Shapes of the weights; a bias has the length of a weight's first side.
    modules = {
        f"transformer.encoder.layer.{number}.{part}": shape
        for number in range(int(config["num_hidden_layers"]))
        for part, shape in layer.items()
    }
    modules["transformer.embeddings.LayerNorm"] = (width,)
    if any(name.startswith("transformer.pooler.") for name in weights):
        modules["transformer.pooler.dense"] = (width, width)
    modules |= {
        "linear": {"projector.linear": (width, dim)},
        "mlp": {"projector.mlp.0": (dim, dim), "projector.mlp.2": (width, dim)},
    }.get(epic["projector"], {})
    if "head.weight" in weights:
        modules["head"] = (dim, width)
    shapes = {f"{name}.weight": shape for name, shape in modules.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in modules.items() if name != "head" or "head.bias" in weights}
    embeddings = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    for name, size in embeddings.items():
        shapes[f"transformer.embeddings.{name}_embeddings.weight"] = (int(config[size]), width)
    if epic["projector"] != "linear":
        shapes["projector.scale"] = ()
    for name in weights:
        if name.startswith("query_transformer.") and not name.endswith(_SCALE):
            shapes[name] = shapes[name.removeprefix("query_")]
    is_int8 = {name for name, shape in shapes.items() if len(shape) > 1 and weights[name].dtype == np.int8}
    return shapes | {name + _SCALE: shapes[name][:1] for name in is_int8}


class LightTokenizer:
    """A tokenizer of the `tokenizers` library with the methods that `PromptBuilder` needs of transformers' class.

    Args:
        backend: The tokenizer.
        eos: The end-of-sequence token; None if there is none.
        pad: The padding token; None if there is none.
    """

    def __init__(self, backend: Tokenizer, eos: str | None, pad: str | None) -> None:
        self._backend = backend
        self.eos_token_id = None if eos is None else backend.token_to_id(eos)
        self.pad_token_id = None if pad is None else backend.token_to_id(pad)

    def __call__(
        self,
        text: str | list[str],
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Return `input_ids` of a text or of texts, with `truncation` cut to `max_length` at the end."""
        texts = [text] if isinstance(text, str) else text
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        ids = [each.ids[: max_length if truncation else None] for each in encoded]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def _open_tokenizer(folder: Path) -> LightTokenizer | None:
    """Open `tokenizer.json`; return None where transformers would make another tokenizer of the folder."""
    from tokenizers import Tokenizer

    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    kind = str(settings["tokenizer_class"])
    if settings.get("truncation_side", "right") != "right":
        return None
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library raises this class itself, for a missing file and for a broken one
        return None
    backend.no_truncation()
    backend.no_padding()
    if kind in ("BertTokenizer", "BertTokenizerFast"):
        # This class makes its own normalizer from these settings.
        made = backend.normalizer
        stored = (made.lowercase, made.strip_accents, made.handle_chinese_chars, made.clean_text)
        wanted = (settings.get("do_lower_case", True), settings.get("strip_accents"))
        if stored != (*wanted, settings.get("tokenize_chinese_chars", True), True):
            return None
    elif kind not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return None
    eos, pad = (
        token["content"] if isinstance(token, dict) else token
        for token in (settings.get("eos_token"), settings.get("pad_token"))
    )
    return LightTokenizer(backend, eos, pad)
