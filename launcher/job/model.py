"""The job file's sections and keys, typed and documented: what a user may ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Auto = Literal["auto"]


def _whole_number(value: Any) -> Any:
    """YAML reads `1e4` as a string and `1e+4` as a float: both are the whole number meant."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "must be a whole number")
    value = _parsed(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    """Refuses YAML's yes/no/on/off where a number belongs."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "must be a number")
    return value


def _position(value: Any) -> Any:
    """An update (100) or a share of the run (0.5): what is written with a point and at most 1 is a share."""
    value = _parsed(_number(value))
    return int(value) if isinstance(value, float) and value > 1 and value.is_integer() else value


def _parsed(value: Any) -> Any:
    """A number that YAML 1.1 reads as text, such as 2e-2, as that number; everything else as it is."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


PositiveInt = Annotated[int, BeforeValidator(_whole_number), Field(gt=0)]
WholeNumber = Annotated[int, BeforeValidator(_whole_number), Field(ge=0)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PositiveNumber = Annotated[Number, Field(gt=0)]
Position = Annotated[int | Annotated[float, Field(allow_inf_nan=False)], BeforeValidator(_position), Field(ge=0)]
Seed = Annotated[WholeNumber, Field(lt=2**32)]
NAME_PATTERN = r"^[^\x00-\x1f\x7f]*$"
JOB_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(min_length=1, pattern=NAME_PATTERN)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    """The pretrained model."""

    name_or_path: Name = Field(description="Hub name or folder of a Hugging Face causal language model.")
    gguf_file: Name | None = Field(None, description="A GGUF file inside that folder, read instead of safetensors.")
    revision: Name | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Training precision. auto: bfloat16 where the hardware has it, float32 on a CPU."
    )
    attn_implementation: Name = Field("auto", description="auto, eager, sdpa, flash_attention_2, …")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Off by default.")


class DataSection(Section):
    """The text to learn from."""

    train: Name | list[Name] = Field(description="File(s), glob(s) or a hub name: jsonl, json, parquet, csv or txt.")
    eval: Annotated[Annotated[Number, Field(gt=0, lt=1)] | Name | list[Name] | None, BeforeValidator(_parsed)] = Field(
        None, description="File(s) as for train, or a fraction of the training rows such as 0.02."
    )
    split: Name = Field("train", description="The split taken of a hub data set.")
    format: Literal["auto", "messages", "prompt-completion", "instruction", "text"] = Field(
        "auto", description="What a row holds. auto: told from the column names."
    )
    max_length: PositiveInt = Field(2048, description="Longest sequence in tokens; longer rows are cut and counted.")
    cache_dir: Name | None = Field(
        None, description="Where tokenised data is kept. Default: .cache in output_dir, which all nodes see."
    )


class TrainSection(Section):
    """How much to train and in what batches. One of num_train_epochs and max_steps."""

    num_train_epochs: PositiveNumber | None = Field(None, description="Passes over the training data.")
    max_steps: PositiveInt | None = Field(None, description="Updates (optimizer steps) in all.")
    train_batch_size: PositiveInt | Auto = Field(
        "auto", description="Sequences an update: micro x accumulation x world size."
    )
    train_micro_batch_size_per_gpu: PositiveInt | Auto = Field(
        "auto", description="Sequences a rank puts through the model at once. auto: what fits."
    )
    gradient_accumulation_steps: PositiveInt | Auto = Field("auto", description="Micro-batches an update.")
    eval_every: PositiveInt | None = Field(
        None, description="Evaluate every so many updates, besides before the first and after the last."
    )
    seed: Seed = Field(42, description="Orders the data and seeds every random number.")
    weight_decay: Annotated[Number, Field(ge=0)] = Field(0.0, description="AdamW's decoupled weight decay.")
    betas: tuple[Number, Number] = Field((0.9, 0.999), description="Adam's beta1 and beta2.")
    eps: PositiveNumber = Field(1e-8, description="Adam's epsilon.")
    gradient_clipping: Annotated[Number, Field(ge=0)] = Field(
        1.0, description="Largest global gradient norm; 0 leaves gradients alone."
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.num_train_epochs is not None and self.max_steps is not None:
            raise ValueError("num_train_epochs and max_steps are both given: keep the one that you mean")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), found {list(self.betas)}")
        return self


class SegmentSection(Section):
    """One piece of a compound schedule, after the warm-up."""

    kind: Literal["linear", "cosine", "constant", "1-sqrt"] = Field(description="How the rate moves to `to`.")
    until: Position = Field(description="Where the piece ends: an update, or a share of the run up to 1.")
    to: Annotated[Number, Field(ge=0, le=1)] = Field(description="Share of the peak at the end of the piece.")


class ScheduleSection(Section):
    """The learning rate. Everything on auto is chosen, and explained by `launcher lr`."""

    shape: Literal["auto", "linear", "cosine", "constant", "step", "wsd", "cosine_restarts", "compound"] = Field(
        "auto", description="linear is DeepSpeed's WarmupDecayLR, cosine its WarmupCosineLR."
    )
    peak_lr: PositiveNumber | Auto = Field("auto", description="The highest learning rate.")
    warmup: WholeNumber | Annotated[Number, Field(ge=0)] | Name = Field(
        "auto", description="auto, updates (100), a fraction (0.03 or 3%), or tokens (2M tokens)."
    )
    warmup_type: Literal["linear", "log"] = Field("linear", description="How the warm-up climbs.")
    floor: Annotated[Number, Field(ge=0, le=1)] | Auto = Field(
        "auto", description="The last rate as a share of the peak."
    )
    task: Literal["similar", "divergent"] | None = Field(
        None, description="Is the task close to what the model was pretrained on, or far from it?"
    )
    decay_at: list[Position] | None = Field(
        None, description="step: where the rate falls, in updates or in shares of the run."
    )
    decay_factor: Annotated[Number, Field(gt=0, lt=1)] | list[Number] | None = Field(
        None, description="step: what the rate is multiplied with at each of them. Default 0.1."
    )
    decay_start: Position | None = Field(
        None, description="wsd: where the last decay begins, an update or a share of the run. Default 0.8."
    )
    decay: Literal["linear", "1-sqrt"] | None = Field(None, description="wsd: how the last decay falls.")
    cycles: PositiveInt | None = Field(None, description="cosine_restarts: the number of cosine cycles. Default 2.")
    segments: list[SegmentSection] | None = Field(None, description="compound: the pieces after the warm-up.")
    on_spike: Literal["warn", "extend_warmup", "lower_peak", "stop"] = Field(
        "lower_peak",
        description="What a loss spike leads to. extend_warmup: the warm-up is lengthened from there on. lower_peak: "
        "that, and the peak is halved; in benchmarks/spike_guard only this helped.",
    )
    max_extensions: WholeNumber = Field(2, description="How often a spike may lengthen the warm-up or lower the peak.")
    check_every: PositiveInt = Field(
        50, description="All ranks compare update, rate and skipped updates every so many updates."
    )
    allow_unsafe: bool = Field(False, description="Take a schedule that the safety rules refuse.")


class ClusterSection(Section):
    """Nodes and processes."""

    nodes: PositiveInt = Field(1, description="Nodes to run on.")
    gpus_per_node: WholeNumber | Auto = Field("auto", description="auto: all that a node has; 0: train on CPUs.")
    processes_per_node: PositiveInt | Auto = Field(
        "auto", description="Ranks a node where there is no GPU. With GPUs there is one rank a GPU."
    )
    address: Name = Field(
        "auto",
        description="A Ray to join (host:port). auto: RAY_ADDRESS where set, or else a Ray of our own. local: our own.",
    )
    wait_seconds: PositiveNumber = Field(600.0, description="How long to wait for nodes on a Ray that exists.")
    env: dict[Name, Name] = Field(
        default_factory=dict,
        description="Environment variables for every rank; no secrets, they are written to plan.json.",
    )


class CheckpointSection(Section):
    """Checkpoints to go on from."""

    every: PositiveInt | None = Field(None, description="Save every so many updates, besides at the end.")
    keep: PositiveInt = Field(2, description="How many of the newest are kept.")
    save_final: bool = Field(True, description="Save one at the end as well.")


class Job(Section):
    """A fine-tuning job: one YAML file."""

    name: Annotated[str, Field(pattern=JOB_NAME_PATTERN)] = Field(
        "job", description="Letters, digits, '.', '_' and '-'. Default: the job file's name."
    )
    model: ModelSection
    data: DataSection
    train: TrainSection = Field(default_factory=TrainSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    deepspeed: Name | dict[str, Any] = Field(
        "zero2",
        description="A DeepSpeed JSON's path, a preset's name (zero1, zero2, zero3, …) or the mapping itself.",
    )
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    export: bool = Field(True, description="Write a Hugging Face folder (safetensors) at the end.")
    output_dir: Name = Field("runs", description="Run directories are made in here, on storage that all nodes see.")
