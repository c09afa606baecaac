"""The store of one split while it is written, part by part: after a kill, the finished parts are kept."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.files import append_line, write_atomic
from launcher.prepare.part_tokeniser import Counts, TokenisedPart
from launcher.prepare.row_checks import RowChecks
from launcher.token_store import StoreFiles

_PARTS, _FINGERPRINTS = "parts.jsonl", "fingerprints.u64"
SYNC_SECONDS = 1.0
"""How much work a kill can lose. Waiting for the disk after each part would limit many processes."""


class SplitStore:
    """Appends parts to the store in `folder`, and writes their lines to parts.jsonl once they are on disk.

    `counts` and `checks` are those of all parts, `finished` how many parts there are. Continues what an earlier process
    wrote. `identity` describes the source of the parts: parts of another one are not used.
    """

    def __init__(self, folder: Path, identity: str, checks: RowChecks) -> None:
        self.folder, self.counts, self.checks, self.finished = folder, Counts(), checks, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = folder / _PARTS
        self._pending: list[dict[str, Any]] = []
        self._synced = time.monotonic()
        lines = list(_lines(self._journal, identity))
        try:
            self._files = StoreFiles(folder, lines[-1]["sequences"] if lines else 0)
            fingerprints = lines[-1]["fingerprints"] if lines else 0
            self._fingerprints = (folder / _FINGERPRINTS).open("r+b" if fingerprints else "w+b")
            checks.fingerprints.fromfile(self._fingerprints, fingerprints)
        except (OSError, EOFError):  # a lost file: start from scratch
            lines = []
            self._files, self._fingerprints = StoreFiles(folder), (folder / _FINGERPRINTS).open("w+b")
            del checks.fingerprints[:]
        self._fingerprints.truncate(8 * len(checks.fingerprints))
        self._fingerprints.seek(8 * len(checks.fingerprints))
        for line in lines:
            self.counts.add(Counts.from_json(line["counts"]))
            checks.missing.update(line["missing"])
            for column, location in line["first_missing"].items():
                checks.first_missing.setdefault(column, location)
        self.finished = len(lines)
        kept = [{"identity": identity}, *lines]  # without the line that a kill has cut off
        write_atomic(self._journal, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, part: TokenisedPart) -> None:
        """Adds a part. Now and then waits until all parts are on disk. Raises OSError."""
        self._files.append(part.sequences)
        part.checks.fingerprints.tofile(self._fingerprints)
        self.counts.add(part.counts)
        self.checks.add(part.checks)
        self.finished += 1
        self._pending.append(
            {
                "sequences": self._files.sequences,
                "fingerprints": len(self.checks.fingerprints),
                "counts": part.counts.to_json(),
                "missing": part.checks.missing,
                "first_missing": part.checks.first_missing,
            }
        )
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        self._fingerprints.flush()
        os.fsync(self._fingerprints.fileno())
        self._files.sync()
        for line in self._pending:
            append_line(self._journal, line)
        self._pending.clear()
        self._synced = time.monotonic()

    def facts(self) -> dict[str, int]:
        """Counts of the sequences and tokens, and the longest sequence."""
        return self._files.facts()

    def complete(self) -> None:
        """Closes the files and writes the counts. The journal is removed by `remove_journal`."""
        self._sync()
        self.close()
        self._files.complete()

    def close(self) -> None:
        """Closes the files."""
        self._files.close()
        self._fingerprints.close()


def remove_journal(folder: Path) -> None:
    """Removes what only a process that continues needs from a complete store."""
    for name in (_PARTS, _FINGERPRINTS):
        (folder / name).unlink(missing_ok=True)


def _lines(journal: Path, identity: str) -> Iterator[dict[str, Any]]:
    """The lines of the finished parts; none if the parts are of another source, or no journal exists."""
    with contextlib.suppress(OSError, ValueError), journal.open() as file:
        if json.loads(file.readline()) != {"identity": identity}:
            return
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)
