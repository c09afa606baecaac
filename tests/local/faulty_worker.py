"""A rank with a fault put into it, named by the variable LAUNCHER_FAULT; otherwise the real worker."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from launcher.worker import __main__ as worker
from launcher.worker import train
from launcher.worker.checkpoint_files import CheckpointFiles


def scheduler_runs_ahead(at_update: int) -> None:
    """The rank's scheduler is moved on by five in the middle of the run."""
    advance = train.TrainLoop.advance

    def with_fault(self, batch, *rest):
        advance(self, batch, *rest)
        if batch.update == at_update:
            self.engine.lr_scheduler.step(self.engine.lr_scheduler.last_batch_iteration + 5)

    train.TrainLoop.advance = with_fault


def blind_scheduler_runs_ahead(at_update: int) -> None:
    """The same, on a rank that no longer looks at its own rate."""
    scheduler_runs_ahead(at_update)

    def blind(_self, engine, _update):
        return engine.optimizer.param_groups[0]["lr"]

    train.LRCheck.check = blind


def raises(at_update: int) -> None:
    """An exception in the middle of the run."""
    advance = train.TrainLoop.advance

    def with_fault(self, batch, *rest):
        if batch.update == at_update:
            raise RuntimeError("the disk of this node is on fire")
        advance(self, batch, *rest)

    train.TrainLoop.advance = with_fault


def losses_jump(at_update: int) -> None:
    """From an update on, the losses that the ranks see are those of a run that goes wrong."""
    reduce = train.TrainLoop.reduce

    def with_fault(self, summed, batch):
        mean, stop = reduce(self, summed, batch)
        return mean + (5.0 if at_update <= batch.update < at_update + 3 else 0.0), stop

    train.TrainLoop.reduce = with_fault


def loss_is_nan(at_update: int) -> None:
    """The ranks see a loss that is no number."""
    reduce = train.TrainLoop.reduce

    def with_fault(self, summed, batch):
        mean, stop = reduce(self, summed, batch)
        return float("nan") if batch.update == at_update else mean, stop

    train.TrainLoop.reduce = with_fault


def killed_while_writing(at_update: int) -> None:
    """The rank is killed after the next update, while its thread writes the checkpoint of an update."""
    advance, finish, training_continued = train.TrainLoop.advance, CheckpointFiles.finish, threading.Event()

    def reports_its_update(self, batch, *rest):
        advance(self, batch, *rest)
        if batch.update == at_update:
            training_continued.set()

    def half_written(self):
        if self._folder.name == f"update-{at_update}":
            training_continued.wait()
            save, copy, path = self._copies[0]
            save(copy.state(), str(path))
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self)

    train.TrainLoop.advance, CheckpointFiles.finish = reports_its_update, half_written


def saves_slowly(seconds: int) -> None:
    """Every checkpoint takes some seconds longer."""
    save = train.Checkpoints.save

    def with_fault(self, *arguments, **keywords):
        time.sleep(seconds)
        return save(self, *arguments, **keywords)

    train.Checkpoints.save = with_fault


def loads_forever(rank: int) -> None:
    """One rank never gets its model."""

    def loop(_plan):
        while True:
            pass

    if os.environ["RANK"] == str(rank):
        train.load_model = loop


if __name__ == "__main__":
    name, _, update = os.environ.get("LAUNCHER_FAULT", "").partition(":")
    if name:
        globals()[name](int(update))
    status = worker.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
