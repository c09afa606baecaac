"""Reading a run directory, live or long finished."""
