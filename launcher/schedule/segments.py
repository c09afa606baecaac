"""The curve after the warm-up for shapes that DeepSpeed has no class for: a chain of simple curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import Problem, RequestError, nearest


@dataclass(frozen=True)
class Segment:
    """Part of the curve, from update `start` up to but excluding `end`; shares are fractions of the peak."""

    kind: str
    start: int
    end: int
    from_share: float
    to_share: float


KINDS: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 0.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1.0 - math.cos(math.pi * progress)) / 2.0,
    "1-sqrt": math.sqrt,
}
"""The completed part of the way from the first to the second share, by progress from 0 to 1.

"1-sqrt" is the cool-down of Hägele et al. (arXiv 2405.18392).
"""


def fraction_at(segments: Sequence[Segment], update: int, warmup: int, total: int) -> float:
    """The fraction of the peak at an update after the warm-up; after the run, the last one.

    If the warm-up is longer than the one that the segments were built for, they are compressed evenly into the rest of
    the run.
    """
    if update >= total:
        return segments[-1].to_share if segments else 1.0
    built_for = segments[0].start
    position = float(update)
    if warmup != built_for:
        position = built_for + (update - warmup) * (total - built_for) / (total - warmup)
    segment = next(s for s in segments if position < s.end)
    completed = KINDS[segment.kind]((position - segment.start) / (segment.end - segment.start))
    return segment.from_share + (segment.to_share - segment.from_share) * completed


def _invalid(key: str, message: str, hint: str | None = None) -> RequestError:
    return RequestError(Problem(message=message, key=f"schedule.{key}", hint=hint))


def _position(value: Any, key: str, total: int) -> int:
    """An update number, from an update number or, as a float up to 1, a fraction of the run."""
    if isinstance(value, float) and 0 < value <= 1:
        return round(value * total)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= total:
        return value
    hint = f"an update from 1 to {total}, or a fraction of the run such as 0.8"
    raise _invalid(key, f"{value!r} is not a position in a run of {total} updates", hint)


def _share(value: Any, key: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise _invalid(key, f"{value!r} is not a fraction of the peak", "a number from 0 to 1")


def _chain(pieces: Sequence[tuple[str, int, float, float]], warmup: int) -> tuple[Segment, ...]:
    """Segments from (kind, end, from share, to share), each starting at the end of the one before."""
    chain, start = [], warmup
    for kind, end, from_share, to_share in pieces:
        if end > start:
            chain.append(Segment(kind, start, end, from_share, to_share))
            start = end
    return tuple(chain)


def _step(
    warmup: int, total: int, *, decay_at: Sequence[Any] = (0.5, 0.75), decay_factor: Any = 0.1
) -> tuple[Segment, ...]:
    ends = [_position(value, "decay_at", total) for value in decay_at]
    factors = list(decay_factor) if isinstance(decay_factor, list | tuple) else [decay_factor] * len(ends)
    if len(factors) != len(ends):
        raise _invalid(
            "decay_factor",
            f"{len(ends)} decay positions but {len(factors)} factors",
            "one factor, or one per position",
        )
    if sorted(set(ends)) != ends or (ends and ends[0] <= warmup < total):
        raise _invalid("decay_at", f"decay positions must increase and follow the warm-up of {warmup}, found {ends}")
    shares = [1.0]
    for factor in factors:
        shares.append(shares[-1] * _share(factor, "decay_factor"))
    pieces = zip([*ends, total], shares, strict=True)
    return _chain([("constant", end, share, share) for end, share in pieces], warmup)


def _wsd(
    warmup: int, total: int, *, floor: float, decay_start: Any = 0.8, decay: str = "linear"
) -> tuple[Segment, ...]:
    if decay not in ("linear", "1-sqrt", "cosine"):
        raise _invalid("decay", f"unknown decay {decay!r}", "linear, 1-sqrt or cosine")
    knee = max(_position(decay_start, "decay_start", total), warmup)
    return _chain([("constant", knee, 1.0, 1.0), (decay, total, 1.0, floor)], warmup)


def _cosine_restarts(warmup: int, total: int, *, floor: float, cycles: int = 2) -> tuple[Segment, ...]:
    if not isinstance(cycles, int) or isinstance(cycles, bool) or cycles < 1:
        raise _invalid("cycles", f"expected a whole number of cycles, 1 or more, found {cycles!r}")
    span = total - warmup
    if 0 < span < cycles:
        raise _invalid("cycles", f"{cycles} cycles do not fit into the {span} updates after the warm-up")
    ends = [warmup + round(span * cycle / cycles) for cycle in range(1, cycles + 1)]
    return _chain([("cosine", end, 1.0, floor) for end in ends], warmup)


def _compound(warmup: int, total: int, *, segments: Sequence[Mapping[str, Any]]) -> tuple[Segment, ...]:
    pieces, share, last = [], 1.0, warmup
    for number, given in enumerate(segments):
        key = f"segments[{number}]"
        kind, end, target = _piece(given, key, share, total)
        if warmup < total and end <= last:
            raise _invalid(f"{key}.until", f"the segment ends at update {end}, but the one before it at {last}")
        pieces.append((kind, end, share, target))
        share, last = target, end
    if last < total:
        raise _invalid(
            "segments",
            f"the last segment ends at update {last}, but the run at {total}",
            "end it with until: 1.0",
        )
    return _chain(pieces, warmup)


def _piece(given: Mapping[str, Any], key: str, share: float, total: int) -> tuple[str, int, float]:
    for name in given:
        if name not in ("kind", "until", "to"):
            raise _invalid(f"{key}.{name}", f"a segment has no {name}", "kind, until and to")
    kind = given.get("kind")
    if kind not in KINDS:
        close = nearest(str(kind), KINDS)
        raise _invalid(f"{key}.kind", f"unknown kind {kind!r}", f"did you mean {close}?" if close else ", ".join(KINDS))
    target = share if kind == "constant" else _share(given.get("to"), f"{key}.to")
    if kind == "constant" and given.get("to", share) != share:
        raise _invalid(f"{key}.to", f"a constant segment stays at {share:g}", "remove `to`, or use another kind")
    return str(kind), _position(given.get("until", 1.0), f"{key}.until", total), target


_BUILDERS: dict[str, tuple[Callable[..., tuple[Segment, ...]], tuple[str, ...]]] = {
    "step": (_step, ("decay_at", "decay_factor")),
    "wsd": (_wsd, ("decay_start", "decay")),
    "cosine_restarts": (_cosine_restarts, ("cycles",)),
    "compound": (_compound, ("segments",)),
}
SEGMENT_SHAPES = tuple(_BUILDERS)


def linear_segments(warmup: int, total: int, floor: float) -> tuple[Segment, ...]:
    """A linear decay from the warm-up to `floor`, reached one update after the last; empty if there is no decay."""
    return _chain([("linear", total, 1.0, floor)], warmup)


def build_segments(
    shape: str, warmup: int, total: int, floor: float, options: Mapping[str, Any]
) -> tuple[Segment, ...]:
    """The segments of a shape; empty if the warm-up fills the run. Raises RequestError for an invalid option."""
    build, names = _BUILDERS[shape]
    for option in options:
        if option not in names:
            close = nearest(option, names)
            hint = f"did you mean {close}?" if close else f"valid options: {', '.join(names)}"
            raise _invalid(option, f"a {shape} schedule has no {option}", hint)
    if shape == "compound" and not options.get("segments"):
        raise _invalid("segments", "a compound schedule needs its segments", "a list of {kind, until, to}")
    floors = {"floor": floor} if shape in ("wsd", "cosine_restarts") else {}
    return build(warmup, total, **floors, **options)
