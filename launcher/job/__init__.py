"""What the user asks for: the typed, validated job file."""

from launcher.job.model import Job
from launcher.job.place import placing
from launcher.job.read import explicit_keys, read_job, validate_job

__all__ = ["Job", "explicit_keys", "placing", "read_job", "validate_job"]
