from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epic_rag.errors import DataError
from epic_rag_ray.parts import embedding_column, embedding_vectors
from epic_rag_ray.storage import Storage

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])


def table(first: int, end: int) -> pa.Table:
    return pa.table({"n": range(first, end), "text": [str(n) for n in range(first, end)]}, schema=SCHEMA)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), data=st.data())
def test_some_rows_in_their_order(sizes: list[int], data: st.DataObject, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    edges = [0, *np.cumsum(sizes).tolist()]
    storage.write_tables("a/b.parquet", [table(first, end) for first, end in itertools.pairwise(edges)], SCHEMA)
    total = edges[-1]
    rows = data.draw(st.lists(st.integers(0, total - 1), max_size=8)) if total else []
    found = storage.read_rows("a/b.parquet", np.array(rows, np.int32), ["text", "n"])
    assert found.column_names == ["text", "n"]
    assert found["n"].to_pylist() == rows
    assert found["text"].to_pylist() == [str(row) for row in rows]


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    storage = Storage(tmp_path)

    def tables() -> object:
        yield table(0, 3)
        assert storage.list("parts") == []
        assert not storage.exists("parts/x.parquet")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        storage.write_tables("parts/x.parquet", tables(), SCHEMA)  # type: ignore[arg-type]
    assert list((tmp_path / "parts").iterdir()) == []
    storage.write_bytes("parts/x.parquet", b"whole")
    assert storage.list("parts", ".parquet") == ["parts/x.parquet"]
    with pytest.raises(DataError, match="not a readable Parquet file"):
        storage.read_table("parts/x.parquet")


def test_a_folder_can_be_sent_to_actors(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "new")
    again = pickle.loads(pickle.dumps(storage))
    assert again.address == storage.address
    assert again.list("parts") == []
    storage.delete("missing")


def test_vectors_of_slices_and_chunks() -> None:
    vectors = np.arange(24, dtype=np.float32).reshape(8, 3)
    column = pa.chunked_array([embedding_column(vectors[:5], "float32"), embedding_column(vectors[5:], "float32")])
    whole = pa.table({"embedding": column})
    np.testing.assert_array_equal(embedding_vectors(whole), vectors)
    np.testing.assert_array_equal(embedding_vectors(whole.slice(2, 4)), vectors[2:6])
    np.testing.assert_array_equal(embedding_vectors(whole.slice(0, 0)), vectors[:0])


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"rows": 1}', "\x00"])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(DataError, match=r"settings\.json is damaged .* Restore it from a copy"):
        Storage(tmp_path).read_json("settings.json", "vectors")
