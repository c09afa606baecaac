"""`launcher cancel`: stop a run, wherever it runs."""

from __future__ import annotations

from pathlib import Path

import typer

from launcher.cli.options import OUTPUT_DIR, RUN, reading


def cancel(
    run: str = RUN,
    now: bool = typer.Option(False, "--now", help="Stop at once, without a checkpoint."),
    wait: bool = typer.Option(True, help="Wait until the run has ended."),
    output_dir: Path = OUTPUT_DIR,
) -> None:
    """Stop a run wherever it runs: after its update and a checkpoint, or at once with --now.

    The request goes through the run directory. If nobody receives it, cancel waits as long as the run shows signs of
    life; with --now it cancels the run's Slurm job instead. If the run has ended but Slurm has queued its job again,
    that job is cancelled.
    """
    from launcher.runs.cancel import cancel_run
    from launcher.watch.find_run import find_run

    with reading():
        cancel_run(find_run(run, output_dir), now=now, wait=wait, echo=typer.echo)
