"""Training with EPIC: configuration, data, losses, trainer."""

from __future__ import annotations

from epic_rag.errors import needs_extra

with needs_extra("train", "training"):
    from epic_rag.training.checkpointing import latest_checkpoint
    from epic_rag.training.config import TaskConfig, TrainingConfig, list_recipes, load_recipe
    from epic_rag.training.data import PairDataset, TrainingBatch, load_pairs
    from epic_rag.training.losses import info_nce
    from epic_rag.training.mining import MiningOptions, mine_file, mine_negatives
    from epic_rag.training.trainer import Trainer

__all__ = [
    "MiningOptions",
    "PairDataset",
    "TaskConfig",
    "Trainer",
    "TrainingBatch",
    "TrainingConfig",
    "info_nce",
    "latest_checkpoint",
    "list_recipes",
    "load_pairs",
    "load_recipe",
    "mine_file",
    "mine_negatives",
]
