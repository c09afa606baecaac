"""The job file: its schema, its reader and its validation."""

from launcher.job.load import LoadedJob, check_loaded, load_job
from launcher.job.read import explicit_keys, validate_job
from launcher.job.schema import AnyJob, Job, ScriptJob

__all__ = ["AnyJob", "Job", "LoadedJob", "ScriptJob", "check_loaded", "explicit_keys", "load_job", "validate_job"]
