"""`EpicEmbedding` on several devices."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from llama_index.embeddings.epic import EpicEmbedding


def test_several_devices_are_a_field_like_another(tiny_checkpoint: Path) -> None:
    model = str(tiny_checkpoint)
    embedding = EpicEmbedding.from_dict({"model": model, "device": ["cpu", torch.device("cpu")]})
    assert embedding.device == "cpu,cpu"
    again = pickle.loads(pickle.dumps(embedding))
    wrapped = EpicEmbedding.from_encoder(embedding.encoder)
    for other in (embedding, again, wrapped, EpicEmbedding.from_dict(embedding.to_dict())):
        assert (other.device, len(other.encoder.devices)) == ("cpu,cpu", 2)
        assert other.fingerprint == EpicEmbedding(model=model, device="cpu").fingerprint
        assert len(other.get_text_embedding("text")) == 32
