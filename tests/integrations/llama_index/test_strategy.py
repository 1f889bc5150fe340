"""How demonstrations reach a query of `EpicEmbedding`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from epic_rag import DemonstrationBank
from epic_rag.task_vector import QUERY_STRATEGIES
from llama_index.embeddings.epic import EpicEmbedding


def test_the_strategy_reaches_the_encoder(tiny_checkpoint: Path) -> None:
    embedding = EpicEmbedding(model=str(tiny_checkpoint))
    bank = DemonstrationBank([("a cat", "Cats sleep."), ("a dog", "Dogs bark.")], instruction="Find it")
    for strategy in QUERY_STRATEGIES:
        shown = embedding.with_bank(bank, strategy=strategy)
        expected = embedding.encoder.encode_query("a fox", bank=bank, strategy=strategy)
        assert np.allclose(shown.get_query_embedding("a fox"), expected, atol=1e-6)
        again = EpicEmbedding.from_dict(shown.to_dict())
        assert (again.strategy, again.fingerprint) == (strategy, shown.fingerprint)
        assert shown.document_fingerprint == embedding.document_fingerprint
        assert shown.for_documents().strategy is None
        assert shown.with_bank(bank).strategy is None
    wrapped = EpicEmbedding.from_encoder(embedding.encoder, bank=bank, strategy="none")
    assert wrapped.strategy == "none"
