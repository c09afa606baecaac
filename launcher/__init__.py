"""Fine-tune large models on many nodes: DeepSpeed ZeRO ranks placed by Ray, on a generated learning-rate schedule."""

from launcher.reporting import report
from launcher.version import __version__

__all__ = ["__version__", "report"]
