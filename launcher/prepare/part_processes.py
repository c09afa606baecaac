"""Processes that tokenise parts: `python -m launcher.prepare.part_processes` reads parts and writes results.

They are fresh processes without transformers and torch. Each ends when its standard input does: with its parent.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from launcher.errors import FailureCode, LauncherError, Problem, RequestError
from launcher.prepare.part_tokeniser import PartTokeniser, SplitSettings, TokenisedPart
from launcher.prepare.row_parts import NotLines, Part
from launcher.prepare.text_tokenizer import TextTokenizer, is_sendable

_SIZE = struct.Struct("<q")
_PARTS_HERE = 4
"""So many parts are tokenised in this process before others are started, which takes about a second of CPU time."""
_AHEAD = 2
"""Parts that wait for each process."""
MOST_PROCESSES = 32


def available_cpus(group: Path = Path("/sys/fs/cgroup")) -> int:
    """The CPUs that this process may use: its affinity, and the limit of its control group (version 2)."""
    cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


class PartProcesses:
    """Tokenises parts in `processes` processes, in order.

    None: as many as there are CPUs, at most 32, and the first parts in this process. 1: in this process alone.
    """

    def __init__(self, tokenizer: TextTokenizer, max_length: int, processes: int | None = None) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._here = PartTokeniser(tokenizer, max_length)
        self._parts_here = _PARTS_HERE if processes is None else 0
        self._count = processes or min(available_cpus(), MOST_PROCESSES)
        self._started: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()

    def __enter__(self) -> PartProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.end()

    def tokenise(self, parts: Iterable[Part], split: SplitSettings) -> Iterator[TokenisedPart]:
        """The results in the order of `parts`. Raises the first error in that order: as `PartTokeniser.tokenise` does.

        Raises LauncherError if a process ends.
        """
        parts = iter(parts)
        here = 0 if self._started else self._parts_here
        while (part := next(parts, None)) is not None:
            if self._count > 1 and here <= 0:
                break
            here -= 1
            yield self._here.tokenise(part, split)
        else:
            return
        parts = itertools.chain([part], parts)
        if not self._start():
            self._count = 1
            yield from self.tokenise(parts, split)
            return
        with ThreadPoolExecutor(self._count) as threads:
            try:
                yield from self._tokenise_there(threads, parts, split)
            except BaseException:
                for process in self._started:
                    process.end()
                raise

    def _tokenise_there(
        self, threads: ThreadPoolExecutor, parts: Iterator[Part], split: SplitSettings
    ) -> Iterator[TokenisedPart]:
        waiting: deque[Future[TokenisedPart]] = deque()
        error: RequestError | None = None
        part: Part | None
        while True:
            while error is None and len(waiting) < _AHEAD * self._count:
                try:
                    part = next(parts, None)
                except RequestError as found:  # a bad row in an earlier part is reported first
                    error, part = found, None
                if part is None:
                    break
                waiting.append(threads.submit(self._ask, part, split))
            if not waiting:
                break
            yield waiting.popleft().result()
        if error is not None:
            raise error

    def _start(self) -> bool:
        """Starts the processes once; False if the tokenizer cannot be sent to them."""
        if not self._started:
            if not is_sendable(self._tokenizer):
                return False
            settings = pickle.dumps((self._tokenizer, self._max_length), protocol=5)
            self._started = [_Process(settings) for _ in range(self._count)]
            for process in self._started:
                self._idle.put(process)
        return True

    def _ask(self, part: Part, split: SplitSettings) -> TokenisedPart:
        process = self._idle.get()
        try:
            return process.tokenise(part, split)
        finally:
            self._idle.put(process)


class _Process:
    def __init__(self, settings: bytes) -> None:
        # -P: do not import a launcher.py or datasets.py from the user's folder.
        command = [sys.executable, "-P", "-m", "launcher.prepare.part_processes"]
        environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._settings: bytes | None = settings
        self._split: SplitSettings | None = None

    def tokenise(self, part: Part, split: SplitSettings) -> TokenisedPart:
        """As `PartTokeniser.tokenise`, in the process. Raises LauncherError if it ends."""
        changed = split if split is not self._split else None
        try:
            if self._settings is not None:
                _send(self._to, self._settings)
                self._settings = None
            _send(self._to, pickle.dumps((part, changed), protocol=5))
            answer = _receive(self._from)
        except (OSError, EOFError, ValueError):
            status = self._process.wait()
            message = f"a process that tokenises ended with status {status}" + (
                ": the memory may be full" if status == -signal.SIGKILL else ""
            )
            raise LauncherError(message, code=FailureCode.PREPARE_FAILED) from None
        self._split = split
        return _result(answer)

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._to.close()
        self._process.wait()


def _result(answer: Any) -> TokenisedPart:
    """The result in an answer. Raises the error in it."""
    if isinstance(answer, TokenisedPart):
        return answer
    kind, content = answer
    if kind == "problems":
        raise RequestError(*(Problem(**problem) for problem in content))
    if kind == "not lines":
        raise NotLines
    raise LauncherError(f"tokenising failed:\n{content}", code=FailureCode.PREPARE_FAILED)


def _send(stream: IO[bytes], content: bytes) -> None:
    stream.write(_SIZE.pack(len(content)))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """The next message. Raises EOFError at the end of the stream."""
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        raise EOFError
    (size,) = _SIZE.unpack(head)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return pickle.loads(content)


def main() -> None:
    """Tokenises the parts from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and so this process
    source, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # only answers go to standard output
    split: SplitSettings | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        tokeniser = PartTokeniser(*_receive(source))
        while True:
            part, changed = _receive(source)
            split = changed or split
            assert split is not None
            _send(answers, pickle.dumps(_answer(tokeniser, part, split), protocol=5))


def _answer(tokeniser: PartTokeniser, part: Part, split: SplitSettings) -> object:
    import traceback

    try:
        return tokeniser.tokenise(part, split)
    except RequestError as error:
        return "problems", [vars(problem) for problem in error.problems]
    except NotLines:
        return "not lines", None
    except Exception:
        return "fault", traceback.format_exc()


if __name__ == "__main__":
    main()
