"""`EpicBatchEncoder`: batches of rows in, the same rows with vectors out, for `ray.data.Dataset.map_batches`.

Ray's batch is a number of rows; the encoder packs it by tokens into batches of the model, so a Ray batch of some
thousand rows wastes little on padding. An actor uses as many threads as Ray has given it CPUs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from epic_rag.embedding_model import join_unique
from epic_rag.errors import ConfigError
from epic_rag_ray.parts import VECTOR_COLUMN, VectorDtype, VectorInfo, embedding_column

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = ["EpicBatchEncoder", "assigned_threads", "load_encoder", "use_threads"]


class EpicBatchEncoder:
    """Adds a column of vectors to tables; one model an actor.

    Args:
        model: A name, folder or address as `EpicEncoder.from_pretrained` takes it (also `openai:...`, `onnx:...`), or a
            function without arguments that returns an encoder. None loads the shipped default.
        role: "document" or "query".
        column: The column of texts. A null has a null as its vector, as has a text for which the model returns a vector
            that is not finite.
        output: The column of vectors; a column of that name is replaced.
        vectors: Number format of the vectors.
        prompt: Fields of `QueryPrompt` for queries: bank, task, instruction, num_demonstrations, strategy, selection.
        dtype: Number format that the model computes in; see `EpicEncoder.from_pretrained`.
        device: Its device; None takes the GPU that Ray assigns, or the CPU.
        batch_tokens: Most padded tokens in a batch of the model; None for what suits the device.
        truncate_dim: Keep the first N dimensions.
        threads: Threads of the model; None for the CPUs that Ray assigns, and no change without Ray.

    Raises:
        ConfigError: If an argument cannot work.
        CheckpointError: If the model does not load.

    Example:
        >>> dataset = ray.data.read_parquet("s3://corpus/")
        >>> dataset.map_batches(
        ...     EpicBatchEncoder,
        ...     fn_constructor_kwargs={"model": "epic-minilm", "vectors": "float16"},
        ...     compute=ray.data.ActorPoolStrategy(min_size=1, max_size=8),
        ...     batch_size=4096, batch_format="pyarrow", num_gpus=1, udf_modifying_row_count=False,
        ... ).write_parquet("s3://vectors/")
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Callable[[], EpicEncoder] | None = None,
        *,
        role: Literal["document", "query"] = "document",
        column: str = "text",
        output: str = VECTOR_COLUMN,
        vectors: VectorDtype = "float32",
        prompt: dict[str, Any] | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_tokens: int | None = None,
        truncate_dim: int | None = None,
        threads: int | None = None,
    ) -> None:
        if role not in ("document", "query"):
            raise ConfigError(f"role is {role!r}. Use 'document' or 'query'.")
        if vectors not in ("float32", "float16"):
            raise ConfigError(f"vectors is {vectors!r}. Use 'float32' or 'float16'.")
        if prompt and role == "document":
            raise ConfigError("Documents are embedded without a prompt. Leave prompt out, or use role='query'.")
        use_threads(assigned_threads() if threads is None else threads)
        self.encoder = load_encoder(model, dtype=dtype, device=device, truncate_dim=truncate_dim)
        if self.encoder.external is None:
            # Loaded in any case: a handful of texts would be embedded without torch, with vectors that differ
            # in their last bits, and a part must not depend on what its actor did before.
            _ = self.encoder.backbone
        if batch_tokens is not None:
            if batch_tokens < 1:
                raise ConfigError(f"batch_tokens is {batch_tokens}. Use 1 or more.")
            self.encoder.max_batch_tokens = batch_tokens
        self.info = VectorInfo(
            # The vectors of queries and documents are compared, so both carry the same fingerprint.
            fingerprint=self.encoder.fingerprint,
            model=self.encoder.name,
            source=self.encoder.source,
            dimension=self.encoder.dimension,
            dtype=vectors,
            role=role,
            truncate_dim=self.encoder.truncate_dim,
        )
        self._column = column
        self._output = output
        self._prompt = dict(prompt or {})

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with vectors; its schema's metadata names the model (`VectorInfo.of`).

        Raises:
            ConfigError: If it has no such column.
        """
        if self._column not in table.column_names:
            names = ", ".join(table.column_names)
            raise ConfigError(f"The table has no column {self._column!r}, but {names}. Pass column=.")
        texts = table[self._column]
        known = np.flatnonzero(texts.is_valid().to_numpy())
        vectors = np.zeros((len(texts), self.info.dimension), np.float32)
        if len(known):
            vectors[known] = self.embed([str(text) for text in texts.take(pa.array(known)).to_pylist()])
        finite: npt.NDArray[np.bool_] = np.isfinite(vectors).all(axis=1, keepdims=False).reshape(-1)
        finite[~texts.is_valid().to_numpy()] = False
        column = embedding_column(np.where(finite[:, None], vectors, 0), self.info.dtype)
        if not finite.all():
            column = pc.if_else(pa.array(finite), column, pa.nulls(len(finite), column.type))
        if self._output in table.column_names:
            table = table.drop_columns([self._output])
        table = table.append_column(self._output, column)
        return table.replace_schema_metadata(self.info.add_to(table.schema).metadata)

    def embed(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Return the vectors (n, dimension) of texts; a text that occurs several times is embedded once."""
        unique, places = join_unique(texts)
        if self.info.role == "query":
            vectors = self.encoder.encode_query(unique, **self._prompt)
        else:
            vectors = self.encoder.encode_document(unique)
        return vectors if len(unique) == len(texts) else vectors[places]


def load_encoder(
    model: str | os.PathLike[str] | Callable[[], EpicEncoder] | None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    truncate_dim: int | None = None,
) -> EpicEncoder:
    """Load an encoder by name, or call the function that loads it.

    Raises:
        CheckpointError: If it does not load.
        ConfigError: If a function is given together with settings of a model.
    """
    if callable(model):
        if truncate_dim is not None:
            raise ConfigError("truncate_dim is an option of models that are loaded by name. Set it in the function.")
        return model()
    from epic_rag import EpicEncoder

    return EpicEncoder.from_pretrained(model, dtype=dtype, device=device, truncate_dim=truncate_dim)


def assigned_threads() -> int | None:
    """Return the number of CPUs that Ray has assigned to this actor, at least 1; None outside of Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None
    return max(1, int(context.get_assigned_resources().get("CPU", 1)))


def use_threads(threads: int | None) -> None:
    """Limit the threads of the libraries that compute in this process; None changes nothing.

    Every actor of a machine would otherwise use all of its cores. Libraries that are not imported yet read the
    environment variables.
    """
    if threads is None:
        return
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[variable] = str(threads)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
