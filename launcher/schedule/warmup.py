"""The ways in which a job can write the length of the warm-up."""

from __future__ import annotations

import math
import re

from launcher.errors import Problem, RequestError

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
_TOKENS = re.compile(r"([0-9.]+(?:e[0-9]+)?)\s*([kmb]?)\s*tokens?", re.IGNORECASE)
_WARMUP_HINT = 'updates (100), a fraction of the run (0.03 or "5%"), or tokens ("2M tokens")'


def whole_updates(number: float) -> int:
    """A number of updates, rounded up."""
    # Round first: 0.07 * 100 is 7.000000000000001 in floats.
    return math.ceil(round(number, 9))


def parse_warmup(value: int | float | str, total_updates: int, tokens_per_update: float | None) -> int:
    """Warm-up in updates, from updates (100), a fraction (0.03, "5%") or tokens ("2M tokens"), rounded up.

    Raises RequestError for anything else, and for tokens if the tokens per update are unknown.
    """
    if isinstance(value, str):
        return _parse_text(value.strip(), total_updates, tokens_per_update)
    if isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise _invalid_warmup(value)
    if isinstance(value, int):
        return value
    if value < 1:
        return whole_updates(value * total_updates)
    if value == 1 or not value.is_integer():
        raise _invalid_warmup(value)
    return int(value)


def _parse_text(text: str, total_updates: int, tokens_per_update: float | None) -> int:
    if match := _TOKENS.fullmatch(text):
        if not tokens_per_update:
            message = f"a warm-up of {text} needs the tokens per update, which are unknown here"
            raise RequestError(Problem(message, key="schedule.warmup", hint="write it in updates or as a fraction"))
        updates = _number(match[1], text) * _UNITS[match[2].lower()] / tokens_per_update
        if not math.isfinite(updates):
            raise _invalid_warmup(text)
        return whole_updates(updates)
    if text.endswith("%"):
        fraction = _number(text[:-1], text) / 100
        if not 0 <= fraction <= 1:
            raise _invalid_warmup(text)
        return whole_updates(fraction * total_updates)
    number = _number(text, text)
    if not math.isfinite(number):
        raise _invalid_warmup(text)
    return parse_warmup(int(text) if text.isdigit() else number, total_updates, tokens_per_update)


def _number(digits: str, text: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise _invalid_warmup(text) from None


def _invalid_warmup(value: object) -> RequestError:
    return RequestError(Problem(f"{value!r} is not a warm-up", key="schedule.warmup", hint=_WARMUP_HINT))
