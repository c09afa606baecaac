"""A DeepSpeed JSON as data: read it, complete it, check it."""

from launcher.ds_config.compose import Composed, Decisions, compose
from launcher.ds_config.draft import Change
from launcher.ds_config.facts import (
    Offload,
    batch_keys,
    clipping_of,
    offload,
    open_scheduler,
    open_warmup,
    optimizer_of,
    precision_of,
    scheduler_of,
    zero_stage,
)
from launcher.ds_config.read import DsConfig, Place, from_job, from_mapping, parse_ds_config, read_ds_config

__all__ = [
    "Change",
    "Composed",
    "Decisions",
    "DsConfig",
    "Offload",
    "Place",
    "batch_keys",
    "clipping_of",
    "compose",
    "from_job",
    "from_mapping",
    "offload",
    "open_scheduler",
    "open_warmup",
    "optimizer_of",
    "parse_ds_config",
    "precision_of",
    "read_ds_config",
    "scheduler_of",
    "zero_stage",
]
