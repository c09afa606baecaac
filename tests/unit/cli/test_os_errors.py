"""A full disk and missing permissions in the processes that measure and export: a message and a code."""

from __future__ import annotations

import errno
import os

import pytest

from launcher.errors import FailureCode, LauncherError, needs_no_traceback, os_error_text
from launcher.prepare import _answer
from launcher.runs.export import _handle_message


@pytest.mark.parametrize(
    ("number", "plain"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, True), (errno.EIO, False)]
)
def test_a_full_disk_and_missing_permissions_need_no_traceback(number: int, plain: bool) -> None:
    error = OSError(number, os.strerror(number), "/cache/x")
    assert needs_no_traceback(error) is plain
    assert os_error_text(error) == f"/cache/x: {os.strerror(number)}"
    assert not needs_no_traceback(ValueError("No space left on device"))


def test_the_failure_code_of_the_process_is_kept() -> None:
    with pytest.raises(LauncherError, match=r"measuring failed: /cache/x: full\n  the cache is in") as caught:
        _answer({"failed": "/cache/x: full", "code": "disk_full"}, lambda _: None)
    assert caught.value.code is FailureCode.DISK_FULL
    with pytest.raises(LauncherError, match="not written") as caught:
        _handle_message({"error": "not written", "code": "disk_full"}, lambda _: None)
    assert caught.value.code is FailureCode.DISK_FULL
