"""What a run does: plan a job, run it, resume it, check its nodes, cancel it."""
