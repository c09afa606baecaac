"""What follows the warm-up in shapes that DeepSpeed has no class for: a chain of simple curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import Problem, RequestError, nearest


@dataclass(frozen=True)
class Segment:
    """A stretch of the curve from update `start` up to, without, update `end`; shares are of the peak."""

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
"""How much of the way from the first to the second share is gone, by progress from 0 to 1.

"1-sqrt" is the cool-down of Hägele et al. (arXiv 2405.18392).
"""


def share_at(segments: Sequence[Segment], update: int, warmup: int, total: int) -> float:
    """The share of the peak at an update after the warm-up; past the run, the last one.

    With a warm-up longer than the one that the segments were laid out for, they are squeezed evenly into what
    is left of the run.
    """
    if update >= total:
        return segments[-1].to_share if segments else 1.0
    laid_out = segments[0].start
    position = float(update)
    if warmup != laid_out:
        position = laid_out + (update - warmup) * (total - laid_out) / (total - warmup)
    segment = next(s for s in segments if position < s.end)
    gone = KINDS[segment.kind]((position - segment.start) / (segment.end - segment.start))
    return segment.from_share + (segment.to_share - segment.from_share) * gone


def _bad(key: str, message: str, hint: str | None = None) -> RequestError:
    return RequestError(Problem(message=message, key=f"schedule.{key}", hint=hint))


def _position(value: Any, key: str, total: int) -> int:
    """An update from an update number or, as a float up to 1, a share of the run."""
    if isinstance(value, float) and 0 < value <= 1:
        return round(value * total)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= total:
        return value
    hint = f"an update from 1 to {total}, or a share of the run such as 0.8"
    raise _bad(key, f"{value!r} is no position in a run of {total} updates", hint)


def _share(value: Any, key: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise _bad(key, f"{value!r} is no share of the peak", "a number from 0 to 1")


def _chain(pieces: Sequence[tuple[str, int, float, float]], warmup: int) -> tuple[Segment, ...]:
    """Segments from (kind, end, from share, to share), each starting where the one before ends."""
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
        raise _bad(
            "decay_factor",
            f"{len(ends)} decay positions and {len(factors)} factors",
            "one factor, or as many",
        )
    if sorted(set(ends)) != ends or (ends and ends[0] <= warmup < total):
        raise _bad("decay_at", f"decay positions must rise and follow the warm-up of {warmup}, got {ends}")
    shares = [1.0]
    for factor in factors:
        shares.append(shares[-1] * _share(factor, "decay_factor"))
    pieces = zip([*ends, total], shares, strict=True)
    return _chain([("constant", end, share, share) for end, share in pieces], warmup)


def _wsd(
    warmup: int, total: int, *, floor: float, decay_start: Any = 0.8, decay: str = "linear"
) -> tuple[Segment, ...]:
    if decay not in ("linear", "1-sqrt", "cosine"):
        raise _bad("decay", f"no decay {decay!r}", "linear, 1-sqrt or cosine")
    knee = max(_position(decay_start, "decay_start", total), warmup)
    return _chain([("constant", knee, 1.0, 1.0), (decay, total, 1.0, floor)], warmup)


def _cosine_restarts(warmup: int, total: int, *, floor: float, cycles: int = 2) -> tuple[Segment, ...]:
    if not isinstance(cycles, int) or isinstance(cycles, bool) or cycles < 1:
        raise _bad("cycles", f"a whole number of cycles, 1 or more, got {cycles!r}")
    span = total - warmup
    if 0 < span < cycles:
        raise _bad("cycles", f"{cycles} cycles do not fit into the {span} updates after the warm-up")
    ends = [warmup + round(span * cycle / cycles) for cycle in range(1, cycles + 1)]
    return _chain([("cosine", end, 1.0, floor) for end in ends], warmup)


def _compound(warmup: int, total: int, *, segments: Sequence[Mapping[str, Any]]) -> tuple[Segment, ...]:
    pieces, share, last = [], 1.0, warmup
    for number, given in enumerate(segments):
        key = f"segments[{number}]"
        kind, end, target = _piece(given, key, share, total)
        if warmup < total and end <= last:
            raise _bad(f"{key}.until", f"it ends at update {end}, and the one before it at {last}")
        pieces.append((kind, end, share, target))
        share, last = target, end
    if last < total:
        raise _bad(
            "segments",
            f"the last segment ends at update {last} and the run at {total}",
            "end it with until: 1.0",
        )
    return _chain(pieces, warmup)


def _piece(given: Mapping[str, Any], key: str, share: float, total: int) -> tuple[str, int, float]:
    for name in given:
        if name not in ("kind", "until", "to"):
            raise _bad(f"{key}.{name}", f"a segment has no {name}", "kind, until and to")
    kind = given.get("kind")
    if kind not in KINDS:
        close = nearest(str(kind), KINDS)
        raise _bad(f"{key}.kind", f"no kind {kind!r}", f"did you mean {close}?" if close else ", ".join(KINDS))
    target = share if kind == "constant" else _share(given.get("to"), f"{key}.to")
    if kind == "constant" and given.get("to", share) != share:
        raise _bad(f"{key}.to", f"a constant segment stays at {share:g}", "leave `to` out, or take another kind")
    return str(kind), _position(given.get("until", 1.0), f"{key}.until", total), target


_BUILDERS: dict[str, tuple[Callable[..., tuple[Segment, ...]], tuple[str, ...]]] = {
    "step": (_step, ("decay_at", "decay_factor")),
    "wsd": (_wsd, ("decay_start", "decay")),
    "cosine_restarts": (_cosine_restarts, ("cycles",)),
    "compound": (_compound, ("segments",)),
}
SEGMENT_SHAPES = tuple(_BUILDERS)


def build_segments(
    shape: str, warmup: int, total: int, floor: float, options: Mapping[str, Any]
) -> tuple[Segment, ...]:
    """The segments of a shape, none where the warm-up fills the run; raises RequestError for a bad option."""
    build, names = _BUILDERS[shape]
    for option in options:
        if option not in names:
            close = nearest(option, names)
            hint = f"did you mean {close}?" if close else f"it has {', '.join(names)}"
            raise _bad(option, f"a {shape} schedule has no {option}", hint)
    if shape == "compound" and not options.get("segments"):
        raise _bad("segments", "a compound schedule needs its segments", "a list of {kind, until, to}")
    floors = {"floor": floor} if shape in ("wsd", "cosine_restarts") else {}
    return build(warmup, total, **floors, **options)
