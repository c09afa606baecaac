"""Fine-tune large models on many nodes: DeepSpeed ZeRO ranks placed by Ray, on a generated learning-rate schedule.

    from launcher import load_job, make_plan, run, resume

    job = load_job("job.yaml", "train.max_steps=100")
    print(make_plan(job).learning_rate)
    result = run(job)
    resume(result.directory, "train.max_steps=200")

`report` is for a training script of your own, and imports nothing but the standard library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from launcher.reporting import report
from launcher.version import __version__

if TYPE_CHECKING:
    from launcher.errors import RequestError, RunFailed
    from launcher.job import LoadedJob, load_job
    from launcher.plan.schema import Plan
    from launcher.runs.outcome import RunResult
    from launcher.runs.planning import make_plan
    from launcher.runs.resume import resume
    from launcher.runs.run import run

__all__ = [
    "LoadedJob",
    "Plan",
    "RequestError",
    "RunFailed",
    "RunResult",
    "__version__",
    "load_job",
    "make_plan",
    "report",
    "resume",
    "run",
]
_HOMES = {
    "LoadedJob": "launcher.job",
    "Plan": "launcher.plan.schema",
    "RequestError": "launcher.errors",
    "RunFailed": "launcher.errors",
    "RunResult": "launcher.runs.outcome",
    "load_job": "launcher.job",
    "make_plan": "launcher.runs.planning",
    "resume": "launcher.runs.resume",
    "run": "launcher.runs.run",
}
"""Where each name is defined. It is imported at its first use, so that `import launcher` costs a script nothing."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'launcher' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
