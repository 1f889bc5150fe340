"""One encoder on several devices gives what one device gives; here the devices are one CPU, named several times."""

from __future__ import annotations

import _thread
import copy
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from epic_rag import ConfigError, DemonstrationBank, EpicEncoder
from epic_rag import batching as devices
from epic_rag.backbone import Backbone
from epic_rag.batching import BatchQueue, Replicas, Worker, parse_devices, plan_workers
from tests.conftest import make_encoder
from tests.helpers.families import DECODERS, ENCODERS, config, encoder_of, transformer

TEXTS = [f"{'a longer text ' * (n % 7)}number {n}" for n in range(60)]
BANK = DemonstrationBank(
    [(f"question {n}", f"the answer is {n} " * n) for n in range(1, 5)], instruction="find the answer"
)
CPU = torch.device("cpu")

Embed = Callable[[Backbone, list[int]], Iterator[tuple[list[int], npt.NDArray[np.float32]]]]


@pytest.fixture(autouse=True)
def a_few_texts_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "TOKENS_PER_WORKER", 20)
    monkeypatch.setattr(devices, "_CPU_PART", 16)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the weights, as on a device of their own."""
    original = torch.Tensor.to

    def copied(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return original(self, *args, **options).clone()

    monkeypatch.setattr(devices, "_is_at", lambda backbone, device: False)
    monkeypatch.setattr(torch.Tensor, "to", copied)


def on_cpus(number: int, *, causal: bool = True) -> EpicEncoder:
    encoder = make_encoder(causal=causal)
    encoder.replicas = Replicas([CPU] * (number - 1))
    return encoder


def workers(monkeypatch: pytest.MonkeyPatch, number: int = 1) -> list[tuple[str, int]]:
    """The thread and the number of rows of every forward pass from now on; the first passes wait for so many threads."""
    seen: list[tuple[str, int]] = []
    forward = Backbone.forward
    all_at_work = threading.Barrier(number, timeout=60)

    def noted(self: Backbone, batch: Any, slots: torch.Tensor | None = None) -> torch.Tensor:
        name = threading.current_thread().name
        is_new = name not in {other for other, _ in seen}
        seen.append((name, len(batch.ids)))
        if is_new:
            all_at_work.wait()
        return forward(self, batch, slots)

    monkeypatch.setattr(Backbone, "forward", noted)
    return seen


def left_running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("epic-rag-device")]


# Vectors


@pytest.mark.parametrize("batch_size", [None, 1, 5])
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_are_the_same_in_the_same_order(
    causal: bool, number: int, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_encoder(causal=causal).encode_document(TEXTS)
    seen = workers(monkeypatch, number)
    found = on_cpus(number, causal=causal).encode_document(TEXTS, batch_size=batch_size)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len({name for name, _ in seen}) == number
    assert sum(rows for _, rows in seen) == len(TEXTS)
    assert max(rows for _, rows in seen) <= (batch_size or len(TEXTS))


@pytest.mark.parametrize(("cached", "padding_side"), [(True, "right"), (False, "left")])
@pytest.mark.parametrize(
    "options",
    [
        {"instruction": "find it"},
        {"instruction": ""},
        {"bank": BANK},
        {"bank": BANK, "strategy": "text"},
        {"bank": BANK, "selection": "nearest", "num_demonstrations": 2},
        {"bank": BANK, "truncate_dim": 8},
    ],
    ids=str,
)
def test_queries_are_the_same(options: dict[str, Any], cached: bool, padding_side: Any) -> None:
    one, two = make_encoder(), on_cpus(2)
    for encoder in (one, two):
        encoder.padding_side = padding_side
        encoder.prefix_cache = encoder.prefix_cache if cached else None
    np.testing.assert_allclose(two.encode_query(TEXTS, **options), one.encode_query(TEXTS, **options), atol=1e-6)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_copies_of_every_family_give_the_same(family: str) -> None:
    one, two = (encoder_of(Backbone(transformer(config(family)))) for _ in range(2))
    two.backbone.load_state_dict(one.backbone.state_dict())
    two.replicas = Replicas([CPU])
    np.testing.assert_allclose(two.encode_document(TEXTS), one.encode_document(TEXTS), atol=1e-6)
    np.testing.assert_allclose(two.encode_query(TEXTS, bank=BANK), one.encode_query(TEXTS, bank=BANK), atol=1e-5)
    (made,) = two.replicas.copies_of(two.backbone)
    pointers = {value.data_ptr() for value in two.backbone.parameters()}
    assert not pointers & {value.data_ptr() for value in made.parameters()}


def test_few_texts_stay_in_the_callers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    seen = workers(monkeypatch)
    encoder = on_cpus(2)
    assert encoder.encode_document("one").shape == (32,)
    assert encoder.encode_document(TEXTS).shape == (60, 32)
    assert encoder.encode_document([]).shape == (0, 32)
    assert {name for name, _ in seen} == {"MainThread"}


def test_progress_counts_every_text(capsys: pytest.CaptureFixture[str]) -> None:
    on_cpus(2).encode_document(TEXTS, show_progress=True)
    assert "60/60" in capsys.readouterr().err


# Weights


def test_replicas_on_one_device_share_the_weights(tiny_checkpoint: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint, device=["cpu", "cpu", "cpu"])
    assert encoder.devices == (CPU, CPU, CPU)
    encoder.encode_document(TEXTS)
    layers = [module for module in encoder.backbone.modules() if isinstance(module, nn.Linear)]
    for made in encoder.replicas.copies_of(encoder.backbone):
        assert made is not encoder.backbone
        assert {id(value) for value in made.parameters()} == {id(value) for value in encoder.backbone.parameters()}
        # With them what oneDNN has laid out.
        assert [module for module in made.modules() if isinstance(module, nn.Linear)] == layers


@pytest.mark.parametrize(("threads", "expected"), [(1, 1), (2, 2), (5, 5), (7, 7), (11, 1), (12, 6), (16, 8), (64, 8)])
def test_a_cpu_has_workers_of_its_own(threads: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    encoder = make_encoder()
    assert len(encoder.replicas.copies_of(encoder.backbone)) == expected - 1
    assert encoder.devices == (CPU,)
    encoder.replicas.workers = 1
    assert encoder.replicas.copies_of(encoder.backbone) == []
    assert copy.deepcopy(encoder).replicas.workers == 1


def test_workers_of_one_cpu_give_the_vectors_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    names = workers(monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    encoder, alone = make_encoder(), make_encoder()
    alone.replicas.workers = 1
    expected = alone.encode_document(TEXTS)
    names.clear()
    found = encoder.encode_document(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert "MainThread" not in {name for name, _ in names}


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("how", ["in place", "replaced", "forgotten"])
def test_copies_follow_weights_that_change(how: str) -> None:
    encoder = on_cpus(2)
    before = encoder.encode_document(TEXTS)
    (stale,) = encoder.replicas.copies_of(encoder.backbone)
    assert encoder.replicas.copies_of(encoder.backbone)[0] is stale
    other = make_encoder(seed=1)
    if how == "in place":
        encoder.backbone.load_state_dict(other.backbone.state_dict())
    elif how == "replaced":
        encoder.backbone = other.backbone
    else:
        # A change of which torch's counter knows nothing.
        for value, new in zip(encoder.backbone.parameters(), other.backbone.parameters(), strict=True):
            value.data.copy_(new.data)
    encoder.invalidate_caches()
    found = encoder.encode_document(TEXTS)
    assert encoder.replicas.copies_of(encoder.backbone)[0] is not stale
    np.testing.assert_allclose(found, other.encode_document(TEXTS), atol=1e-6)
    assert np.abs(found - before).max() > 0.1
    assert encoder.fingerprint == other.fingerprint


def test_the_rest_is_as_with_one_device(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one = EpicEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    two = EpicEncoder.from_pretrained(tiny_checkpoint, device="cpu, cpu")
    assert (two.fingerprint, two.device, two.dtype) == (one.fingerprint, CPU, torch.float32)
    assert (two.max_batch_tokens, two.devices, one.devices) == (one.max_batch_tokens, (CPU, CPU), (CPU,))
    two.save_pretrained(tmp_path)
    assert EpicEncoder.from_pretrained(tmp_path, device="cpu").fingerprint == one.fingerprint
    expected = one.encode_query(TEXTS, bank=BANK)
    two.encode_document(TEXTS)
    for other in (copy.copy(two), copy.deepcopy(two), pickle.loads(pickle.dumps(two))):
        assert other.devices == (CPU, CPU)
        np.testing.assert_allclose(other.encode_query(TEXTS, bank=BANK), expected, atol=1e-6)
    np.testing.assert_allclose(two.embed_demonstrations(BANK), one.embed_demonstrations(BANK), atol=1e-6)


# Errors


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, *, above: int = 0) -> list[int]:
    """Forward passes of more rows than that fail; the sizes of all of them."""
    sizes: list[int] = []
    forward = Backbone.forward

    def limited(self: Backbone, batch: Any, slots: torch.Tensor | None = None) -> torch.Tensor:
        sizes.append(len(batch.ids))
        if len(batch.ids) > above:
            raise error
        return forward(self, batch, slots)

    monkeypatch.setattr(Backbone, "forward", limited)
    return sizes


@pytest.mark.parametrize("error", [ValueError("wrong"), RuntimeError("odd"), torch.OutOfMemoryError("no room")])
def test_an_error_of_a_worker_reaches_the_caller(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        on_cpus(2).encode_document(TEXTS)
    assert caught.value is error
    assert left_running() == []


def test_a_batch_without_memory_is_halved_by_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_encoder().encode_document(TEXTS)
    sizes = failing(monkeypatch, torch.OutOfMemoryError("no room"), above=2)
    found = on_cpus(2).encode_document(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert max(sizes) > 2
    assert sum(size for size in sizes if size <= 2) == len(TEXTS)


def test_an_interrupt_ends_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = workers(monkeypatch, 2)
    forward = Backbone.forward
    passes = itertools.count()

    def interrupted(self: Backbone, batch: Any, slots: torch.Tensor | None = None) -> torch.Tensor:
        if next(passes) == 4:
            _thread.interrupt_main()
        return forward(self, batch, slots)

    monkeypatch.setattr(Backbone, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        on_cpus(2).encode_document(TEXTS * 20, batch_size=1)
    assert len(seen) < 20 * len(TEXTS)
    assert left_running() == []


# Sharing


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("cpu", ["cpu"]),
        (["cpu"], ["cpu"]),
        (CPU, ["cpu"]),
        ("cpu,cpu", ["cpu", "cpu"]),
        (" cpu , cpu:0", ["cpu", "cpu:0"]),
        (("cpu", CPU), ["cpu", "cpu"]),
    ],
    ids=str,
)
def test_devices_are_named(names: Any, expected: list[str]) -> None:
    assert [str(device) for device in parse_devices(names)] == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "device is an empty list. Pass at least one"),
        ("", r"Device '' is not available on this machine \(.*\). Pass 'cpu'."),
        ("cpu,", r"Device '' is not available on this machine \(.*\). Pass 'cpu'."),
        ("cpu,warp", r"Device 'warp' is not available on this machine \(.*\). Pass 'cpu'."),
        (["cpu", "cuda:99"], r"Device 'cuda:99' is not available on this machine \(.*\). Pass 'cpu'."),
        (torch.device("cuda:99"), r"Device 'cuda:99' is not available on this machine \(.*\). Pass 'cpu'."),
        (["meta", "cpu", "meta"], r"Device meta is named twice \(meta, cpu, meta\). Name it once."),
        ([None], r"Device None is not available on this machine \(.*\). Pass 'cpu'."),
    ],
)
def test_devices_that_cannot_be(names: Any, message: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        EpicEncoder.from_pretrained(tiny_checkpoint, device=names)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_workers_on_the_cpu_share_its_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_encoder().backbone
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    crew = plan_workers([backbone] * 2, 1000, 501)
    assert [worker.tokens for worker in crew] == [250, 250]
    assert [worker.threads for worker in crew] == {1: [1, 1], 2: [1, 1], 5: [3, 2]}[threads]
    assert plan_workers([backbone] * 2, 39, 501) == [Worker(backbone, 501)]


def test_a_worker_has_its_threads_and_nobody_else_loses_any() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    seen: list[int] = []

    def work(worker: Worker) -> None:
        while queue.take(worker):
            seen.append(torch.get_num_threads())

    try:
        backbone = make_encoder().backbone
        crew = [Worker(backbone, 10, threads) for threads in (3, 1)]
        queue = BatchQueue([[0], [1]] * 20, [1] * 2, 2)
        devices._run_in_threads(work, crew, queue)
        later = threading.Thread(target=lambda: seen.append(-torch.get_num_threads()))
        later.start()
        later.join()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert set(seen[:-1]) <= {3, 1}
    assert seen[-1] == -4


@pytest.mark.parametrize("part", [1, 10, 100])
@pytest.mark.parametrize("most", [10, 40])
def test_every_row_is_taken_once_and_no_batch_is_too_large(part: int, most: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(devices, "_CPU_PART", part)
    lengths = list(range(40, 0, -1))
    queue = BatchQueue([list(range(start, start + 8)) for start in range(0, 40, 8)], lengths, 2)
    worker = Worker(make_encoder().backbone, most, 1)
    taken = []
    while batch := queue.take(worker):
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= most
        taken += batch
    assert taken == list(range(40))


def test_automatic_casts_are_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make_encoder(), on_cpus(2)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = one.encode_document(TEXTS), two.encode_document(TEXTS)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert np.abs(found - one.encode_document(TEXTS)).max() > 1e-4
