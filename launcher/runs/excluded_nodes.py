"""The failures of each node in a run, and the nodes that are excluded from it, kept in the run directory."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.run_dir import RunDir, write_json


def count_failures(run: RunDir, failed: Mapping[str, str], limit: int) -> dict[str, str]:
    """Counts a failure of each host in `failed`; returns the hosts that have failed `limit` times now, with the reason.

    These are excluded from the run. A limit of 0 excludes none.
    """
    if not failed:
        return {}
    known = run.node_failures()
    for host, how in failed.items():
        known.setdefault(host, {"failures": [], "excluded": None})["failures"].append(how)
    write_json(run.node_failures_file, known)
    reasons = {
        host: f"failed {len(known[host]['failures'])} times, the last time with {how}"
        for host, how in failed.items()
        if limit and len(known[host]["failures"]) >= limit
    }
    for host, reason in reasons.items():
        exclude_node(run, host, reason)
    return reasons


def exclude_node(run: RunDir, host: str, reason: str) -> None:
    """Excludes a host from the run, also when it is resumed."""
    known = run.node_failures()
    known.setdefault(host, {"failures": [], "excluded": None})["excluded"] = reason
    write_json(run.node_failures_file, known)
    run.event({"event": "node_excluded", "host": host, "reason": reason})
