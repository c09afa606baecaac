"""Everything about Slurm: options, the batch script, submission, the queue, and the nodes of an allocation."""
