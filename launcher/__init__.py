"""Fine-tune large models on many nodes: DeepSpeed ZeRO ranks placed by Ray, on a generated learning-rate schedule."""

from launcher.reporting import report

__all__ = ["report"]
__version__ = "0.1.0"
