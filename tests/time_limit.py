"""How long a test waits before it fails."""

from __future__ import annotations

TIME_LIMIT_SECONDS = 600.0
"""Long enough for a busy machine: it only ends tests that hang."""
