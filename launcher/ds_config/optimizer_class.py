"""Which optimizer class DeepSpeed really builds from a JSON: its parameters and its limits are that class's.

As DeepSpeedEngine._configure_basic_optimizer of DeepSpeed 0.19.8 decides it, with what the launcher fills in.
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
class Built:
    """A class by the name that the catalogue has for it, and why it is this one."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}, which is built here ({self.why})"


def built_optimizer(config: DsConfig, device: Device) -> Built | None:
    """The class for the JSON's optimizer, or for the AdamW of a plan where it has none.

    None for a type of torch.optim, which is the class of that name, and for a type whose classes are not known.
    """
    written = config.get("optimizer.type")
    name = "adamw" if written in (None, AUTO) else str(written).lower()
    away = offload(config).optimizer != "none"
    if name in ADAM_TYPES:
        return _adam(config, device, name, away)
    if name == "lion":
        return Built("DeepSpeedCPULion", "offload") if away else Built("FusedLion", "no offload")
    if name == "adagrad":
        return Built("DeepSpeedCPUAdagrad", "offload") if away else Built("torch.optim.Adagrad", "no offload")
    return Built("FusedLamb", "always") if name == "lamb" else None


def _adam(config: DsConfig, device: Device, name: str, away: bool) -> Built:
    asked = config.get(TORCH_ADAM)
    if fills_torch_adam(config, device) or asked not in (None, AUTO, False, 0, ""):
        decoupled = name == "adamw" or as_bool(config.get("optimizer.params.adam_w_mode")) is not False
        why = "torch_adam" if asked not in (None, AUTO) else "torch_adam, which the launcher sets on CPUs"
        return Built("torch.optim.AdamW" if decoupled else "torch.optim.Adam", why)
    if not away:
        return Built("FusedAdam", "no offload, no torch_adam")
    if config.get("zero_optimization.zenflow") is not None:
        return Built("ZenFlowCPUAdam", "offload with ZenFlow")
    return Built(CPU_ADAM, "offload, no torch_adam")


def fills_torch_adam(config: DsConfig, device: Device) -> bool:
    """Whether the launcher has PyTorch's Adam built: on CPUs, unless the JSON says which one."""
    return device == "cpu" and config.get(TORCH_ADAM) in (None, AUTO)
