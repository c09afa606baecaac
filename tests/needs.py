"""Skips tests whose needs this machine does not have."""

from __future__ import annotations

import os

import pytest


def need(missing: str | None) -> None:
    """Skips the test for what is missing, if anything is; in CI, where nothing may be missing, the test fails."""
    if missing and os.environ.get("CI"):
        pytest.fail(f"CI must run this test, and cannot: {missing}")
    if missing:
        pytest.skip(missing)
