"""Fine-tune large models on many nodes: DeepSpeed ZeRO ranks placed by Ray, on a generated learning-rate schedule.

    from launcher import load_job, make_plan, run, resume

    job = load_job("job.yaml", "train.max_steps=100")
    print(make_plan(job).learning_rate)
    result = run(job)
    resume(result.directory, "train.max_steps=200")

`report` is for your own training script; it imports only the standard library.
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
_MODULES = {
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
"""The module that defines each name. It is imported at first use: `import launcher` in a script stays fast."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'launcher' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
