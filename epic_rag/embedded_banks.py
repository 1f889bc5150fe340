"""Embedded banks: the latest banks with an encoder's vectors, and what its reader has made of them."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from epic_rag.demonstrations import BankReader, DemonstrationBank, Selection
from epic_rag.reader import DemonstrationReader, PreparedDemonstrations

__all__ = ["EmbeddedBanks"]

Vectors = npt.NDArray[np.float32]

_CACHED_BANKS = 16


class EmbeddedBanks:
    """Cache of banks with vectors, and of prepared demonstrations, the least recently used of which are dropped."""

    def __init__(self) -> None:
        self._banks: OrderedDict[tuple[str, str], DemonstrationBank] = OrderedDict()
        # By identity of a bank's vectors, which are kept so that no other array has it.
        self._prepared: OrderedDict[
            tuple[int, int, Selection], tuple[Vectors, DemonstrationReader, PreparedDemonstrations]
        ] = OrderedDict()

    def __len__(self) -> int:
        return len(self._banks)

    def clear(self) -> None:
        """Drop everything."""
        self._banks.clear()
        self._prepared.clear()

    def get(self, bank: DemonstrationBank, encoder: BankReader) -> DemonstrationBank:
        """Return the bank with an encoder's vectors; the given bank stays unchanged."""
        if bank.encoder_fingerprint == encoder.fingerprint:
            return bank
        key = (encoder.fingerprint, bank.fingerprint)
        if key not in self._banks:
            embedded = bank.copy()
            embedded.embed(encoder)
            self._banks[key] = embedded
            while len(self._banks) > _CACHED_BANKS:
                self._banks.popitem(last=False)
        self._banks.move_to_end(key)
        return self._banks[key]

    def select(
        self,
        bank: DemonstrationBank,
        k: int,
        count: int,
        encoder: BankReader,
        *,
        selection: Selection,
        vectors: Vectors | None,
    ) -> list[DemonstrationBank]:
        """Choose demonstrations for some queries.

        Args:
            bank: The bank.
            k: Number of demonstrations.
            count: Number of queries.
            encoder: The encoder of `vectors`.
            selection: The choice.
            vectors: (count, dim) unit rows of the queries, for "nearest".

        Returns:
            `count` banks of k demonstrations; one shared object unless they are the nearest to each vector.
        """
        embedded = self.get(bank, encoder)
        if selection == "nearest" and vectors is not None:
            return [embedded.select(k, method="nearest", query_embedding=vector) for vector in vectors]
        return [embedded.select(k, method=selection)] * count

    def read(
        self, bank: DemonstrationBank, k: int, encoder: BankReader, *, selection: Selection, vectors: Vectors
    ) -> Vectors:
        """Move queries by k demonstrations of a bank, which are prepared once.

        Args:
            bank: The bank.
            k: Number of demonstrations.
            encoder: The encoder of `vectors`, whose reader is used.
            selection: Their choice.
            vectors: (queries, dim) unit rows.

        Returns:
            (queries, dim) float32 unit rows.
        """
        reader, fingerprint = encoder.reader, encoder.fingerprint
        ready = bank.prepared_for(fingerprint, reader.fingerprint) if k == len(bank) else None
        if ready is not None:
            return ready.apply(vectors)
        embedded = self.get(bank, encoder)
        stored = embedded.embeddings
        assert stored is not None
        if selection == "nearest" and k < len(embedded):
            chosen = self.select(bank, k, len(vectors), encoder, selection=selection, vectors=vectors)
            moved = [
                reader.prepare(each.embeddings_for(fingerprint)).apply(vectors[row : row + 1])
                for row, each in enumerate(chosen)
            ]
            return np.concatenate(moved)
        key = (id(stored), k, selection)
        known = self._prepared.get(key)
        if known is None or known[0] is not stored or known[1] is not reader:
            used = embedded if k == len(embedded) else embedded.select(k, method=selection)
            known = (stored, reader, reader.prepare(used.embeddings_for(fingerprint)))
            self._prepared[key] = known
            while len(self._prepared) > _CACHED_BANKS:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return known[2].apply(vectors)
