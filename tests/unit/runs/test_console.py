"""The output of a run whose pipe is closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


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
