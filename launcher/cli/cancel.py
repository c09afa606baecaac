"""`launcher cancel`: stop a run on any host."""

from __future__ import annotations

from pathlib import Path

import typer

from launcher.cli.options import OUTPUT_DIR, RUN, exiting_cleanly


def cancel(
    run: str = RUN,
    now: bool = typer.Option(False, "--now", help="Stop at once without saving."),
    wait: bool = typer.Option(True, help="Wait until the run has ended."),
    output_dir: Path = OUTPUT_DIR,
) -> None:
    """Stop a run on any host: after the current update and a checkpoint, or at once with --now.

    The request goes through the run directory. If no launcher receives it, cancel waits as long as the run has a
    heartbeat; with --now it cancels the run's Slurm job instead. If the run has ended, a job that Slurm has requeued or
    that was submitted to continue the run (slurm.resubmit) is cancelled.
    """
    from launcher.runs.cancel import cancel_run
    from launcher.watch.find_run import find_run

    with exiting_cleanly():
        cancel_run(find_run(run, output_dir), now=now, wait=wait, echo=typer.echo)
