"""The losses against values computed by hand, and their weighted sum."""

from __future__ import annotations

import doctest
import json
import math
from collections.abc import Callable

import pytest
import torch

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.training import Trainer, TrainingConfig, info_nce, losses
from epic_rag.training.losses import cosine_distillation, margin_mask, matryoshka_info_nce, vector_distillation
from epic_rag.training.sampling import sample_batch

Config = Callable[..., TrainingConfig]

QUERIES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
# Two positives and a hard negative.
DOCUMENTS = torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]])
UNIT = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
OTHER = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), dim=-1)


def by_hand(scores: list[list[float]], temperature: float) -> float:
    """Mean of -log softmax; the positive of row i is its first score."""
    return sum(
        -row[0] / temperature + math.log(sum(math.exp(score / temperature) for score in row)) for row in scores
    ) / len(scores)


def test_docstring_examples() -> None:
    results = doctest.testmod(losses)
    assert (results.failed, results.attempted > 8) == (0, True)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.05])
def test_info_nce_by_hand(temperature: float) -> None:
    loss = info_nce(QUERIES, DOCUMENTS, temperature=temperature)
    expected = by_hand([[0.6, 0.8, 1.0], [0.6, 0.8, 0.0]], temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_masked_documents_do_not_count() -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])  # the positives' entries are ignored
    loss = info_nce(QUERIES, DOCUMENTS, temperature=0.5, mask=mask)
    assert float(loss) == pytest.approx(by_hand([[0.6, 0.8], [0.6, 0.0]], 0.5), rel=1e-5)
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert float(info_nce(QUERIES, DOCUMENTS, temperature=0.5, mask=everything)) == 0.0
    assert everything.all(), "the caller's mask was changed"


def test_finite_gradients_under_a_full_mask() -> None:
    queries = QUERIES.clone().requires_grad_()
    info_nce(queries, DOCUMENTS, temperature=0.05, mask=torch.ones(2, 3, dtype=torch.bool)).backward()
    assert torch.isfinite(queries.grad).all()


def test_matryoshka_is_the_mean_over_renormalised_prefixes() -> None:
    parts = [info_nce(UNIT, OTHER, temperature=0.1)]
    for width in (2, 5):
        left, right = (side[:, :width] / side[:, :width].norm(dim=1, keepdim=True) for side in (UNIT, OTHER))
        parts.append(info_nce(left, right, temperature=0.1))
    for widths in ([2, 5], [5, 2, 8, 2]):
        found = matryoshka_info_nce(UNIT, OTHER, widths=widths, temperature=0.1)
        torch.testing.assert_close(found, sum(parts) / 3)


def test_cosine_distillation_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]], requires_grad=True)
    loss = cosine_distillation(student, teacher)
    assert float(loss.detach()) == pytest.approx(2 * 0.6**2 / 4)
    loss.backward()
    assert teacher.grad is None
    assert float(student.grad.abs().max()) > 0


def test_vector_distillation_trains_the_student() -> None:
    student = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    student, teacher = student.requires_grad_(), torch.eye(4)[:3].requires_grad_()
    vector_distillation(student, teacher).backward()
    torch.testing.assert_close(student.grad, -torch.eye(4)[:3] / 3)
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (0.0, [[2], [0]]),
        (0.05, [[1, 2], [0]]),
        (0.15, [[1, 2], [0, 2]]),
        # Only documents that exceed the positive by more than 0.3.
        (-0.3, [[], [0]]),
    ],
)
def test_margin_mask(margin: float, expected: list[list[int]]) -> None:
    scores = torch.tensor([[0.5, 0.46, 0.7, 0.9], [0.9, 0.4, 0.3, 0.0]])
    hard = torch.zeros(2, 4, dtype=torch.bool)
    hard[0, 3] = True  # a hard negative of the first row always counts
    mask = margin_mask(scores, hard, margin)
    assert [torch.nonzero(row).flatten().tolist() for row in mask] == expected


def test_the_margin_is_of_the_current_zero_shot_scores(config: Config) -> None:
    trainer = Trainer(config(false_negative_margin=0.0))
    batch, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
    q0, d = trainer.forward(inputs.queries), trainer.forward(inputs.documents)
    mask = inputs.mask | margin_mask((q0 @ d.T).detach(), inputs.hard, 0.0)
    assert mask.sum() > inputs.mask.sum()
    expected = info_nce(q0, d, temperature=0.1, mask=mask)
    torch.testing.assert_close(trainer.loss(batch, inputs).zero_shot, expected.detach())


def test_matryoshka_widths_of_a_run(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"matryoshka_dims is \[64\], and the model's vectors have 32 dimensions\. G"):
        Trainer(config(matryoshka_dims=[64]))
    trainer, plain = Trainer(config(matryoshka_dims=[16, 8], steps=1)), Trainer(config())
    batch = sample_batch(trainer.datasets, trainer.config, 0)
    both, full = (float(each.loss(*each.prepare(batch)).loss.detach()) for each in (trainer, plain))
    assert both != pytest.approx(full, rel=1e-3)
    final = trainer.train(show_progress=False)
    # The widths are in the checkpoint.
    assert json.loads((final / "epic.json").read_text())["matryoshka_dims"] == [8, 16]
    assert EpicEncoder.from_pretrained(final, truncate_dim=8).encode_document("cat").shape == (8,)


def test_positives_among_queries(config: Config) -> None:
    losses = []
    for weight in (0.0, 0.5):
        trainer = Trainer(config(strategy="none", reverse_weight=weight))
        _, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
        q, d = trainer.forward(inputs.queries), trainer.forward(inputs.documents)
        losses.append(trainer.objective(inputs, q, d, None).zero_shot)
    # The hard negatives of `down` belong to no query.
    mask = inputs.mask[:, : inputs.pairs].T
    reverse = info_nce(d[: inputs.pairs], q, temperature=0.1, mask=mask)
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * reverse.detach())


def test_near_duplicates_of_the_positive_do_not_count(config: Config) -> None:
    trainer = Trainer(config(strategy="none", near_duplicate_cosine=0.99, temperature=0.5))
    _, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
    angles = torch.linspace(0.0, 3.0, inputs.counted)
    angles[1] = 0.01
    d = torch.stack([angles.cos(), angles.sin()], dim=1)
    q = d[: inputs.pairs].flip(0)
    mask = inputs.mask.clone()
    mask[0, 1] = mask[1, 0] = True
    expected = info_nce(q, d, temperature=0.5, mask=mask)
    torch.testing.assert_close(trainer.objective(inputs, q, d, None).zero_shot, expected)
