"""What the user asks for: the typed, validated job file."""

from launcher.job.place import placing
from launcher.job.read import explicit_keys, read_job, validate_job
from launcher.job.schema import Job
from launcher.job.script import ScriptJob, is_for_a_script, read_script_job

__all__ = [
    "Job",
    "ScriptJob",
    "explicit_keys",
    "is_for_a_script",
    "placing",
    "read_job",
    "read_script_job",
    "validate_job",
]
