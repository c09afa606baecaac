"""Random inputs: valid values with random changes, and bytes with random changes."""

from __future__ import annotations

import copy
import io
import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from random import Random
from typing import Any

from launcher.cli.show_error import show_error
from launcher.errors import LauncherError

SEED = int(os.environ.get("LAUNCHER_FUZZ_SEED", "1"))
FACTOR = float(os.environ.get("LAUNCHER_FUZZ_FACTOR", "1"))
MOST_LINES = 60
"""The longest error: 20 problems, each with a hint."""

HUGE = (2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, -(10**400), 1e308, -1e308, 5e-324)
NUMBERS = (*HUGE, 0, 1, -1, 2, 7, 0.5, -0.0, 1e-9, 3.0, float("nan"), float("inf"), -float("inf"))
TEXTS = (
    *(
        "",
        " ",
        "auto",
        "x",
        "é文\U0001f600",
        "\ud800",
        "\x00",
        "\x1b[2J",
        "a\nb",
        "\u2028",
        "\t",
        "true",
        "null",
        "1e4",
    ),
    *("..", "/", "/dev/null", "../../x", "~", "~nobody/x", "~no-such-user/x", "-x", "--", "{", "[", "%s%n", "x" * 5000),
    *("$(touch INJECTED)", "`touch INJECTED`", "; touch INJECTED", "' ; touch INJECTED '", '"$(touch INJECTED)"'),
    *(
        "2026-13-45",
        "24:00:00",
        "0x1f",
        "1_000",
        "٣",
        "²",
        "9" * 5000,
        "1" + "0" * 400,
        "NaN",
        ".inf",
        "2M tokens",
        "3%",
    ),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": 1}, {"": ""}, [1, "x"], {"a": {"b": []}})


def value(random: Random) -> Any:
    """Any value that JSON or YAML can express."""
    kind = random.random()
    if kind < 0.35:
        return random.choice(NUMBERS)
    if kind < 0.75:
        return random.choice(TEXTS)
    return copy.deepcopy(random.choice(OTHERS))


def mutated(random: Random, data: Any) -> Any:
    """A copy of `data` in which one to three parts, at any depth, are replaced, removed, repeated or added."""
    data = copy.deepcopy(data)
    for _ in range(random.randint(1, 3)):
        data = _changed(random, data)
    return data


def _changed(random: Random, data: Any) -> Any:
    inner = list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    if not inner or random.random() < 0.05:
        return value(random)
    key = random.choice(inner)
    if isinstance(data[key], dict | list) and data[key] and random.random() < 0.8:
        data[key] = _changed(random, data[key])
        return data
    action = random.randrange(6)
    if action == 0:
        del data[key]
    elif action == 1 and isinstance(data, dict):
        data[random.choice(TEXTS)] = value(random)
    elif action == 2:
        new = copy.deepcopy(data[key])
        if isinstance(data, list):
            data.append(new)
        else:
            data[random.choice(list(data))] = new
    else:
        data[key] = value(random)
    return data


def damaged(random: Random, data: bytes) -> bytes:
    """The bytes with one to four cuts, changed bytes, repeated or inserted pieces."""
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(data))
        end = min(len(data), at + random.choice((1, 1, 2, 8, 64)))
        action = random.randrange(6)
        if action == 0:
            data = data[:at]
        elif action == 1:
            data = data[:at] + data[end:]
        elif action == 2:
            data = data[:at] + data[at:end] * random.choice((2, 3, 50)) + data[end:]
        elif action == 3:
            data = data[:at] + random.randbytes(random.randint(1, 4)) + data[end:]
        elif action == 4:
            data = data[:at] + random.choice(TEXTS).encode(errors="surrogatepass") + data[at:]
        else:
            signs = (
                b"{",
                b"}",
                b"[",
                b":",
                b"- ",
                b"&a ",
                b"*a",
                b"<<: *a",
                b"!!python/name:os.system ",
                b"\n",
                b"#",
                b"|",
            )
            data = data[:at] + random.choice(signs) + data[at:]
    return data


def as_json(data: Any) -> bytes:
    """JSON with lone surrogates, NaN and Inf, as a damaged or hostile file may have them."""
    return json.dumps(data).encode()


def inputs(name: str, count: int) -> Iterator[Random]:
    """A source of randomness for each of `count` inputs; the same for the same seed and name."""
    for number in range(int(count * FACTOR)):
        yield Random(f"{SEED}-{name}-{number}")


@contextmanager
def only_launcher_errors(given: Any) -> Iterator[None]:
    """Fails, with the seed and the input, for any exception but a LauncherError with a short message."""
    try:
        yield
    except LauncherError as error:
        shown = io.StringIO()
        with redirect_stderr(shown):
            show_error(error)
        message = shown.getvalue()
        assert message.strip() != "error:", _report(given, "an empty message")
        assert len(message.splitlines()) <= MOST_LINES and "\x1b" not in message, _report(given, message)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(_report(given, traceback.format_exc())) from error


def _report(given: Any, problem: str) -> str:
    return f"LAUNCHER_FUZZ_SEED={SEED}, the input is {given!r}:\n{problem}"
