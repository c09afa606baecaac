"""Seeded cases of a fuzz test, mutations of bytes and values, and the check that only launcher errors are raised."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

from launcher.cli.show_error import show_error
from launcher.errors import LauncherError
from tests.time_limit import TIME_LIMIT_SECONDS

SEED = int(os.environ.get("LAUNCHER_FUZZ_SEED", "1"))
FACTOR = float(os.environ.get("LAUNCHER_FUZZ_FACTOR", "1"))
MOST_LINES = 60
"""Of an error: 20 problems, each with a hint."""

NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 7, 255, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**400)),
    *(0.5, -0.5, 1e-320, 1e308, -0.0, float("nan"), float("inf"), float("-inf")),
)
TEXTS: tuple[Any, ...] = (
    *("", " ", "a", "-", "--x", "auto", "null", "true", "1", "1e400", "5e8", "NaN", "a.b", "[0]", "{}", "1:30"),
    *("\n", "a\nb", "\r", "\x00", "\x1b[2J", "\x85", "\u2028", "\ud800", "\ufeff", "é", "文", "\U0001f600", "٣"),
    *("/", "/etc/passwd", "../..", ".", "..", "~", "~nobody", "~no-such-user/x", "$(touch x)", "`touch x`"),
    *("; touch x", "' touch x '", '" touch x "', "\\", "%", "{{ x }}", "{% x %}", "a" * 300, "9" * 5000),
    *("²", "1e4", "3%", "2M tokens", "9" * 400 + "M tokens", "24:00:00", "2026-13-45", "0x1f", "1_000", "%s%n"),
    *("/dev/null", "../../x", "<<", "\t", "é" * 200, "x/" * 3000),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": 1}, {"": {}}, [1, 2], ["a", 1])
VALUES = (*NUMBERS, *TEXTS, *OTHERS)
PIECES = (
    *(b"\x00", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r\n", b"\t", b": ", b"- ", b"{", b"}"),
    *(b"[", b"]", b",", b'"', b"'", b"#", b"|", b">", b"&a ", b"*a", b"<<: *a", b"? ", b"!!int ", b"!!float "),
    *(b"!!bool ", b"!!timestamp ", b"!!binary ", b"!!set ", b"!!omap ", b"!!pairs ", b"!!null ", b"!!map "),
    *(b"!!seq ", b"!!python/object/apply:os.system [touch x]", b"---\n", b"...\n", b"\\", b"/*", b"//", b"%YAML"),
    *(b"1e999", b"-", b"0x", b"NaN", b"-Infinity", b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 2000, b"{a: " * 2000),
    *(b"2026-13-45", b"12:61:00", b"!x ", b"=", b"\x1b"),
)


def cases(name: str, count: int) -> Iterator[random.Random]:
    """A random generator for each case of a test: the same ones for the same seed."""
    for number in range(round(count * FACTOR)):
        yield random.Random(f"{SEED} {name} {number}")


def check(shown: Any, call: Callable[[], object]) -> bool:
    """Calls `call`; returns whether it raised a LauncherError that can be printed.

    Any other exception fails, with the seed and `shown`.
    """
    try:
        with _time_limit():
            call()
    except LauncherError as error:
        message = printed(error)
        what = f"seed {SEED}, input {shown!r}: {message!r}"
        assert message.strip() != "error:" and "\x1b" not in message and message.count("\n") <= MOST_LINES, what
        return True
    except BaseException as error:
        raise AssertionError(f"seed {SEED}, input {shown!r}: {type(error).__name__}: {str(error)[:300]}") from error
    return False


def printed(error: LauncherError) -> str:
    """What a command prints for an error."""
    with contextlib.redirect_stderr(io.StringIO()) as output:
        show_error(error)
    return output.getvalue()


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def end(*_: object) -> None:
        raise TimeoutError("the call does not return")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """A copy of `data` with up to three changes: bytes removed, doubled, replaced, or special pieces put in."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((0, 1, 1, 3, 20)))
        middle = rng.choice((b"", rng.choice(PIECES), rng.choice(PIECES), rng.randbytes(1), data[start:end] * 2))
        data = data[:start] + middle + data[end:]
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data


def mutated(rng: random.Random, value: Any) -> Any:
    """A copy of `value` with up to three of its parts, at any depth, replaced, removed, moved or added."""
    value = json.loads(json.dumps(value)) if isinstance(value, dict | list) else value
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return any_value(rng)
        holder, key = rng.choice(places)
        action = rng.random()
        if action < 0.65:
            holder[key] = _other(rng, holder[key])
        elif action < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice((f"{key}x", rng.choice(TEXTS), rng.choice(places)[1]))] = any_value(rng)
        else:
            holder.insert(rng.randrange(len(holder) + 1), any_value(rng))
    return value


def any_value(rng: random.Random) -> Any:
    """One of VALUES."""
    return copy.deepcopy(rng.choice(VALUES))


def _other(rng: random.Random, value: Any) -> Any:
    """Another value in place of `value`: two times in three one of its type, so that more than the types is tested."""
    if rng.random() < 0.33 or value is None:
        return any_value(rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((*NUMBERS, -value, value * 3, value / 7 if abs(value) < 1e300 else 0, str(value)))
    if isinstance(value, str):
        return rng.choice((rng.choice(TEXTS), value + str(rng.choice(TEXTS)), value.upper(), value[1:]))
    return copy.deepcopy(rng.choice(OTHERS))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(part)
