"""A DeepSpeed JSON as data: read it, complete it, check it."""

from launcher.ds_config.compose import Composed, Decisions, compose
from launcher.ds_config.config_builder import Change
from launcher.ds_config.facts import (
    Offload,
    auto_scheduler,
    batch_keys,
    clipping_of,
    has_auto_warmup,
    offload,
    optimizer_of,
    precision_of,
    scheduler_of,
    zero_stage,
)
from launcher.ds_config.read import DsConfig, KeyLocation, from_job, from_mapping, parse_ds_config, read_ds_config

__all__ = [
    "Change",
    "Composed",
    "Decisions",
    "DsConfig",
    "KeyLocation",
    "Offload",
    "auto_scheduler",
    "batch_keys",
    "clipping_of",
    "compose",
    "from_job",
    "from_mapping",
    "has_auto_warmup",
    "offload",
    "optimizer_of",
    "parse_ds_config",
    "precision_of",
    "read_ds_config",
    "scheduler_of",
    "zero_stage",
]
