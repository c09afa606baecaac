"""Measurements of the model, the data and the machine, from which a plan is made."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelFacts(Facts):
    """A pretrained model, from its config and weights, and the parameters that the job trains.

    `parameters` counts the pretrained parameters. `trainable_parameters` counts those with gradients and optimizer
    states: all, fewer with model.freeze; with model.lora only the adapters', which are not in `parameters`.
    `adapted_modules` are the last parts of the names of modules with adapters; empty without model.lora.
    `whole_attention`: every layer attends to all previous tokens, through transformers' attention interface.
    `attention_heads` is 0 for a model without attention. `vocab_size` is the number of rows of the input embeddings.
    `router_loss_coefficient` is the weight of the router's load-balancing loss in the loss; None without one. `notes`
    are sentences for the plan's warnings.
    """

    folder: str
    model_type: str
    parameters: int
    trainable_parameters: int
    adapted_modules: tuple[str, ...] = ()
    embedding_parameters: int
    hidden_size: int
    intermediate_size: int
    layers: int
    attention_heads: int
    key_value_heads: int | None = None
    whole_attention: bool = False
    vocab_size: int
    max_positions: int | None
    tied_embeddings: bool
    stored_dtype: str
    supports_gradient_checkpointing: bool
    has_chat_template: bool
    router_loss_coefficient: float | None = None
    notes: tuple[str, ...] = ()


class SplitFacts(Facts):
    """One tokenised split.

    `dropped_because` counts the `dropped` rows by reason; a reason completes "N rows …". `largest_token` is the largest
    token id, or -1 in facts from an older version. `notes` are sentences for the plan's warnings.
    """

    folder: str
    rows: int
    sequences: int
    tokens: int
    targets: int
    longest: int
    cut: int
    dropped: int
    partly_learned: int
    dropped_because: dict[str, int] = {}
    largest_token: int = -1
    notes: tuple[str, ...] = ()


class DataFacts(Facts):
    """The tokenised data of a job.

    `shared_rows` counts the evaluation rows that are also training rows. `notes` are findings from reading the rows.
    `chat_template` is the source of the job's own template.
    """

    fingerprint: str
    format: str
    train: SplitFacts
    eval: SplitFacts | None
    shared_rows: int = 0
    notes: tuple[str, ...] = ()
    chat_template: str | None = None


class MachineFacts(Facts):
    """A node; all nodes are alike. `compiler` is the C++ compiler that torch.compile uses, if one is installed."""

    device: Literal["cpu", "cuda"]
    device_name: str
    gpus: int
    gpu_memory_bytes: int
    bf16: bool
    cpus: int
    memory_bytes: int
    versions: dict[str, str]
    compiler: str | None = None
