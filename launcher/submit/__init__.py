"""Ways onto a cluster: requests made by pure functions, shown by --dry-run, and submitted as they were shown."""
