"""Micro-batches from a thread: the same ones in order, its exceptions, its end, and the time waited for them."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launcher.token_store import TokenStore, TokenWriter
from launcher.worker import prefetch
from launcher.worker.batches import BinOrder, MicroBatch, SampleOrder, Share, micro_batches
from launcher.worker.prefetch import AHEAD, THREAD_NAME, Prefetch
from tests.time_limit import TIME_LIMIT_SECONDS

CPU = torch.device("cpu")
SEQUENCES, CAPACITY = 23, 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Sequences of 2 to 20 tokens; no two share a token."""
    folder, tokens = tmp_path_factory.mktemp("data") / "train", iter(range(10_000))
    with TokenWriter(folder) as writer:
        for length in np.random.RandomState(0).randint(2, 21, SEQUENCES):
            writer.add([next(tokens) for _ in range(length)], [1] * length)
    return TokenStore(folder)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert THREAD_NAME not in [thread.name for thread in threading.enumerate()]


def numbered(count: int) -> Iterator[MicroBatch]:
    """Micro-batches of updates 0, 1, …"""
    for update in range(count):
        yield MicroBatch(update, True, *torch.full((3, 1, 8), update), 8, 8)


def content(batch: MicroBatch) -> list[Any]:
    """Every value of a micro-batch, comparable."""
    return [each.tolist() if isinstance(each, torch.Tensor) else each for each in vars(batch).values()]


def from_thread(make_batches: Callable[[], Iterator[MicroBatch]]) -> list[MicroBatch]:
    batches = Prefetch(make_batches, CPU)
    with batches:
        return list(batches)


@pytest.mark.parametrize("kind", ["padded", "by length", "packed"])
@pytest.mark.parametrize(("updates", "first"), [(range(9), 0), (range(4, 9), 32)])
def test_the_thread_gives_the_same_micro_batches_in_the_same_order(
    kind: str, updates: range, first: int, store: TokenStore
) -> None:
    """Nine updates are more than two epochs; the others are those after a resume."""

    def made() -> Iterator[MicroBatch]:
        packed = kind == "packed"
        order = BinOrder(np.diff(store.offsets), CAPACITY, 3) if packed else SampleOrder(SEQUENCES, 3)
        return micro_batches(store, order, Share(1, 2, 2, 2), updates, first, by_length=kind == "by length")

    expected = [content(batch) for batch in made()]
    assert len(expected) == 2 * len(updates)
    assert [content(batch) for batch in from_thread(made)] == expected


def test_the_thread_makes_few_micro_batches_ahead() -> None:
    made, enough = [], threading.Event()  # type: list[int], threading.Event

    def counted() -> Iterator[MicroBatch]:
        for batch in numbered(3 * AHEAD):
            made.append(batch.update)
            if len(made) == AHEAD:
                enough.set()
            yield batch

    batches = Prefetch(counted, CPU)
    with batches:
        assert enough.wait(TIME_LIMIT_SECONDS), "no micro-batch was taken, and these are made"
        (thread,) = [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]
        # A thread that does not wait for room makes all of them in this time, and ends.
        thread.join(0.2)
        assert made == list(range(AHEAD))
        assert [batch.update for batch in batches] == list(range(3 * AHEAD))


def test_an_exception_of_the_thread_is_raised_in_training_with_its_traceback() -> None:
    class DamagedError(Exception):
        pass

    def damaged_after_two() -> Iterator[MicroBatch]:
        yield from numbered(2)
        raise DamagedError("the third")

    received = []
    batches = Prefetch(damaged_after_two, CPU)
    with pytest.raises(DamagedError, match="the third") as caught, batches:
        received.extend(batch.update for batch in batches)
    assert "damaged_after_two" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]

    def damaged_at_once() -> Iterator[MicroBatch]:
        raise DamagedError("the first")

    with pytest.raises(DamagedError, match="the first"):
        from_thread(damaged_at_once)


@pytest.mark.parametrize("taken", [0, 1, 10])
def test_the_thread_ends_when_training_stops(taken: int) -> None:
    batches = Prefetch(lambda: numbered(100), CPU)
    with batches:
        assert [batch.update for batch, _ in zip(batches, range(taken), strict=False)] == list(range(taken))


def test_training_waits_for_a_thread_that_makes_a_micro_batch_when_training_stops() -> None:
    making = threading.Event()

    def slow() -> Iterator[MicroBatch]:
        yield from numbered(1)
        making.set()
        time.sleep(0.3)
        yield from numbered(1)

    batches = Prefetch(slow, CPU)
    with batches:
        assert making.wait(TIME_LIMIT_SECONDS)


def test_the_thread_ends_when_training_raises() -> None:
    batches = Prefetch(lambda: numbered(100), CPU)

    def train() -> None:
        with batches:
            for _ in batches:
                raise RuntimeError("of training")

    with pytest.raises(RuntimeError, match="of training"):
        train()


def test_the_thread_uses_no_random_state(store: TokenStore) -> None:
    def state() -> tuple[Any, ...]:
        kind, keys, *rest = np.random.get_state()
        return kind, keys.tolist(), *rest, torch.get_rng_state().tolist()

    def made(order: Any) -> Iterator[MicroBatch]:
        return micro_batches(store, order, Share(0, 1, 2, 2), range(9), 0)

    before = state()
    from_thread(lambda: made(SampleOrder(SEQUENCES, 3)))
    from_thread(lambda: made(BinOrder(np.diff(store.offsets), CAPACITY, 3)))
    assert state() == before


def test_the_time_waited_for_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one takes 2 seconds from when training asks for it; the other is ready then."""
    now, asked = [100.0], threading.Event()

    def read_clock() -> float:
        found = now[0]
        asked.set()
        return found

    def slow() -> Iterator[MicroBatch]:
        assert asked.wait(TIME_LIMIT_SECONDS)
        now[0] += 2.0
        yield from numbered(2)

    monkeypatch.setattr(prefetch, "time", SimpleNamespace(perf_counter=read_clock))
    batches = Prefetch(slow, CPU)
    assert batches.take_seconds() == 0.0
    with batches:
        iterated = iter(batches)
        next(iterated)
        assert batches.take_seconds() == 2.0
        next(iterated)
        assert batches.take_seconds() == 0.0


def test_a_gpu_gets_pinned_tensors_that_the_thread_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: which thread calls what is recorded."""
    calls = []

    def recorded(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append((name, threading.current_thread().name, *arguments[1:]))
            return arguments[0]

        return call

    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda given: recorded("set_device")(None, given))
    monkeypatch.setattr(MicroBatch, "pinned", recorded("pinned"))
    monkeypatch.setattr(MicroBatch, "on", recorded("on"))
    batches = Prefetch(lambda: numbered(1), device)
    with batches:
        assert [batch.update for batch in batches] == [0]
    main = threading.current_thread().name
    assert calls == [("set_device", THREAD_NAME, device), ("pinned", THREAD_NAME), ("on", main, device)]


def test_a_micro_batch_moves_with_all_its_tensors_and_keeps_its_numbers() -> None:
    (batch,) = numbered(1)
    moved = batch.on(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.input_ids, moved.attention_mask, moved.labels)} == {"meta"}
    assert vars(moved).keys() == vars(batch).keys()
    assert [moved.update, moved.last_of_update, moved.update_targets, moved.update_tokens] == [0, True, 8, 8]
    assert batch.on(CPU).input_ids is batch.input_ids
