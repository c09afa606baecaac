"""`launcher status`: the state of runs."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from launcher.cli.options import OUTPUT_DIR, exiting_cleanly


def status(
    run: str = typer.Argument(
        None, metavar="[RUN]", help="A run directory, a run's name or a job's name. Default: all runs."
    ),
    output_dir: Path = OUTPUT_DIR,
    json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Show the state of a run, with one row per node; without RUN all runs, newest first.

    A node is marked slow if the time of its own work per update is above 1.25 times the median of all nodes, with the
    ranks for which this is true. If that time is unknown, the time of the whole update is compared. A node is marked
    stale if its agent has written nothing for 30 seconds.

    A run is "lost" if its state is that of a live run but no launcher holds the lock of its directory (on another host:
    no heartbeat for a minute). In the list of runs, a run that you do not have permission to read is "unreadable".

    --json prints an object; without RUN a list of objects, without `nodes` and `compared`. Unknown values are null. The
    keys are: name, path, state, written_state, state_seconds, reason, code, began, host, pid, slurm_job_id, ray_job_id,
    continued_by, updates, total_updates, left_seconds, loss, lr, tokens_per_second, step_seconds, tflops, mfu,
    silent_seconds, compared, spare_nodes, excluded_nodes, nodes.

    The keys of each node are: node_rank, host, ranks, ranks_alive, exit_codes, phase, updates, step_seconds,
    own_seconds, rank_own_seconds, ratio, straggler, slow_ranks, cpus, cpu_percent, memory_used_bytes, memory_bytes,
    gpus, gpu_percent, gpu_memory_used_bytes, gpu_memory_total_bytes, heartbeat_seconds, stale, ended.
    """
    from launcher.watch.find_run import find_run, runs_under
    from launcher.watch.status import read_status, read_status_for_list
    from launcher.watch.status_report import runs_view, status_console, status_json, status_view

    with exiting_cleanly():
        now = time.time()
        if run is not None:
            one = read_status(find_run(run, output_dir), now)
            typer.echo(status_json(one)) if json else status_console().print(status_view(one))
            return
        all_runs = [read_status_for_list(found, now) for found in runs_under(output_dir)]
        all_runs.sort(key=lambda found: (found.began or "", found.name), reverse=True)
        if json:
            typer.echo(status_json(all_runs))
        elif all_runs:
            status_console().print(runs_view(all_runs))
        else:
            typer.echo(f"no runs in {output_dir}")
