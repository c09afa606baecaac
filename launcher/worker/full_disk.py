"""A full disk as the reason of a failure: what libraries raise then often does not name it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import FailureCode, RunFailed, code_of, first_line

_PROBE_BYTES = 2**20


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Raises RunFailed instead of an error in the block that has no other code, if the disk of `folder` is full."""
    try:
        yield
    except Exception as error:
        known = code_of(error)
        if known is FailureCode.DISK_FULL or (known is FailureCode.UNKNOWN and is_full(folder)):
            reason = f"{type(error).__name__}: {first_line(error)}"
            message = f"cannot write to {folder}: the disk is full, or a quota is used up ({reason})"
            raise RunFailed(message, code=FailureCode.DISK_FULL) from error
        raise


def is_full(folder: Path) -> bool:
    """Whether a small file cannot be written to the folder because the disk is full or a quota is used up."""
    probe = folder / f".{uuid.uuid4().hex[:8]}.probe"
    try:
        probe.write_bytes(b"\0" * _PROBE_BYTES)
    except OSError as error:
        return code_of(error) is FailureCode.DISK_FULL
    finally:
        probe.unlink(missing_ok=True)
    return False
