"""Rows to a padded batch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag.prompt import EncoderInput, collate

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)

rows_of_input = st.lists(
    st.integers(1, 12).flatmap(
        lambda size: st.builds(
            EncoderInput,
            ids=st.lists(st.integers(2, 99), min_size=size, max_size=size).map(tuple),
            slots=st.lists(st.integers(0, size - 1), unique=True, max_size=4).map(lambda slots: tuple(sorted(slots))),
            pool_start=st.integers(0, size - 1),
        )
    ),
    min_size=1,
    max_size=6,
)


@PROPERTY
@given(rows=rows_of_input, side=st.sampled_from(["left", "right"]))
def test_collate_pads_on_the_given_side_and_moves_slots_along(rows: list[EncoderInput], side: str) -> None:
    batch = collate(rows, pad_id=1, padding_side=side)  # type: ignore[arg-type]
    width = max(len(row.ids) for row in rows)
    assert batch.ids.shape == batch.mask.shape == batch.pool_mask.shape == (len(rows), width)
    at = list(zip(batch.slot_rows.tolist(), batch.slot_columns.tolist(), strict=True))
    for index, row in enumerate(rows):
        kept = batch.mask[index].bool()
        assert tuple(batch.ids[index][kept].tolist()) == row.ids
        assert set(batch.ids[index][~kept].tolist()) <= {1}
        real = kept.nonzero().flatten()
        assert (int(real[0]) == 0) if side == "right" else (int(real[-1]) == width - 1)
        assert batch.pool_mask[index][kept].tolist() == [float(n >= row.pool_start) for n in range(len(row.ids))]
        assert batch.pool_mask[index][~kept].sum() == 0
        columns = [column for line, column in at if line == index]
        assert [column - int(real[0]) for column in columns] == list(row.slots)
    assert [line for line, _ in at] == [index for index, row in enumerate(rows) for _ in row.slots]


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate([EncoderInput((1, 2), (0,))], pad_id=0).to(torch.device("meta"))
    assert all(getattr(batch, name).device.type == "meta" for name in batch.__dataclass_fields__)
