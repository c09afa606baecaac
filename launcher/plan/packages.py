"""The packages that a plan's DeepSpeed JSON makes its ranks import, for the check of the nodes."""

from launcher.ds_config.loop_rules import MONITORS_AND_OPTIMIZERS, needed_packages

__all__ = ["MONITORS_AND_OPTIMIZERS", "needed_packages"]
