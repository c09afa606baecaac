"""What a run does: plan a job, carry it out, resume it, check its nodes, cancel it."""
