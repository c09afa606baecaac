"""`launcher why`: what went wrong with a run."""

from __future__ import annotations

from pathlib import Path

from launcher.cli.options import OUTPUT_DIR, RUN, reading


def why(run: str = RUN, output_dir: Path = OUTPUT_DIR) -> None:
    """Say what went wrong with a run: the first rank that failed, where, how, and the end of its log.

    Ranks that failed alike are counted, those that only fell in a collective afterwards are told as such, and for a
    well-known cause there is a line on what to do.
    """
    from rich.console import Console

    from launcher.watch.find_run import find_run
    from launcher.watch.why import explain, why_view

    with reading():
        Console(highlight=False).print(why_view(explain(find_run(run, output_dir))), soft_wrap=True)
