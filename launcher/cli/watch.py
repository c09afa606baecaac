"""`launcher watch`: a run live in the terminal."""

from __future__ import annotations

from pathlib import Path

from launcher.cli.options import OUTPUT_DIR, RUN, reading


def watch(run: str = RUN, output_dir: Path = OUTPUT_DIR) -> None:
    """Show a run live until it ends: its status, and small plots of loss and learning rate.

    The screen is drawn anew every two seconds; where there are more nodes than it has lines, those that stand out come
    first. Without a terminal there is a line every ten seconds when something has changed. At the end the status stays,
    and of a failed run why it failed. The exit status is 0 however the run ended.
    """
    from launcher.watch.find_run import find_run
    from launcher.watch.screen import watch_run
    from launcher.watch.status_report import status_console, status_view
    from launcher.watch.why import explain, why_view

    with reading():
        found = find_run(run, output_dir)
        console = status_console()
        ended = watch_run(found, console)
        console.print(status_view(ended))
        if ended.state not in ("finished", "stopped"):
            console.print(why_view(explain(found)), soft_wrap=True)
