"""`launcher watch`: show a run live in the terminal."""

from __future__ import annotations

from pathlib import Path

from launcher.cli.options import OUTPUT_DIR, RUN, exiting_cleanly


def watch(run: str = RUN, output_dir: Path = OUTPUT_DIR) -> None:
    """Show a run live until it ends: its status, and small plots of loss and learning rate.

    The screen is redrawn every two seconds. If it has too few lines for all nodes, nodes with problems come first.
    Without a terminal, a line is printed every ten seconds if something has changed. At the end the status is printed,
    and for a failed run the cause. The exit status is 0 whether or not the run failed.
    """
    from launcher.watch.find_run import find_run
    from launcher.watch.screen import watch_run
    from launcher.watch.status_report import status_console, status_view
    from launcher.watch.why import explain, why_view

    with exiting_cleanly():
        found = find_run(run, output_dir)
        console = status_console()
        ended = watch_run(found, console)
        console.print(status_view(ended))
        if ended.state not in ("finished", "stopped"):
            console.print(why_view(explain(found)), soft_wrap=True)
