"""Ways onto a cluster: requests made by pure functions, shown by --dry-run, and submitted as they were shown."""

import re

SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|PRIVATE)_?KEY)(_|$)", re.IGNORECASE
)
"""Names of environment variables whose values do not belong in a job, which many can read."""
