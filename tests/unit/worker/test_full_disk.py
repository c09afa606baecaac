"""A full disk is named as the reason of an error that does not name it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from launcher.errors import FailureCode, RunFailed
from launcher.worker.full_disk import is_full, naming_full_disk


def test_an_error_of_a_full_disk_becomes_a_failure_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFailed) as caught, naming_full_disk(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.code is FailureCode.DISK_FULL
    assert str(caught.value).startswith(f"cannot write to {tmp_path}: the disk is full, or a quota is used up (OSError")


@pytest.mark.parametrize("error", [ValueError("odd rows"), RunFailed("given up", code=FailureCode.ENDED)])
def test_another_error_is_unchanged(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, naming_full_disk(tmp_path):
        raise error
    assert caught.value is error and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_not_full(tmp_path: Path) -> None:
    assert not is_full(tmp_path / "gone")
