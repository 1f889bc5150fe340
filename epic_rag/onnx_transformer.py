"""ONNX transformer: a module of sentence-transformers that runs an ONNX file by ONNX Runtime.

The library's own ONNX backend needs optimum, which exports models as well. Running a file that exists takes a session,
the folder's tokenizer, and the names of inputs and outputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules.input_module import InputModule
from transformers import AutoTokenizer

from epic_rag.errors import CheckpointError, MissingExtraError

__all__ = ["OnnxTransformer"]

_USUAL = ("onnx/model.onnx", "model.onnx")
_DEFAULT_MAX_TOKENS = 512


class OnnxTransformer(InputModule):
    """Token embeddings by ONNX Runtime on the CPU.

    Args:
        session: An `onnxruntime.InferenceSession`.
        tokenizer: The folder's tokenizer.
        max_seq_length: Longest text in tokens.
        do_lower_case: Whether texts are lower-cased first.
    """

    tokenizer: Any

    def __init__(self, session: Any, tokenizer: Any, max_seq_length: int, do_lower_case: bool = False) -> None:
        torch.nn.Module.__init__(self)
        self.session = session
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.do_lower_case = do_lower_case
        self._inputs = {item.name for item in session.get_inputs()}
        outputs = {item.name: item for item in session.get_outputs()}
        # A file may name its output otherwise; token embeddings are the one with three axes.
        name = "last_hidden_state" if "last_hidden_state" in outputs else "token_embeddings"
        if name not in outputs:
            name = next((key for key, item in outputs.items() if len(item.shape) == 3), "")
        if not name:
            raise CheckpointError(
                f"The ONNX file has outputs {', '.join(outputs)}, none of them a vector a token. Use another file."
            )
        self._output = name
        self._dimension = int(outputs[name].shape[-1])

    @classmethod
    def open(cls, folder: Path, file: str | None = None) -> OnnxTransformer:
        """Open a folder's ONNX file.

        Args:
            folder: Holds the file and a tokenizer.
            file: The file, relative to the folder; None for `onnx/model.onnx`, `model.onnx`, or the only one.

        Raises:
            CheckpointError: If there is no such file, or several and none is named.
            MissingExtraError: If ONNX Runtime is not installed.
        """
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "onnx", "running ONNX files") from error
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx"))
        chosen = file or next((name for name in _USUAL if name in found), found[0] if len(found) == 1 else None)
        if chosen is None or not (folder / chosen).is_file():
            listed = f"It has {', '.join(found)}" if found else "It has none"
            raise CheckpointError(f"{folder} has no ONNX file {chosen or 'model.onnx'}. {listed}; name one after @.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(folder / chosen), options, providers=["CPUExecutionProvider"])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        try:
            limits = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            limits = {}
        longest = limits.get("max_seq_length") or min(_DEFAULT_MAX_TOKENS, int(tokenizer.model_max_length))
        return cls(session, tokenizer, int(longest), bool(limits.get("do_lower_case")))

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Tokenise texts behind a prompt, padded to the longest; (n, tokens) arrays."""
        texts = [f"{prompt or ''}{text}" for text in inputs]
        if self.do_lower_case:
            texts = [text.lower() for text in texts]
        found = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt", verbose=False
        )
        features = dict(found)
        if prompt:
            bare = self.tokenizer(prompt, add_special_tokens=True)["input_ids"]
            # Without the end token: pooling that leaves out the prompt counts from the first token.
            features["prompt_length"] = len(bare) - 1
        return features

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add (n, tokens, dimension) token embeddings."""
        given = {name: value.numpy() for name, value in features.items() if name in self._inputs}
        if "token_type_ids" in self._inputs and "token_type_ids" not in given:
            given["token_type_ids"] = torch.zeros_like(features["input_ids"]).numpy()
        if "position_ids" in self._inputs:
            given["position_ids"] = (features["attention_mask"].cumsum(1) - 1).clamp(min=0).numpy()
        [states] = self.session.run([self._output], given)
        return {**features, "token_embeddings": torch.from_numpy(states).float()}

    def get_embedding_dimension(self) -> int:
        """Return the width of a token's embedding."""
        return self._dimension

    def save(self, *_: Any, **__: Any) -> None:
        """Refuse: an ONNX file is not written again."""
        raise CheckpointError("An ONNX model cannot be saved again. Copy its folder.")
