"""A frozen encoder that the student imitates."""

from __future__ import annotations

import torch

from epic_rag._kernels import multiplies_bfloat16
from epic_rag.encoder import EpicEncoder
from epic_rag.training._forward import Forward
from epic_rag.training._inputs import zero_shot_rows
from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import TrainingBatch
from epic_rag.training.distributed import World

__all__ = ["Teacher"]


class Teacher:
    """Embeds a batch's texts as the teacher reads them: its own tokenizer, prompt and pooling.

    Queries get their task's instruction if the teacher was trained with instructions, that is, if its checkpoint has a
    training record; any other model would only be confused by one.

    Args:
        config: Names the teacher and the longest texts.
        device: Where it runs.

    Raises:
        CheckpointError: If there is no such encoder.
    """

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self.encoder = EpicEncoder.from_pretrained(
            config.teacher,
            device=str(device),
            dtype=_dtype(config.dtype, device),
            max_query_tokens=config.max_query_tokens,
            max_document_tokens=config.max_document_tokens,
        )
        self.encoder.backbone.requires_grad_(False)
        self.instructions = bool(self.encoder.settings.get("training"))
        self._forward = Forward(
            self.encoder.backbone, pad_id=self.encoder.prompt.pad_id, max_tokens=config.micro_batch_tokens
        )

    def __call__(self, batch: TrainingBatch, world: World) -> torch.Tensor:
        """(pairs + documents, width) unit vectors: queries, positives, hard negatives."""
        queries, documents = zero_shot_rows(batch, self.encoder.prompt, instructions=self.instructions)
        rows = [*queries, *documents]
        out = torch.zeros((len(rows), self.encoder.backbone.dimension), device=self.encoder.device)
        # inference_mode would give tensors that no loss can keep; no_grad costs the same here.
        with torch.no_grad():
            for chunk in self._forward.chunks(rows, world.share([len(row.ids) for row in rows])):
                out[torch.tensor(chunk).to(out.device)] = self._forward.chunk(rows, chunk)
        return world.gathered(out)


def _dtype(dtype: str, device: torch.device) -> str:
    """The run's own, unless a CPU would be slow in it."""
    fast = device.type != "cpu" or (dtype == "bfloat16" and multiplies_bfloat16())
    return dtype if fast else "float32"
