"""Fine-tune large models on many nodes: DeepSpeed ZeRO ranks placed by Ray, on a generated learning-rate schedule."""

__version__ = "0.1.0"
