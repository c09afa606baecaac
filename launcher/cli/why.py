"""`launcher why`: explain why a run failed."""

from __future__ import annotations

from pathlib import Path

from launcher.cli.options import OUTPUT_DIR, RUN, exiting_cleanly


def why(run: str = RUN, output_dir: Path = OUTPUT_DIR) -> None:
    """Explain why a run failed: the rank that failed first, its host, its error and the end of its log.

    Ranks with the same failure are counted, and ranks that failed later because a peer was lost are listed as such. For
    a known cause, a hint says what to do.
    """
    from rich.console import Console

    from launcher.watch.find_run import find_run
    from launcher.watch.why import explain, why_view

    with exiting_cleanly():
        Console(highlight=False).print(why_view(explain(find_run(run, output_dir))), soft_wrap=True)
