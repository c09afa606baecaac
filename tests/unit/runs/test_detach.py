"""A background process that ends at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import RunFailed
from launcher.run_dir import RunDir
from launcher.runs import detach


def test_a_background_process_that_ends_at_once_is_reported_with_its_output(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "tiny")
    with pytest.raises(RunFailed) as failed:
        detach._start(run, ["run", "--planned", str(tmp_path)])
    assert "the run ended at once, with exit status 2" in str(failed.value)
    assert f"{tmp_path}: it has no plan.json, so it is not a run directory" in str(failed.value)
    assert run.console_file.read_text().strip() in str(failed.value).replace("    ", "")
