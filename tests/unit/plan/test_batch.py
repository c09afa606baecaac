"""Batch sizes multiply out, or the error suggests sizes that do."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import RequestError
from launcher.plan.batch import KEYS, TARGET_BATCH, BatchSizes, resolve_batch

SIZES = st.one_of(st.none(), st.integers(1, 300))
BATCH, MICRO, ACCUMULATION = KEYS


def sizes(batch: int | None = None, micro: int | None = None, accumulation: int | None = None) -> dict[str, int]:
    named = dict(zip(KEYS, (batch, micro, accumulation), strict=True))
    return {name: value for name, value in named.items() if value is not None}


def fits_all(_micro: int) -> bool:
    return True


@given(batch=SIZES, micro=SIZES, accumulation=SIZES, world=st.integers(1, 64), room=st.integers(0, 20))
def test_sizes_multiply_out_or_the_hint_is_correct(
    batch: int | None, micro: int | None, accumulation: int | None, world: int, room: int
) -> None:
    requested = sizes(batch, micro, accumulation)
    try:
        found = resolve_batch(requested, world, lambda size: size <= room)
    except RequestError as error:
        check_hint(requested, world, str(error.problems[0].hint))
        return
    product = found.train_micro_batch_size_per_gpu * found.gradient_accumulation_steps * world
    assert found.train_batch_size == product
    assert {name: getattr(found, name) for name in requested} == requested
    if micro is None and accumulation is None:
        assert found.train_micro_batch_size_per_gpu <= max(1, min(16, room))


def check_hint(requested: dict[str, int], world: int, hint: str) -> None:
    """Every batch size in the hint is accepted, and is one of the nearest."""
    batches = [int(number) for number in re.findall(r"\d+", hint.partition(", or remove")[0])]
    unit = world * requested.get(MICRO, 1) * requested.get(ACCUMULATION, 1)
    all_three = MICRO in requested and ACCUMULATION in requested
    assert len(set(batches)) == (2 if requested[BATCH] > unit and not all_three else 1)
    for batch in batches:
        assert resolve_batch({**requested, BATCH: batch}, world, fits_all).train_batch_size == batch
        assert abs(batch - requested[BATCH]) < unit or all_three
    if "remove gradient_accumulation_steps" in hint:
        left = {name: value for name, value in requested.items() if name != ACCUMULATION}
        derived = resolve_batch(left, world, fits_all).gradient_accumulation_steps
        assert hint.endswith(f"it is then {derived}")


@pytest.mark.parametrize(
    ("requested", "world", "found"),
    [
        (sizes(64, 2), 8, BatchSizes(64, 2, 4)),
        (sizes(64, None, 2), 8, BatchSizes(64, 4, 2)),
        (sizes(None, 3, 5), 4, BatchSizes(60, 3, 5)),
        (sizes(64, 2, 4), 8, BatchSizes(64, 2, 4)),
        (sizes(64), 8, BatchSizes(64, 8, 1)),
        (sizes(7), 1, BatchSizes(7, 7, 1)),
        (sizes(34), 2, BatchSizes(34, 1, 17)),
        (sizes(None, 4), 2, BatchSizes(32, 4, 4)),
        (sizes(None, 64), 2, BatchSizes(128, 64, 1)),
        (sizes(), 2, BatchSizes(TARGET_BATCH, 16, 1)),
        (sizes(), 8, BatchSizes(TARGET_BATCH, 4, 1)),
        (sizes(), 3, BatchSizes(24, 8, 1)),
        (sizes(), 64, BatchSizes(64, 1, 1)),
        (sizes(None, None, 4), 2, BatchSizes(TARGET_BATCH, 4, 4)),
    ],
)
def test_known_sizes(requested: dict[str, int], world: int, found: BatchSizes) -> None:
    assert resolve_batch(requested, world, fits_all) == found


def test_the_default_micro_batch_is_the_largest_that_fits_and_divides() -> None:
    assert resolve_batch(sizes(48), 2, lambda size: size <= 7) == BatchSizes(48, 6, 4)
    assert resolve_batch(sizes(48), 2, lambda size: size < 1) == BatchSizes(48, 1, 24)


def test_a_given_micro_batch_is_not_changed() -> None:
    assert resolve_batch(sizes(None, 8), 1, lambda _: False).train_micro_batch_size_per_gpu == 8


@pytest.mark.parametrize(
    ("requested", "world", "sequences", "found"),
    [
        (sizes(), 1, 1, BatchSizes(1, 1, 1)),
        (sizes(), 1, 5, BatchSizes(4, 4, 1)),
        (sizes(), 1, 31, BatchSizes(16, 16, 1)),
        (sizes(), 1, 32, BatchSizes(32, 16, 2)),
        (sizes(), 4, 9, BatchSizes(8, 2, 1)),
        (sizes(), 4, 1, BatchSizes(4, 1, 1)),
        (sizes(None, 2), 1, 7, BatchSizes(6, 2, 3)),
        (sizes(None, 8), 1, 7, BatchSizes(8, 8, 1)),
        (sizes(None, None, 3), 1, 7, BatchSizes(6, 2, 3)),
        (sizes(16), 1, 7, BatchSizes(16, 16, 1)),
    ],
)
def test_the_default_batch_is_at_most_the_sequences(
    requested: dict[str, int], world: int, sequences: int, found: BatchSizes
) -> None:
    assert resolve_batch(requested, world, fits_all, sequences) == found


@given(micro=SIZES, accumulation=SIZES, world=st.integers(1, 64), sequences=st.integers(1, 500))
def test_the_default_batch_is_within_the_sequences_or_the_smallest_possible(
    micro: int | None, accumulation: int | None, world: int, sequences: int
) -> None:
    found = resolve_batch(sizes(None, micro, accumulation), world, fits_all, sequences)
    least = world * (micro or 1) * (accumulation or 1)
    assert found.train_batch_size <= max(sequences, least)
