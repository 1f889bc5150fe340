from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag_ray import Cluster, EpicBatchEncoder, VectorInfo, embedding_vectors
from tests.helpers.free_encoder import free_encoder

# Ray reads its own deprecated settings.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning")
TEXTS = ["undo the last commit", "", "the quick brown fox " * 30, "undo the last commit", "install it"]


def test_a_table_gets_vectors_and_keeps_its_columns(tiny_checkpoint: Path, tiny_encoder: EpicEncoder) -> None:
    table = pa.table({"id": [1, 2, 3, 4, 5], "text": TEXTS, "tags": [["a"], [], None, ["b"], ["c"]]})
    out = EpicBatchEncoder(str(tiny_checkpoint))(table)
    assert out.column_names == ["id", "text", "tags", "embedding"]
    assert out.select(table.column_names).equals(table)
    assert out.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    np.testing.assert_allclose(embedding_vectors(out), tiny_encoder.encode_document(TEXTS), atol=1e-6)
    info = VectorInfo.of(out.schema)
    assert (info.fingerprint, info.dimension, info.role) == (tiny_encoder.fingerprint, 32, "document")


def test_vectors_of_queries_use_the_bank(tiny_checkpoint: Path, tiny_encoder: EpicEncoder) -> None:
    bank = DemonstrationBank([("how to undo", "reset softly"), ("how to install", "use pip")])
    prompt = {"bank": bank, "strategy": "task-vector"}
    out = EpicBatchEncoder(
        str(tiny_checkpoint), role="query", column="q", output="v", vectors="float16", prompt=prompt
    )(pa.table({"q": TEXTS}))
    assert out.schema.field("v").type == pa.list_(pa.float16(), 32)
    expected = tiny_encoder.encode_query(TEXTS, bank=bank, strategy="task-vector")
    np.testing.assert_allclose(embedding_vectors(out, "v"), expected, atol=2e-3)
    assert VectorInfo.of(out.schema).role == "query"


def test_a_null_or_a_vector_that_is_not_finite_is_a_null() -> None:
    encoder = EpicBatchEncoder(lambda: free_encoder(broken="fox"))
    out = encoder(pa.table({"text": pa.array(["a", None, "the fox", "b"])}))
    assert out["embedding"].is_valid().to_pylist() == [True, False, False, True]
    assert out["text"].to_pylist() == ["a", None, "the fox", "b"]


def test_a_text_is_embedded_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    EpicBatchEncoder(lambda: free_encoder(str(log)))(pa.table({"text": ["a", "b", "a", "a"]}))
    assert log.read_text().split()[1::2] == ["2"]


def test_an_empty_table_and_a_vector_column_that_exists() -> None:
    encoder = EpicBatchEncoder(free_encoder)
    empty = encoder(pa.table({"text": pa.array([], pa.string())}))
    assert empty.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    again = encoder(encoder(pa.table({"text": ["a"]})))
    assert again.column_names == ["text", "embedding"]


@pytest.mark.parametrize(
    "arguments", [{"role": "passage"}, {"vectors": "int8"}, {"prompt": {"bank": "docs"}}, {"batch_tokens": 0}]
)
def test_arguments_that_cannot_work(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        EpicBatchEncoder(free_encoder, **arguments)  # type: ignore[arg-type]


def test_a_column_that_is_missing() -> None:
    with pytest.raises(ConfigError, match="no column 'text', but body"):
        EpicBatchEncoder(free_encoder)(pa.table({"body": ["a"]}))


def test_an_actor_of_ray_writes_the_same_vectors(
    ray_cluster: Cluster, tiny_checkpoint: Path, tiny_encoder: EpicEncoder, tmp_path: Path
) -> None:
    import ray.data

    texts = [f"{TEXTS[number % 5]} {number}" for number in range(60)]
    dataset = ray.data.from_arrow(pa.table({"id": range(60), "text": texts})).repartition(4)
    dataset.map_batches(
        EpicBatchEncoder,
        fn_constructor_kwargs={"model": str(tiny_checkpoint), "vectors": "float16"},
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=20,
        batch_format="pyarrow",
        num_cpus=1,
        udf_modifying_row_count=False,
    ).write_parquet(str(tmp_path / "vectors"))
    files = sorted((tmp_path / "vectors").glob("*.parquet"))
    assert {VectorInfo.of(pq.read_schema(file)).fingerprint for file in files} == {tiny_encoder.fingerprint}
    table = pa.concat_tables([pq.read_table(file) for file in files]).sort_by("id")
    assert table["text"].to_pylist() == texts
    np.testing.assert_allclose(embedding_vectors(table), tiny_encoder.encode_document(texts), atol=2e-3)
