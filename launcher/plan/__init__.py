"""A job plus what was measured about model, data and machines, resolved into one frozen plan with a hash."""
