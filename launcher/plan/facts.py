"""What was measured about the model, the data and the machines before planning: plain numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelFacts(Facts):
    """A pretrained model, as its config and weights say, and what of it the job trains.

    `parameters` are the pretrained ones. `trainable_parameters` are those that get gradients and optimizer states: all
    of them; fewer where model.freeze holds some; under model.lora the adapters' alone, which are not in `parameters`.
    `adapted_modules` are the last names of the modules that adapters stand on; empty without model.lora.
    `whole_attention`: every layer attends to all that came before, through transformers' exchangeable attention.
    `chunked_loss`: the loss can be computed for a chunk of tokens at a time, from the output layer alone.
    `packed_attention`: the attention implementations with which packed sequences are computed as single ones.
    `attention_heads` is 0 for a model without attention. `vocab_size` is the number of rows of the input embeddings.
    `flops_per_token` and `flops_per_pair`: see `launcher.prepare.model_flops`; both 0 if they are unknown.
    `router_loss_coefficient`: how many times the balance loss of its experts' routers is added to the loss; None
    without one. `notes` are sentences for the plan's warnings.
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
    flops_per_token: float = 0.0
    flops_per_pair: float = 0.0
    stored_dtype: str
    supports_gradient_checkpointing: bool
    has_chat_template: bool
    router_loss_coefficient: float | None = None
    chunked_loss: bool = False
    packed_attention: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class SplitFacts(Facts):
    """One tokenised split.

    `dropped_because` counts the `dropped` rows by the reason, which completes "N rows …". `largest_token` is the
    largest token id, -1 in facts measured before it was kept. `bins` is the number of bins of data.max_length tokens
    that the sequences fill if they are packed; 0 for evaluation rows, which are not packed, and in older facts.
    `notes` are sentences for the plan's warnings.
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
    bins: int = 0
    notes: tuple[str, ...] = ()


class DataFacts(Facts):
    """The tokenised data of a job.

    `shared_rows` of the evaluation rows say the same as a training row. `notes` are what reading the rows found.
    `chat_template` is the source of the template that the job supplies.
    """

    fingerprint: str
    format: str
    train: SplitFacts
    eval: SplitFacts | None
    shared_rows: int = 0
    notes: tuple[str, ...] = ()
    chat_template: str | None = None


class MachineFacts(Facts):
    """One node; all nodes are alike. `gpu_memory_bytes` is of one GPU; `compiler` is the C++ compiler, if found."""

    device: Literal["cpu", "cuda"]
    device_name: str
    gpus: int
    gpu_memory_bytes: int
    bf16: bool
    cpus: int
    memory_bytes: int
    versions: dict[str, str]
    compiler: str | None = None
