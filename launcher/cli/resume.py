"""`launcher resume`: resume a run from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import typer

from launcher.cli.options import OUTPUT_DIR, OVERRIDES, RUN
from launcher.runs.resume import resume as resume_run
from launcher.watch.find_run import find_run


def resume(
    run: str = RUN,
    overrides: list[str] = OVERRIDES,
    output_dir: Path = OUTPUT_DIR,
) -> None:
    """Resume a stopped or failed run from its newest checkpoint, also with another number of ranks or batch size.

    After a change of batch size or number of ranks, the learning rate continues at the same number of samples. After a
    change of schedule, the new one starts at the update that the run has reached.
    """
    result = resume_run(find_run(run, output_dir).path, *(overrides or ()))
    raise typer.Exit(result.exit_status)
