"""The output of a run: its pipe may be closed, and the progress of tokenising."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from launcher.runs.console import RunConsole


def test_a_run_continues_when_its_output_pipe_is_closed(tmp_path: Path) -> None:
    code = (
        "from launcher.runs.console import RunConsole\nconsole = RunConsole()\n"
        "for update in range(99): console.note('x' * 9999)\nopen('end', 'w').close()"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr, (tmp_path / "end").exists()) == (0, "", True)


def test_tokenising_is_printed_with_its_speed_and_the_time_left() -> None:
    output = io.StringIO()
    console = RunConsole(Console(file=output, width=120))
    running = {"message": "tokenising data.train", "done": 1200, "total": 90_000, "rows_per_second": 1234.5}
    console.prepare({"message": "measuring the model"})
    console.prepare({**running, "seconds_left": None})
    console.prepare({**running, "seconds_left": 72})
    console.prepare({**running, "done": 90_000, "seconds_left": 0})
    assert [line.strip() for line in output.getvalue().splitlines()] == [
        "measuring the model",
        "tokenising data.train 1200/90000 rows, 1,234 rows/s",
        "tokenising data.train 1200/90000 rows, 1,234 rows/s, 1 min 12 s left",
        "tokenising data.train 90000/90000 rows",
    ]
