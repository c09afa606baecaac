"""The learning-rate report of a job, a run or a DeepSpeed JSON: in the terminal and as PNG, CSV and JSON."""
