"""Which optimizer class DeepSpeed builds from a JSON. That class decides which parameters are valid.

Follows DeepSpeedEngine._configure_basic_optimizer of DeepSpeed 0.19.8, including what the launcher fills in.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.ds_config.facts import AUTO, as_bool, offload
from launcher.ds_config.read import DsConfig
from launcher.ds_config.target import Device

TORCH_ADAM = "optimizer.params.torch_adam"
CPU_ADAM = "DeepSpeedCPUAdam"
ADAM_TYPES = ("adam", "adamw")


@dataclass(frozen=True)
class OptimizerClass:
    """A class, by its name in the catalogue, and why DeepSpeed builds it."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}, which DeepSpeed builds here ({self.reason})"


def optimizer_class_of(config: DsConfig, device: Device) -> OptimizerClass | None:
    """The class for the JSON's optimizer, or for the plan's AdamW if the JSON has none.

    None for a torch.optim type, which names the class itself, and for a type whose class is unknown.
    """
    written = config.get("optimizer.type")
    name = "adamw" if written in (None, AUTO) else str(written).lower()
    offloaded = offload(config).optimizer != "none"
    if name in ADAM_TYPES:
        return _adam(config, device, name, offloaded)
    if name == "lion":
        return OptimizerClass("DeepSpeedCPULion", "offload") if offloaded else OptimizerClass("FusedLion", "no offload")
    if name == "adagrad":
        return (
            OptimizerClass("DeepSpeedCPUAdagrad", "offload")
            if offloaded
            else OptimizerClass("torch.optim.Adagrad", "no offload")
        )
    return OptimizerClass("FusedLamb", "always") if name == "lamb" else None


def _adam(config: DsConfig, device: Device, name: str, offloaded: bool) -> OptimizerClass:
    written = config.get(TORCH_ADAM)
    if fills_torch_adam(config, device) or written not in (None, AUTO, False, 0, ""):
        decoupled = name == "adamw" or as_bool(config.get("optimizer.params.adam_w_mode")) is not False
        reason = "torch_adam" if written not in (None, AUTO) else "torch_adam, which the launcher sets on CPUs"
        return OptimizerClass("torch.optim.AdamW" if decoupled else "torch.optim.Adam", reason)
    if not offloaded:
        return OptimizerClass("FusedAdam", "no offload, no torch_adam")
    if config.get("zero_optimization.zenflow") is not None:
        return OptimizerClass("ZenFlowCPUAdam", "offload with ZenFlow")
    return OptimizerClass(CPU_ADAM, "offload, no torch_adam")


def fills_torch_adam(config: DsConfig, device: Device) -> bool:
    """Whether the launcher sets torch_adam: on CPUs, unless the JSON sets it."""
    return device == "cpu" and config.get(TORCH_ADAM) in (None, AUTO)
