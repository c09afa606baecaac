"""Fine-tuning, from the process group to the exported model: what every rank does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from launcher.chunked_loss import LossLayer
from launcher.files import use_output_mode
from launcher.plan.flops import peak_tflops, update_flops
from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.plan_file import read_plan
from launcher.records import Phase, PhaseReport, StoppedReport, UpdateReport
from launcher.run_dir import RunDir
from launcher.token_store import TokenStore
from launcher.worker import scheduler
from launcher.worker.batches import MicroBatch, Share, micro_batches, order_of
from launcher.worker.checkpoint import Checkpoints, Progress
from launcher.worker.compute_time import ComputeTime
from launcher.worker.control import Control
from launcher.worker.early_stopping import EarlyStopping
from launcher.worker.evaluate import evaluate
from launcher.worker.export import export_model
from launcher.worker.finite_weights import check_weights
from launcher.worker.full_disk import naming_full_disk
from launcher.worker.gradient_norm import norm_before_step, norm_of_step
from launcher.worker.loss import summed_losses
from launcher.worker.lr_check import LRCheck, check_same_plan
from launcher.worker.matmul_check import check_device
from launcher.worker.metrics import MetricsWriter
from launcher.worker.model import load_model, make_engine
from launcher.worker.prefetch import Prefetch
from launcher.worker.ranks import Ranks, join_ranks
from launcher.worker.spike_guard import SpikeGuard
from launcher.worker.ulysses import gradient_divisor, part_of


def run_rank(run_path: Path, plan_file: Path, start: Start | None, control: Control) -> None:
    """Carries out the plan on this rank. Raises the error of a failure."""
    run, plan = RunDir(run_path), read_plan(plan_file)
    use_output_mode(plan.job.output_mode)
    transformers_logging.disable_progress_bar()
    ranks = join_ranks(plan)
    hosts = check_same_plan(ranks, plan)
    if ranks.device.type == "cuda" and plan.job.cluster.health_checks != "off":
        check_device(ranks.device)
    set_seed(plan.job.train.seed)
    control.report(PhaseReport(report="phase", time=time.time(), phase="loading"))
    engine = make_engine(plan, load_model(plan), universal=start is not None and start.convert)
    if start is None:
        check_weights(engine.module, ranks, plan.training.model.folder)
    training = TrainLoop(run, plan, ranks, engine, control, hosts)
    with naming_full_disk(run.path):
        training.begin(start)
        training.train()
        training.finish()


def _peak_tflops(plan: Plan, device: torch.device) -> float | None:
    return peak_tflops(torch.cuda.get_device_name(device), plan.precision) if device.type == "cuda" else None


class TrainLoop:
    """One rank's training: the loop, its state, evaluations and checkpoints."""

    def __init__(
        self, run: RunDir, plan: Plan, ranks: Ranks, engine: Any, control: Control, hosts: Sequence[str]
    ) -> None:
        self.run, self.plan, self.ranks, self.engine, self.control = run, plan, ranks, engine, control
        self.part = part_of(plan.world, ranks)
        self.loss_layer = LossLayer(engine.module) if plan.training.chunked_loss else None
        self.metrics = MetricsWriter(run, ranks, _peak_tflops(plan, ranks.device))
        self.compute_time = ComputeTime(ranks.device)
        self.checkpoints = Checkpoints(run, plan, ranks, control.record_event)
        self.lr_check = LRCheck(ranks, plan, hosts)
        self.guard = SpikeGuard(run, plan, ranks, engine, self.lr_check, control.record_event)
        self.early_stopping = EarlyStopping(plan, ranks, control.record_event)
        self.train_store = TokenStore(Path(plan.training.data.train.folder))
        self.eval_store = TokenStore(Path(plan.training.data.eval.folder)) if plan.training.data.eval else None
        self.progress = Progress(update=0, samples=0)
        self.batches = Prefetch(self.micro_batches, ranks.device)
        self.stopped = False
        self.router_loss = 0.0
        """The part of the update's mean loss that balances the experts' routers."""

    def begin(self, start: Start | None) -> None:
        """Prepares the first update of a new run, or the first one after a checkpoint."""
        if start is None:
            scheduler.begin(self.engine, self.plan)
            self.phase("training")
            self.evaluate()
        else:
            self.progress, guard_state = self.checkpoints.load(self.engine, start)
            check_weights(self.engine.module, self.ranks, self.plan.training.model.folder, start.checkpoint)
            self.guard.load_state_dict(guard_state)
            self.early_stopping.load_state_dict(guard_state.get("early_stopping"))
            scheduler.resume(self.engine)
            self.phase("training")
        self.metrics.restart_clock()

    def train(self) -> None:
        """Makes the remaining updates of the plan, until the end or a stop."""
        with self.batches:
            self.make_updates()

    def make_updates(self) -> None:
        summed = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        fused, coefficient = self.plan.training.job.model.liger, self.plan.training.model.router_loss_coefficient
        for batch in self.batches:
            with self.compute_time:
                tensors = (batch.input_ids, batch.attention_mask, batch.labels)
                loss, router_loss = summed_losses(
                    self.engine,
                    *tensors,
                    fused=fused,
                    part=self.part,
                    router_coefficient=coefficient,
                    layer=self.loss_layer,
                    packed=batch.packed,
                )
            self.engine.backward(loss * self.loss_scale(batch))
            summed += torch.stack((loss.detach(), router_loss.detach().to(loss.device)))
            if not batch.last_of_update:
                self.engine.step()
                continue
            mean, stop = self.reduce(summed.tolist(), batch)
            lr = self.lr_check.check(self.engine, batch.update)
            grad_norm = norm_before_step(self.engine, self.plan)
            if self.guard.rejects(batch.update, mean, grad_norm):
                self.stopped = True
                break
            self.engine.step()
            self.advance(batch, mean, lr, grad_norm)
            summed.zero_()
            if self.early_stopping.stop_reason:
                break
            if (stop or self.guard.stop_reason) and self.progress.update < self.plan.length.total_updates:
                self.stopped = True
                break

    def micro_batches(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the remaining updates, on the CPU."""
        plan = self.plan
        share = Share(
            self.ranks.rank // self.part.size,
            self.ranks.world_size // self.part.size,
            plan.train_micro_batch_size_per_gpu,
            plan.gradient_accumulation_steps,
        )
        updates = range(self.progress.update, plan.length.total_updates)
        store, first = self.train_store, self.progress.samples
        by_length = plan.training.job.data.group_by_length
        return micro_batches(store, order_of(plan, store), share, updates, first, by_length=by_length)

    def loss_scale(self, batch: MicroBatch) -> float:
        """The factor from a micro-batch's summed loss to its share of the update's mean over all learned tokens.

        DeepSpeed divides by the accumulation steps and averages over the ranks; the factor undoes both.
        """
        return gradient_divisor(self.plan) * self.plan.gradient_accumulation_steps / max(1, batch.update_targets)

    def reduce(self, summed: Sequence[float], batch: MicroBatch) -> tuple[float, bool]:
        """(the update's mean loss, whether any rank got the order to stop): the same on every rank.

        Also completes a pending checkpoint once all ranks have written its files.
        `summed` is this rank's loss and the part of it that balances routers.
        """
        row = self.lr_check.table_row(self.engine, batch.update)
        flags = (float(self.control.stop.is_set()), float(self.checkpoints.written))
        total, router, stops, written, *table = self.ranks.sum([*summed, *flags, *row])
        self.router_loss = router / max(1, batch.update_targets)
        self.lr_check.compare(table, batch.update)
        self.checkpoints.agree(written)
        return total / max(1, batch.update_targets), stops > 0

    def advance(self, batch: MicroBatch, loss: float, lr: float, grad_norm: float | None) -> None:
        """After an update: writes its metrics, and evaluates or saves if due."""
        samples = self.progress.samples + self.plan.train_batch_size
        self.progress = Progress(update=batch.update + 1, samples=samples)
        norm = grad_norm if grad_norm is not None else norm_of_step(self.engine, self.plan)
        skipped = not self.engine.was_step_applied()
        self.metrics.write(
            update=batch.update,
            samples=samples,
            tokens=batch.update_tokens,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            skipped=skipped,
            data_seconds=self.batches.take_seconds(),
            router_loss=None if self.plan.training.model.router_loss_coefficient is None else self.router_loss,
            flops=update_flops(self.plan.training.model, batch.update_tokens, batch.update_pairs),
        )
        self.control.report(
            UpdateReport(
                report="update",
                time=time.time(),
                update=batch.update,
                step_seconds=self.metrics.step_seconds,
                gpu_memory_used_bytes=self.metrics.gpu_memory_used_bytes(),
                own_seconds=self.compute_time.take(),
            )
        )
        self.guard.watch(batch.update, loss, norm, skipped=skipped)
        done, total = self.progress.update, self.plan.length.total_updates
        every = self.plan.job.train.eval_every
        if every is not None and done % every == 0 and done < total:
            self.evaluate()
            self.end_early()
        if self.checkpoints.due(done) and done < total:
            self.save()

    def end_early(self) -> None:
        """Ends the run after this update if early stopping says it, unless the spike guard already stops it."""
        if self.guard.stop_reason is None and (reason := self.early_stopping.decide(self.progress.update)):
            self.checkpoints.ends_early(self.progress.update, reason)

    def evaluate(self) -> None:
        """Evaluates, if the job has evaluation data."""
        if self.eval_store is not None:
            micro_batch = self.plan.train_micro_batch_size_per_gpu
            found = evaluate(
                self.engine,
                self.eval_store,
                micro_batch,
                self.ranks,
                self.part,
                self.loss_layer,
                packing=self.plan.training.job.data.packing,
            )
            self.metrics.write_evaluation(self.progress.update, found.loss, found.perplexity, found.targets)
            self.checkpoints.evaluated(self.progress.update, found.loss)
            self.early_stopping.evaluated(self.progress.update, found.loss)

    def save(self) -> None:
        """Saves a checkpoint in the middle of training, in the background if the plan has memory for it."""
        self.phase("saving")
        self.save_state(background=self.plan.training.background_copy_bytes is not None)
        self.phase("training")
        self.metrics.restart_clock()

    def save_state(self, *, background: bool = False) -> None:
        decisions = {**self.guard.state_dict(), "early_stopping": self.early_stopping.state_dict()}
        state = (self.guard.plan.sha256, decisions)
        self.checkpoints.save(self.engine, self.progress, *state, background=background)

    def finish(self) -> None:
        """The end of training: evaluation, checkpoint and export; after a stop, only a checkpoint."""
        if self.stopped:
            self.phase("saving")
            self.save_state()
            reason, code = self.guard.stop_reason, self.guard.stop_code
            update = self.progress.update
            self.control.report(
                StoppedReport(report="stopped", time=time.time(), update=update, reason=reason, code=code)
            )
            return
        if self.early_stopping.stop_reason is None:
            self.evaluate()
        if self.plan.job.checkpoint.save_final:
            self.phase("saving")
            self.save_state()
        self.checkpoints.wait()
        # The launcher exports the best checkpoint when the ranks have ended (runs/best_export.py).
        if self.plan.job.export and self.plan.job.export != "best":
            self.phase("exporting")
            self.run.check_attempt()
            export_model(self.engine, self.plan, self.ranks, self.run.export)

    def phase(self, name: Phase) -> None:
        if self.ranks.first:
            update = self.progress.update
            self.control.report(PhaseReport(report="phase", time=time.time(), phase=name, update=update))
