"""How long a test waits for what must come."""

from __future__ import annotations

PATIENCE_SECONDS = 600.0
"""Beyond any load of a busy machine: it ends a test that hangs, and nothing is measured by it."""
