"""The packages that ranks import because of the plan's DeepSpeed JSON; the nodes are checked for them."""

from launcher.ds_config.loop_rules import MONITORS_AND_OPTIMIZERS, needed_packages

__all__ = ["MONITORS_AND_OPTIMIZERS", "needed_packages"]
