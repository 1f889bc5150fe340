"""What turns an embedding into one input position: the slot of EPIC (arXiv 2605.01372, section 3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from epic_rag.errors import ConfigError

__all__ = ["PROJECTORS", "Projector", "ProjectorKind"]

ProjectorKind = Literal["scale", "linear", "mlp"]
PROJECTORS: tuple[ProjectorKind, ...] = ("scale", "linear", "mlp")


class Projector(nn.Module):
    """Maps an embedding to the input space of the transformer.

    Every kind starts as the identity times the mean norm of the token embeddings, so that a slot looks like a token
    of ordinary length before any training (a unit vector is some 10 to 100 times too short or too long).

    Args:
        kind: "scale" (one learned number), "linear" (a full matrix), or "mlp" (the scaled vector plus a two-layer
            perceptron that starts at zero).
        dimension: Width of embeddings.
        norm: Mean norm of the token embeddings.
        width: Width of the transformer's input; None if it is the same. Where embeddings are narrower, the identity
            leaves the rest of the input zero; where they are wider, it drops their last numbers.
    """

    def __init__(self, kind: ProjectorKind, dimension: int, norm: float, *, width: int | None = None) -> None:
        super().__init__()
        if kind not in PROJECTORS:
            raise ConfigError(f"projector is {kind!r}, known are {', '.join(PROJECTORS)}; choose one of them")
        self.kind = kind
        self.width = dimension if width is None else width
        if kind == "linear":
            self.linear = nn.Linear(dimension, self.width)
            with torch.no_grad():
                self.linear.weight.copy_(norm * torch.eye(self.width, dimension))
                self.linear.bias.zero_()
        else:
            self.scale = nn.Parameter(torch.tensor(float(norm)))
        if kind == "mlp":
            self.mlp = nn.Sequential(nn.Linear(dimension, dimension), nn.GELU(), nn.Linear(dimension, self.width))
            with torch.no_grad():
                # Seeded: an untrained projector is part of the fingerprint, which must not change from load to load.
                generator = torch.Generator().manual_seed(0)
                bound = dimension**-0.5
                for parameter in self.mlp[0].parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
                for parameter in self.mlp[2].parameters():
                    parameter.zero_()

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """(slots, dim) unit vectors -> (slots, width) input embeddings."""
        if self.kind == "linear":
            return self.linear(vectors)  # type: ignore[no-any-return]
        scaled: torch.Tensor = self.scale * nn.functional.pad(vectors, (0, self.width - vectors.shape[1]))
        return scaled + self.mlp(vectors) * self.scale if self.kind == "mlp" else scaled
