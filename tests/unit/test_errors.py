"""The code of every error, and a full disk and missing permissions without a traceback."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from launcher.errors import (
    FailureCode,
    LauncherError,
    RequestError,
    RunFailed,
    code_of,
    needs_no_traceback,
    os_error_text,
)
from launcher.prepare import _answer
from launcher.runs.export import _handle_message


class Coded(RunFailed):
    """An error class with its own code."""

    code = FailureCode.OUT_OF_STEP


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunFailed("a", code=FailureCode.NETWORK), "network"),
        (RunFailed("a"), "unknown"),
        (Coded("a"), "out_of_step"),
        (Coded("a", code=FailureCode.PLAN_DIFFERS), "plan_differs"),
        (RequestError("a"), "user_error"),
        (OSError(errno.ENOSPC, "a"), "disk_full"),
        (OSError(errno.EDQUOT, "a"), "disk_full"),
        (PermissionError(errno.EACCES, "a"), "permission"),
        (FileNotFoundError(errno.ENOENT, "a"), "missing_file"),
        (OSError("without a number"), "unknown"),
        (MemoryError(), "out_of_memory"),
        (ValueError("a"), "unknown"),
    ],
)
def test_every_error_has_a_code(error: BaseException, code: str) -> None:
    assert code_of(error) == code
    # Errors travel from an agent through Ray.
    again = pickle.loads(pickle.dumps(error))
    assert (code_of(again), str(again)) == (code, str(error))


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
