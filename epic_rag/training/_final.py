"""The result of a run: a checkpoint folder with its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag.encoder import EpicEncoder
from epic_rag.prompt import PromptBuilder
from epic_rag.training._record import public_name

if TYPE_CHECKING:
    from epic_rag.training.trainer import Trainer

__all__ = ["write_final"]


def write_final(trainer: Trainer, target: Path) -> None:
    """Write the checkpoint, float16; with LoRA merged, and the adapters beside it for PEFT.

    Args:
        trainer: At its last step, or wherever it stopped.
        target: The folder; made if it is missing.
    """
    # Not at the top: `python -m epic_rag.training.model_card` would find itself imported already.
    from epic_rag.training.model_card import held_out_figures, write_model_card

    config, prompt = trainer.config, trainer.prompt
    base = config.base_model or public_name(config.model)
    adapter = trainer.adapter
    strategy = config.query_strategy or trainer.encoder.settings.get("strategy")
    encoder = EpicEncoder(
        trainer.encoder.backbone.eval() if adapter is None else adapter.merged(),
        PromptBuilder(
            prompt.tokenizer,
            prompt.template,
            append_eos=prompt.append_eos,
            max_query_tokens=trainer.inference_lengths[0],
            max_document_tokens=trainer.inference_lengths[1],
            max_positions=prompt.max_positions,
        ),
        name=config.name,
        settings={
            "default_instruction": config.default_instruction,
            "max_demonstrations": config.max_demonstrations,
            **({} if strategy is None else {"strategy": strategy}),
            "temperature": config.temperature,
            # Widths that vectors may be cut to; no other was trained for.
            **({"matryoshka_dims": sorted(set(config.matryoshka_dims))} if config.matryoshka_dims else {}),
            "description": config.description,
            "license": config.license,
            "base_model": base,
            "training": trainer.record(),
        },
    )
    encoder.save_pretrained(target, dtype="float16")
    if adapter is not None:
        adapter.save(target / "adapter", base)
    evaluations = [entry for entry in trainer.metrics if "evaluation" in entry]
    write_model_card(target, figures=held_out_figures(evaluations[-1]) if evaluations else "")
