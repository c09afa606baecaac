"""What every lint rule receives: the JSON, the target, and facts derived from both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from launcher.ds_config.catalogue import Catalogue
from launcher.ds_config.facts import Offload, as_bool, as_number, bf16_key, offload
from launcher.ds_config.findings import Finding, Severity, finding
from launcher.ds_config.optimizer_class import OptimizerClass, optimizer_class_of
from launcher.ds_config.read import DsConfig
from launcher.ds_config.target import Target

ZERO = "zero_optimization"


@dataclass(frozen=True)
class RuleContext:
    """`stage` is None if it is "auto" or invalid; `optimizer_class` comes from `optimizer_class_of`."""

    config: DsConfig
    target: Target
    keys: Catalogue
    stage: int | None
    offload: Offload
    optimizer_class: OptimizerClass | None

    def finding(self, severity: Severity, path: str, message: str, hint: str) -> Finding:
        return finding(self.config, severity, path, message, hint)

    def number(self, path: str) -> Any:
        """The number at `path`; None if it is missing, "auto" or not a number."""
        value = as_number(self.config.get(path))
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def on(self, path: str) -> bool:
        return as_bool(self.config.get(path)) is True

    def off(self, path: str) -> bool:
        return as_bool(self.config.get(path)) is False

    @property
    def cpu(self) -> bool:
        return self.target.device == "cpu"

    @property
    def offloaded(self) -> bool:
        """Whether optimizer states are offloaded to host memory or NVMe."""
        return self.offload.optimizer != "none"

    @property
    def dtype(self) -> str | None:
        """The precision of the weights in the JSON, else the target's: bf16, fp16 or fp32; None if unknown."""
        bf16, fp16 = (as_bool(self.config.get(f"{block}.enabled")) for block in (bf16_key(self.config), "fp16"))
        if bf16 or fp16:
            return "bf16" if bf16 else "fp16"
        return "fp32" if bf16 is False and fp16 in (False, None) else self.target.dtype


Rule = Callable[[RuleContext], Iterator[Finding]]


def context_of(config: DsConfig, target: Target, keys: Catalogue) -> RuleContext:
    """The context of the rules for `config` on `target`."""
    return RuleContext(config, target, keys, _stage(config), offload(config), optimizer_class_of(config, target.device))


def _stage(config: DsConfig) -> int | None:
    block = config.get(ZERO)
    if isinstance(block, bool):
        return int(block)
    stage = as_number(config.get(f"{ZERO}.stage", 0))
    return stage if stage in (0, 1, 2, 3) else None
