"""Train EPIC's prompt in four ways at equal cost, and compare what eight demonstrations bring.

    python benchmarks/prompt_arms.py --data DIR --heldout FILE [--heldout FILE ...] [--model NAME] [--steps 80]
                                     [--output DIR] [--arms random,nearest,warm,warm-nearest]

Arms: demonstrations of a training row are drawn at random from its batch, or are the nearest ones to it by zero-shot
cosine (Retrieval-Augmented Retrieval, arXiv 2410.20088); before the contrast the projector is warmed up for a quarter
of the steps, all else frozen, or it is not: a prompt of one demonstration and no text has to find this demonstration's
passage among those of the batch (the reconstruction of xRAG, arXiv 2405.13792, for an encoder). Documents keep their
weights in all arms. Each arm is scored on files that no step has seen, by k demonstrations of a pool of 200, drawn at
random or nearest to the query.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from bench_common import run_main, split_names
from pair_tasks import COLLECTIONS, embed_tasks, gains_over, mean_scores, pair_tasks

from epic_rag import DemonstrationBank, EpicEncoder, QueryPrompt
from epic_rag.demonstrations import Selection
from epic_rag.evaluation.heldout import Collection
from epic_rag.evaluation.report import markdown_table
from epic_rag.training import Trainer, TrainingBatch, load_recipe
from epic_rag.training.inputs import SlotTable
from epic_rag.training.losses import info_nce
from epic_rag.training.sampling import allowed_demonstrations, sample_batch

ARMS = {"random": (False, False), "nearest": (True, False), "warm": (False, True), "warm-nearest": (True, True)}
"""Nearest demonstrations, and a projector that is warmed up, by arm."""
SETTINGS = (
    "tasks={docs_questions: {max_rows: 3000, sources_per_batch: 2}, docs_sections: {max_rows: 4000, "
    "sources_per_batch: 2}, medquad: {max_rows: 2000}, squad_sentence: {max_rows: 3000}, tldr_pages: {max_rows: 2000}, "
    "wikitablequestions: {max_rows: 2000}}",
    "batch_size=64",
    "document_negatives=1000",
    "zero_shot_steps=0",
    "ema_decay=0",
    "interpolate_with_start=0",
    "evaluation_tasks=[]",
    "query_strategy=epic",
    "save_every=100000",
)
POOL = 200
SELECTIONS: tuple[Selection, ...] = ("random", "nearest")


class ArmTrainer:
    """Steps of one arm.

    Args:
        trainer: A trainer with frozen documents.
        steps: Steps in all, of the warm-up and of the contrast.
        nearest: Whether demonstrations are the nearest ones of the batch.
        warm: Whether the first quarter of the steps warms the projector up.
    """

    def __init__(self, trainer: Trainer, steps: int, *, nearest: bool, warm: bool) -> None:
        self.trainer, self.steps, self.nearest, self.warm = trainer, steps, nearest, warm
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}

    def run(self) -> Path:
        """Train and return the folder of the result."""
        trainer = self.trainer
        assert trainer.documents is not None
        trainer.documents.embed(show_progress=True)
        if self.nearest:
            texts = list({row.query for dataset in trainer.datasets for row in dataset.rows})
            self._vectors = dict(zip(texts, trainer.encoder.encode_query(texts), strict=True))
        if self.warm:
            self.warm_up(self.steps // 4)
        for step in range(self.steps // 4 if self.warm else 0, self.steps):
            batch = sample_batch(trainer.datasets, trainer.config, step)
            result = trainer.train_step(self.with_nearest(batch) if self.nearest else batch)
            trainer.step = step + 1
            if trainer.step % 20 == 0:
                print(f"note: step {trainer.step}: loss {result.loss:.3f}", file=sys.stderr, flush=True)
        return trainer.finish()

    def with_nearest(self, batch: TrainingBatch) -> TrainingBatch:
        """Replace the demonstrations of each row by as many nearest ones, the nearest last."""
        tasks = []
        for task in batch.tasks:
            vectors = np.stack([self._vectors[row.query] for row in task.rows])
            cosines = vectors @ vectors.T
            chosen = []
            for index, shown in enumerate(task.demonstrations):
                allowed = allowed_demonstrations(task.rows, index, False)
                order = sorted(allowed, key=lambda other: cosines[index, other])
                chosen.append(tuple(order[len(order) - min(len(shown), len(order)) :]))
            tasks.append(replace(task, demonstrations=tuple(chosen)))
        return TrainingBatch(tuple(tasks))

    def warm_up(self, steps: int) -> None:
        """Train the projector alone to say which passage its slots hold."""
        trainer = self.trainer
        backbone = trainer.encoder.backbone.train()
        projector = [value for name, value in backbone.named_parameters() if name.startswith("projector.")]
        optimizer = torch.optim.AdamW(projector, lr=trainer.config.projector_learning_rate)
        for step in range(steps):
            batch = sample_batch(trainer.datasets, trainer.config, step)
            _, inputs = trainer.prepare(batch)
            assert inputs.document_vectors is not None
            with torch.no_grad():
                vectors = torch.cat([trainer.forward(inputs.queries), inputs.document_vectors])
            prefix = trainer.prompt.prefix(None, num_slots=1)
            rows = [row for _ in range(inputs.pairs) for row in trainer.prompt.queries(prefix, [""])]
            shown = [[index, inputs.pairs + index] for index in range(inputs.pairs)]
            found = trainer.forward(rows, SlotTable(vectors, shown))
            loss = info_nce(found, inputs.document_vectors[: inputs.pairs], temperature=trainer.config.temperature)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            if (step + 1) % 20 == 0:
                print(f"note: warm-up step {step + 1}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
        trainer.encoder.invalidate_caches()


def score(encoder: EpicEncoder, heldout: Sequence[str], k: int, draws: int) -> dict[Collection, list[float]]:
    """Return the mean nDCG@10 over tasks without demonstrations, and what random and nearest ones in the prompt add.

    Args:
        encoder: The model.
        heldout: Files of pairs.
        k: Number of demonstrations.
        draws: Number of pools that they are taken from.
    """
    vectors, families = embed_tasks(pair_tasks(heldout, encoder, queries=200, documents=2000, sizes=[POOL]), encoder)
    gains: dict[Collection, dict[Selection, list[float]]] = {
        name: {each: [] for each in SELECTIONS} for name in COLLECTIONS
    }
    for task, own in zip(vectors, families, strict=True):
        for draw in range(draws):
            pool = [(task.split.pool[row].query, task.split.pool[row].passage) for row in task.draw(POOL, draw)]
            bank = DemonstrationBank(pool, instruction=task.split.instruction or "")
            for selection in SELECTIONS:
                prompt = QueryPrompt(bank=bank, num_demonstrations=k, strategy="epic", selection=selection)
                for name, gain in gains_over(own, encoder.encode_query(task.split.queries, prompt)).items():
                    gains[name][selection].append(gain)
    zero = [mean_scores(own) for own in families]
    return {
        name: [float(np.mean([each[name] for each in zero])), *(float(np.mean(each)) for each in gains[name].values())]
        for name in COLLECTIONS
    }


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="benchmarks/prompt_arms.py", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--data", required=True, metavar="DIR", help="folder of the training files")
    options.add_argument("--heldout", action="append", required=True, metavar="FILE", help="a file of pairs to score")
    options.add_argument("--model", default="epic-minilm", metavar="MODEL")
    options.add_argument("--steps", type=int, default=80, metavar="N", help="of each arm, its warm-up among them")
    options.add_argument("--k", type=int, default=8, metavar="K", help="demonstrations that are scored")
    options.add_argument("--draws", type=int, default=2, metavar="N")
    options.add_argument("--arms", default=",".join(ARMS), metavar="NAME,...")
    options.add_argument("--output", default="runs/prompt-arms", metavar="DIR", help="of vectors and the last arm")
    options.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the training")
    return options


def measure(given: argparse.Namespace) -> int:
    start = EpicEncoder.from_pretrained(given.model, device="cpu", dtype="auto")
    found = {"before": score(start, given.heldout, given.k, given.draws)}
    for arm in split_names(given.arms, list(ARMS)):
        nearest, warm = ARMS[arm]
        started = time.monotonic()
        settings = [*SETTINGS, f"data={given.data}", f"model={given.model}", f"steps={given.steps}", *given.set]
        trainer = Trainer(load_recipe("minilm-queries", settings, output=given.output))
        final = ArmTrainer(trainer, given.steps, nearest=nearest, warm=warm).run()
        print(f"note: {arm}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        encoder = EpicEncoder.from_pretrained(final, device="cpu", dtype="auto")
        found[arm] = score(encoder, given.heldout, given.k, given.draws)
    header = ["arm", "collection", "k = 0", f"{given.k} random", f"{given.k} nearest"]
    rows = [
        [arm, COLLECTIONS[name], f"{zero:.2f}", *(f"{gain:+.2f}" for gain in gains)]
        for arm, scores in found.items()
        for name, (zero, *gains) in scores.items()
    ]
    print(markdown_table(header, rows, text_columns=2))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
