"""Ranks as threads of this process, and an engine that counts and steps as DeepSpeed's does, without DeepSpeed."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from launcher.plan.revision import schedule_of
from launcher.plan.schema import Plan
from launcher.worker import scheduler
from launcher.worker.ranks import Ranks
from tests.unit.inputs import job_of, machine_facts, plan_of

VOCABULARY = 5
WAIT_SECONDS = 60.0

TOTAL, WARMUP, PEAK = 400, 20, 2.1e-5
START = PEAK / (WARMUP + 1)
"""The learning rate of update 0."""


def small_plan(**sections: Any) -> Plan:
    """A float32 plan for two CPU ranks: 400 updates, constant at PEAK after the warm-up, since it never decays."""
    schedule = {"shape": "wsd", "decay_start": 399, "warmup": WARMUP, "peak_lr": PEAK, **sections.pop("schedule", {})}
    cluster = {"gpus_per_node": 0, "processes_per_node": 2, **sections.pop("cluster", {})}
    train = {"max_steps": TOTAL, **sections.pop("train", {})}
    return plan_of(job_of(schedule=schedule, cluster=cluster, train=train, **sections), machine=machine_facts(0))


class Exchange:
    """Where the threads that play ranks give each other their values, collective after collective."""

    def __init__(self, size: int) -> None:
        self._news = threading.Condition()
        self._given: list[list[Any]] = [[] for _ in range(size)]
        self._left = [False] * size

    def all(self, rank: int, value: Any) -> list[Any]:
        """The values of all ranks. Raises RuntimeError if one has left, or does not come."""
        with self._news:
            self._given[rank].append(value)
            turn = len(self._given[rank])
            self._news.notify_all()
            self._news.wait_for(lambda: self._came(turn) or self._cannot_come(turn), WAIT_SECONDS)
            if not self._came(turn):
                raise RuntimeError(f"rank {rank} waits in collective {turn} for a rank that does not join it")
            return [values[turn - 1] for values in self._given]

    def leave(self, rank: int) -> None:
        """This rank joins no collective after this."""
        with self._news:
            self._left[rank] = True
            self._news.notify_all()

    def _came(self, turn: int) -> bool:
        return all(len(values) >= turn for values in self._given)

    def _cannot_come(self, turn: int) -> bool:
        return any(left and len(values) < turn for left, values in zip(self._left, self._given, strict=True))


@dataclass(frozen=True)
class FakeRanks(Ranks):
    """Ranks whose collectives go through an Exchange; a single rank needs none."""

    exchange: Exchange

    def sum(self, values: list[float]) -> list[float]:
        return [math.fsum(column) for column in zip(*self.exchange.all(self.rank, values), strict=True)]

    def gather(self, value: Any) -> list[Any]:
        return self.exchange.all(self.rank, value)

    def barrier(self) -> None:
        self.exchange.all(self.rank, None)


def fake_ranks(rank: int = 0, world_size: int = 1, exchange: Exchange | None = None) -> FakeRanks:
    """Rank r is on host h<r>."""
    return FakeRanks(rank, world_size, rank, torch.device("cpu"), f"h{rank}", exchange or Exchange(world_size))


def on_each_rank(world_size: int, function: Callable[[FakeRanks], Any]) -> list[Any]:
    """What `function` returns on each rank, or the exception that it raises there, in the order of ranks."""
    exchange = Exchange(world_size)

    def result(rank: int) -> Any:
        try:
            return function(fake_ranks(rank, world_size, exchange))
        except Exception as error:
            return error
        finally:
            exchange.leave(rank)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(result, range(world_size)))


class FakeEngine:
    """An engine at update 0 of the plan. Its scheduler is the launcher's own, whatever the plan's shape.

    Called as a model, it gives the first token of the vocabulary the logit `input id / 10` and all others 0. `norms`
    are the gradient norms of its updates, and `skips` the updates that it does not apply.
    """

    def __init__(self, plan: Plan, groups: int = 2, norms: dict[int, float] | None = None, skips: tuple = ()) -> None:
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0} for _ in range(groups)])
        self.lr_scheduler = scheduler.PlannedLR(self.optimizer, schedule_of(plan))
        self.global_steps = self.skipped_steps = 0
        self.losses: list[float] = []
        """What was given to backward."""
        self.module = torch.nn.Linear(1, 1)
        self._accumulation = plan.gradient_accumulation_steps
        self._micro_steps = 0
        self._norms, self._skips = norms or {}, skips
        self._applied = True
        scheduler.begin(self, plan)

    @property
    def lrs(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[..., 0] = input_ids / 10
        return SimpleNamespace(logits=logits)

    def backward(self, loss: torch.Tensor) -> None:
        self.losses.append(float(loss))

    def step(self) -> None:
        """One micro-batch; after the last of an update, the update."""
        self._micro_steps += 1
        if self._micro_steps % self._accumulation:
            return
        self._applied = self.global_steps not in self._skips
        self.global_steps += 1
        if self._applied:
            self.lr_scheduler.step()
        else:
            self.skipped_steps += 1

    def update(self) -> None:
        """Makes one whole update."""
        for _ in range(self._accumulation):
            self.step()

    def was_step_applied(self) -> bool:
        return self._applied

    def get_global_grad_norm(self) -> float:
        return self._norms.get(self.global_steps - 1, 1.0)


def _archive() -> bytes:
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return buffer.getvalue()


ARCHIVE = _archive()


class SavingEngine:
    """Writes the files of one rank as DeepSpeed does: the model on rank 0, optimizer states on each, some swapped."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.checkpoint_engine = _Writer()

    def save_checkpoint(self, save_dir: Path, tag: str, **_: Any) -> None:
        folder = Path(save_dir) / tag
        swapped = folder / "offloaded_tensors" / f"rank{self.rank:02d}"
        swapped.mkdir(parents=True)
        if self.rank == 0:
            self.checkpoint_engine.save(state_dict=ARCHIVE, path=str(folder / "model.pt"))
        self.checkpoint_engine.save(ARCHIVE, str(folder / f"optim-{self.rank:02d}.pt"))
        (swapped / "states.swp").write_bytes(b"states")


class _Writer:
    def save(self, state_dict: bytes, path: str) -> None:
        half = len(state_dict) // 2
        for data in (state_dict[:half], state_dict[half:]):
            with Path(path).open("ab") as file:
                file.write(data)
