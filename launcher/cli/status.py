"""`launcher status`: where runs stand."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from launcher.cli.options import OUTPUT_DIR, reading


def status(
    run: str = typer.Argument(
        None, metavar="[RUN]", help="A run, as a folder, by its name or its job's; all runs without it."
    ),
    output_dir: Path = OUTPUT_DIR,
    json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Show where a run stands, with a row a node; without RUN all runs, newest first.

    A node is marked slow where the time of its own work in an update (of the whole update, where that is not known) is
    beyond 1.25 times the median of the nodes, with those of its ranks that are, and stale where its agent has written
    nothing for 30 seconds. A run is "lost" if its state says that it is alive but no launcher holds its directory
    (seen from another host: for a minute), and "unreadable" in the list if you may not read it.

    --json prints an object, or a list of them without `nodes` and `compared`, with the keys: name, path, state,
    written_state, state_seconds, reason, code, began, host, pid, slurm_job_id, ray_job_id, updates, total_updates,
    left_seconds, loss, lr, tokens_per_second, step_seconds, silent_seconds, compared, and nodes, each with node_rank,
    host, ranks, ranks_alive, exit_codes, phase, updates, step_seconds, own_seconds, rank_own_seconds, ratio,
    straggler, slow_ranks, cpus, cpu_percent, memory_used_bytes, memory_bytes, gpus, gpu_percent,
    gpu_memory_used_bytes, gpu_memory_total_bytes, heartbeat_seconds, stale, ended. null is what is not known.
    """
    from launcher.watch.find_run import find_run, runs_under
    from launcher.watch.status import read_status, read_status_for_list
    from launcher.watch.status_report import runs_view, status_console, status_json, status_view

    with reading():
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
