"""GradCache for EPIC: a step's gradients in bounded memory, in one or several processes.

In-batch negatives couple all rows of a batch, so plain backpropagation keeps the activations of all of them. But the
loss depends on a row only through its vector. GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup") computes vectors without activations, then the loss and its gradient with respect to the
vectors, then each chunk again with activations, to backpropagate that gradient into the weights.

EPIC has two levels, because the slots of q1 hold q0 and d. With V = [q0; d]:

    1  q0, d without activations                       each process its shard; vectors all-reduced
    2  V' = V as a leaf; q1 without activations        slots filled from V'
    3  q0', d', q1' as leaves; loss; its gradients     the whole loss in every process
    4  each chunk of q1 again; backpropagate dL/dq1'   into the weights, and through the slots into V'.grad
    5  V'.grad all-reduced
    6  each chunk of q0, d again; dL/dV' + V'.grad     into the weights
    7  weights' gradients all-reduced

One chunk's activations are alive at a time. Passes 4 and 6 restore the random state of 1 and 2, so that dropout is the
same in both. With `recompute` false the activations of 1 and 2 are kept: several processes with memory to spare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from epic_rag.prompt import EncoderInput
from epic_rag.training.distributed import World
from epic_rag.training.inputs import Forward, SlotTable

__all__ = ["cached_backward"]

# (q0, d, q1 or None) -> the loss, scaled by the caller.
Objective = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


@dataclass
class _Embedded:
    """Rows of a step: their vectors, and the backward pass into the weights."""

    forward: Forward
    rows: Sequence[EncoderInput]
    slots: SlotTable | None
    recompute: bool
    world: World
    chunks: list[list[int]] = field(default_factory=list)
    states: list[_RandomState] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)

    def vectors(self) -> torch.Tensor:
        """Return (rows, dim) of all processes, without a graph."""
        width, device = self.forward.backbone.dimension, self.forward.backbone.device
        out = torch.zeros((len(self.rows), width), device=device)
        self.chunks = self.forward.chunks(self.rows, self.world.shard([len(row.ids) for row in self.rows]))
        for chunk in self.chunks:
            self.states.append(_RandomState(device))
            with torch.set_grad_enabled(not self.recompute):
                part = self.forward.chunk(self.rows, chunk, self.slots)
            out[torch.tensor(chunk).to(device)] = part.detach()
            if not self.recompute:
                self.kept.append(part)
        return self.world.all_reduce(out)

    def backward(self, gradient: torch.Tensor) -> None:
        """Backpropagate (rows, dim) gradients into the weights, and into the slots' vectors if they are leaves."""
        after = _RandomState(gradient.device)
        for number, chunk in enumerate(self.chunks):
            if self.recompute:
                self.states[number].restore()
                part = self.forward.chunk(self.rows, chunk, self.slots)
            else:
                part = self.kept[number]
            torch.autograd.backward(part, gradient[torch.tensor(chunk).to(gradient.device)])
        after.restore()
        self.kept.clear()


class _RandomState:
    """State of the random number generators of dropout, on the CPU and the model's device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._own: torch.Tensor | None = None
        if device.type == "cuda":
            self._own = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            self._own = torch.mps.get_rng_state()

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._own is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(self._own, self._device)
        elif self._own is not None:
            torch.mps.set_rng_state(self._own)


def cached_backward(
    forward: Forward,
    queries: Sequence[EncoderInput],
    documents: Sequence[EncoderInput],
    prompted: Sequence[EncoderInput],
    shown: Sequence[Sequence[int]],
    objective: Objective,
    *,
    detach: bool,
    recompute: bool = True,
    world: World | None = None,
) -> None:
    """Add a step's gradients to the weights' `.grad`.

    Args:
        forward: The model.
        queries: Zero-shot rows, q0.
        documents: Positives, hard negatives, and a bank's passages, d.
        prompted: Rows with demonstrations, q1; none for strategy "none".
        shown: For each of `prompted`, positions in [q0; d] that fill its slots.
        objective: Computes the loss from the vectors of the whole batch; called once.
        detach: Stop gradients at the slots.
        recompute: Compute chunks twice instead of keeping their activations.
        world: The processes of the run; None for one.
    """
    world = world or World()
    first = [_Embedded(forward, rows, None, recompute, world) for rows in (queries, documents)]
    q0, d = (part.vectors().requires_grad_() for part in first)
    second: _Embedded | None = None
    q1: torch.Tensor | None = None
    table = torch.cat([q0.detach(), d.detach()]).requires_grad_(not detach)  # (queries + documents, dim)
    if prompted:
        second = _Embedded(forward, prompted, SlotTable(table, shown), recompute, world)
        q1 = second.vectors().requires_grad_()
    loss = objective(q0, d, q1)
    torch.autograd.backward(loss)
    if second is not None and q1 is not None:
        # A term of weight zero may leave a vector without a gradient.
        second.backward(_gradient(q1))
    through_slots = torch.zeros_like(table) if table.grad is None else table.grad
    if prompted and not detach:
        world.all_reduce(through_slots)
    for part, leaf, slots in zip(first, (q0, d), (through_slots[: len(q0)], through_slots[len(q0) :]), strict=True):
        part.backward(_gradient(leaf) + slots)
    world.all_reduce_gradients(forward.backbone.parameters())


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
