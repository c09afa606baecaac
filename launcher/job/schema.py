"""The sections and keys of a job file, typed and documented."""

from __future__ import annotations

import json
import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from launcher.files import OutputMode
from launcher.job import slurm
from launcher.job.upload_url import InvalidUrl, checked_url

Auto = Literal["auto"]
HealthChecks = Literal["auto", "off", "full"]


def _whole_number(value: Any) -> Any:
    """Converts `1e4`, which YAML reads as a string, and `1e+4`, a float, to a whole number."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "must be a whole number")
    value = _parsed(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    """Rejects YAML's yes/no/on/off in place of a number."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "must be a number")
    return value


def _off(value: Any) -> Any:
    """Converts `off`, which YAML 1.1 reads as false."""
    return "off" if value is False else value


def _position(value: Any) -> Any:
    """An update (100) or a fraction of the run (0.5): a float that is at most 1 is a fraction."""
    value = _parsed(_number(value))
    return int(value) if isinstance(value, float) and value > 1 and value.is_integer() else value


def _parsed(value: Any) -> Any:
    """Converts a number that YAML 1.1 reads as text, such as 2e-2; returns everything else unchanged."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


LARGEST_NUMBER = 10**12
"""Of sequences, ranks, seconds and the like: no sum or product of such numbers is too large for a float."""
MOST_UPDATES = 10**7
"""Of one run: a plan computes the learning rate of every update."""
PositiveInt = Annotated[int, BeforeValidator(_whole_number), Field(gt=0, le=LARGEST_NUMBER)]
WholeNumber = Annotated[int, BeforeValidator(_whole_number), Field(ge=0, le=LARGEST_NUMBER)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PositiveNumber = Annotated[Number, Field(gt=0)]
Position = Annotated[
    int | Annotated[float, Field(allow_inf_nan=False)], BeforeValidator(_position), Field(ge=0, le=LARGEST_NUMBER)
]
Seed = Annotated[WholeNumber, Field(lt=2**32)]
NAME_PATTERN = r"^[^\x00-\x1f\x7f]*$"
JOB_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
TEMPLATE_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
Name = Annotated[str, Field(min_length=1, pattern=NAME_PATTERN)]
Names = Annotated[list[Name], Field(min_length=1)]


def _variable_name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) is None:
        raise PydanticCustomError("variable_name", "must be the name of an environment variable (A-Z, a-z, 0-9 and _)")
    return value


VariableName = Annotated[str, AfterValidator(_variable_name)]


def _url(value: str) -> str:
    try:
        return checked_url(value)
    except InvalidUrl as error:
        raise PydanticCustomError(INVALID_URL, "{reason}", {"reason": error.reason, "hint": error.hint}) from None


INVALID_URL = "invalid_url"
"""An error whose value is not shown, since it may contain a password."""
UploadUrl = Annotated[str, AfterValidator(_url)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class LoraSection(Section):
    """Low-rank adapters (peft): the pretrained weights are frozen and small adapter matrices are trained."""

    r: PositiveInt = Field(16, description="Rank of the adapter matrices.")
    alpha: PositiveNumber | Auto = Field("auto", description="Adapter outputs are scaled by alpha / r. auto: twice r.")
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapters' input.")
    target_modules: Auto | Name | Names = Field(
        "auto",
        description="Modules that get adapters, by the ends of their names, such as q_proj. auto: all linear layers "
        "except the head.",
    )
    merge: bool = Field(
        False,
        description="false: export/ contains only the adapters, for peft. true: export/ contains the whole model "
        "with the adapters merged in, and export/adapter the adapters.",
    )

    @property
    def effective_alpha(self) -> float:
        """The alpha that applies: the job's, or twice the rank."""
        return 2 * self.r if self.alpha == "auto" else self.alpha


class ModelSection(Section):
    """The pretrained model."""

    name_or_path: Name = Field(description="Folder or hub name of a Hugging Face causal language model.")
    gguf_file: Name | None = Field(None, description="A GGUF file in the model's folder, read instead of safetensors.")
    revision: Name | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Training precision. auto: what the DeepSpeed JSON sets, else float32 on CPUs and bfloat16 on GPUs "
        "(float16 if they lack it).",
    )
    attn_implementation: Name = Field("auto", description="Attention kernel: auto, eager, sdpa, flash_attention_2, …")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third slower."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Off by default.")
    lora: LoraSection | None = Field(
        None, description="Train low-rank adapters instead of all weights; {} uses the defaults."
    )
    freeze: list[Name] = Field(
        default_factory=list,
        description="Weights that are not trained: names of parameters or modules, with the wildcards * and [0-9], "
        "such as model.embed_tokens or model.layers.[0-7].",
    )
    torch_compile: bool = Field(
        False, description="Compile the model with torch.compile: the first updates are slow, later ones faster."
    )
    sequence_parallel_size: PositiveInt = Field(
        1,
        description="How many ranks share each sequence (DeepSpeed Ulysses), for sequences that are too long for one "
        "rank. They count as one rank in the batch size.",
    )
    liger: bool = Field(
        False, description="Use liger-kernel's fused Triton kernels. Needs GPUs and a model that liger-kernel supports."
    )

    chunked_loss: bool | Auto = Field(
        "auto",
        description="Compute the loss for a chunk of learned tokens at a time: the same loss and gradients with less "
        "memory than for the logits of all tokens. auto: if the model allows it and it saves memory.",
    )

    @model_validator(mode="after")
    def _one_method(self) -> ModelSection:
        if self.lora is not None and self.freeze:
            raise ValueError("lora already freezes all pretrained weights: remove freeze or lora")
        return self


class DataSection(Section):
    """The data to train and evaluate on."""

    train: Name | Names = Field(
        description="File(s), glob(s), a folder (of files, or written by save_to_disk) or the hub name of a data set. "
        "File types: jsonl, json, parquet, csv, tsv, txt."
    )
    eval: Annotated[Annotated[Number, Field(gt=0, lt=1)] | Name | Names | None, BeforeValidator(_parsed)] = Field(
        None, description="Evaluation data, as for train, or a fraction of the training rows such as 0.02."
    )
    split: Name = Field("train", description="Split of a hub data set, such as train or train[:1000].")
    eval_split: Name | None = Field(
        None, description="Split of a hub data set in data.eval. Default: the same as data.split."
    )
    config: Name | None = Field(
        None, description="Configuration (subset) of a hub data set in data.train or data.eval."
    )
    format: Literal["auto", "messages", "prompt-completion", "instruction", "text"] = Field(
        "auto", description="What a row contains. auto: detected from the column names."
    )
    max_length: PositiveInt = Field(
        2048, description="Maximum sequence length in tokens; longer rows are cut and counted."
    )
    packing: bool = Field(
        False,
        description="Fill rows of max_length tokens (bins) with several sequences that do not see each other: the same "
        "loss without padding (docs/packing.md). Batches, epochs and samples then count bins.",
    )
    group_by_length: bool = Field(
        False,
        description="Divide the sequences of each update among micro-batches by length, which then need less padding. "
        "Each update has the same sequences, and the same loss.",
    )
    chat_template: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="File with a Jinja chat template, or the template itself. Default: the tokenizer's."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template, such as enable_thinking: false."
    )
    learn: Literal["all", "last"] = Field(
        "all", description="Assistant turns of a conversation to train on: all, or only the last."
    )
    cache_dir: Name | None = Field(
        None, description="Folder for tokenised data, visible to all nodes. Default: .cache in output_dir."
    )
    cache_limit_gb: PositiveNumber | None = Field(
        None,
        description="Largest size of the cache folder in GB (10^9 bytes). After tokenising, the entries that were not "
        "used for the longest time are removed; those of live runs are kept. Default: no limit.",
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _free_names(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(TEMPLATE_RESERVED & set(given)):
            raise ValueError(f"{', '.join(taken)} cannot be set for a chat template: the value comes from the data")
        try:
            json.dumps(given, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError):
            raise ValueError("must be text, numbers, true or false, and lists and mappings of them") from None
        return given


LENGTHS = ("num_train_epochs", "max_steps", "total_samples")


class EarlyStoppingSection(Section):
    """Ends the run when the evaluation loss no longer improves. Needs data.eval and train.eval_every."""

    patience: PositiveInt = Field(
        3,
        description="The run ends after so many evaluations in a row whose loss is not below the lowest one before "
        "them minus min_delta.",
    )
    min_delta: Annotated[Number, Field(ge=0)] = Field(
        0.0, description="By how much (nats) the loss must be lower to count as an improvement."
    )


class TrainSection(Section):
    """Length, batch sizes and optimizer. Set at most one of num_train_epochs, max_steps and total_samples."""

    num_train_epochs: Annotated[PositiveNumber, Field(le=10**6)] | None = Field(
        None, description="Passes over the training data. Default: 1, if no other length is set."
    )
    max_steps: Annotated[PositiveInt, Field(le=MOST_UPDATES)] | None = Field(
        None, description="Number of updates (optimizer steps)."
    )
    total_samples: PositiveInt | None = Field(
        None, description="Number of sequences, whatever the batch size; the last update is filled up."
    )
    train_batch_size: PositiveInt | Auto = Field(
        "auto", description="Sequences per update: micro-batch x accumulation x world size."
    )
    tokens_per_batch: PositiveInt | None = Field(
        None,
        description="With data.packing, instead of train_batch_size: the batch is the most bins of max_length tokens "
        "that fit in this many tokens and that the ranks can share evenly.",
    )
    train_micro_batch_size_per_gpu: PositiveInt | Auto = Field(
        "auto", description="Sequences per rank in one forward pass. auto: the most that fit, up to 16."
    )
    gradient_accumulation_steps: PositiveInt | Auto = Field("auto", description="Micro-batches per update.")
    eval_every: PositiveInt | None = Field(
        None, description="Evaluate every N updates, and always before the first and after the last."
    )
    early_stopping: EarlyStoppingSection | None = Field(
        None,
        description="End the run, as finished, when the evaluation loss no longer improves; {} uses the defaults "
        "(docs/early-stopping.md).",
    )
    seed: Seed = Field(42, description="Seed of the data order and of all random numbers.")
    weight_decay: Annotated[Number, Field(ge=0)] = Field(0.0, description="AdamW's decoupled weight decay.")
    betas: tuple[Number, Number] = Field((0.9, 0.999), description="Adam's beta1 and beta2.")
    eps: PositiveNumber = Field(1e-8, description="Adam's epsilon.")
    gradient_clipping: Annotated[Number, Field(ge=0)] = Field(
        1.0, description="Maximum global gradient norm; 0 turns clipping off."
    )

    restarts: WholeNumber | None = Field(
        None,
        description="How many restarts in a row may fail without saving a checkpoint. A failed run starts again from "
        "its newest checkpoint by itself, unless it would fail in the same way. 0: never. Default: 3; for a script 0, "
        "since only the script knows how it resumes.",
    )
    hang_seconds: Annotated[Number, Field(ge=0)] | Auto = Field(
        "auto",
        description="Seconds without an update after which a run counts as hung, and fails. auto: 10 times the longest "
        "recent update, at least 60; 0: no check. Loading, the first update, evaluations, checkpoints and the export "
        "have at least 30 minutes, and so has, with auto, a script, which is watched from its first launcher.report.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        lengths = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(lengths) > 1:
            both = "both" if len(lengths) == 2 else "all"
            raise ValueError(f"{' and '.join(lengths)} are {both} set: keep one of them")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), found {list(self.betas)}")
        return self


class SegmentSection(Section):
    """One segment of a compound schedule, after the warm-up."""

    kind: Literal["linear", "cosine", "constant", "1-sqrt"] = Field(
        description="Curve from the previous value to `to`."
    )
    until: Position = Field(description="Where the segment ends: an update, or a fraction of the run.")
    to: Annotated[Number, Field(ge=0, le=1)] = Field(description="Learning rate at its end, as a fraction of the peak.")


class ScheduleSection(Section):
    """The learning-rate schedule. The launcher chooses what is auto; `launcher lr` explains the choices."""

    shape: Literal["auto", "linear", "cosine", "constant", "step", "wsd", "cosine_restarts", "compound"] = Field(
        "auto", description="linear, cosine and constant are DeepSpeed's WarmupDecayLR, WarmupCosineLR and WarmupLR."
    )
    peak_lr: PositiveNumber | Auto = Field("auto", description="Highest learning rate.")
    warmup: WholeNumber | Annotated[Number, Field(ge=0, le=LARGEST_NUMBER)] | Name = Field(
        "auto", description="auto, updates (100), a fraction of the run (0.03 or 3%), or tokens (2M tokens)."
    )
    warmup_type: Literal["linear", "log"] = Field("linear", description="How the learning rate rises in the warm-up.")
    floor: Annotated[Number, Field(ge=0, le=1)] | Auto = Field(
        "auto",
        description="Learning rate at the end of the decay, as a fraction of the peak. linear ends at its first "
        "learning rate, 1/(warm-up + 1) of the peak, because DeepSpeed's class does; with a lower floor, such as 0, "
        "the launcher gives DeepSpeed a scheduler object instead.",
    )
    task: Literal["similar", "divergent"] | None = Field(
        None, description="Whether the task is close to pretraining or far from it; shape: auto depends on it."
    )
    decay_at: list[Position] | None = Field(
        None,
        description="step: where the learning rate drops, in updates or fractions of the run. Default: [0.5, 0.75].",
    )
    decay_factor: Annotated[Number, Field(gt=0, lt=1)] | list[Number] | None = Field(
        None, description="step: factor at each drop, or one per drop. Default: 0.1."
    )
    decay_start: Position | None = Field(
        None, description="wsd: where the final decay starts, an update or a fraction of the run. Default: 0.8."
    )
    decay: Literal["linear", "1-sqrt"] | None = Field(None, description="wsd: shape of the final decay.")
    cycles: PositiveInt | None = Field(None, description="cosine_restarts: number of cosine cycles. Default: 2.")
    segments: list[SegmentSection] | None = Field(None, description="compound: the segments after the warm-up.")
    on_spike: Literal["warn", "extend_warmup", "lower_peak", "stop"] = Field(
        "lower_peak",
        description="Response to a loss spike. extend_warmup: lengthen the warm-up from that update on. lower_peak: "
        "halve the peak as well; in benchmarks/spike_guard only this helped.",
    )
    max_extensions: WholeNumber = Field(2, description="How often a spike may lengthen the warm-up or lower the peak.")
    check_every: PositiveInt = Field(
        50, description="Every N updates all ranks compare update number, learning rate and skipped updates."
    )
    allow_unsafe: bool = Field(False, description="Accept a schedule that the safety rules reject.")


class ClusterSection(Section):
    """Nodes, ranks and the Ray cluster."""

    nodes: PositiveInt = Field(1, description="Number of nodes.")
    gpus_per_node: WholeNumber | Auto = Field("auto", description="auto: all GPUs of a node; 0: train on CPUs.")
    processes_per_node: PositiveInt | Auto = Field(
        "auto", description="Ranks per node on CPUs; auto: 1. On GPUs there is one rank per GPU."
    )
    address: Name = Field(
        "auto",
        description="Ray cluster to join (host:port). auto: RAY_ADDRESS if set, else a new one. local: a new one.",
    )
    min_nodes: PositiveInt | None = Field(
        None,
        description="After the loss of a node the run continues on as few nodes as this if no other node becomes free "
        "within wait_seconds. The batch size and the learning rate stay the same. Default: nodes.",
    )
    spare_nodes: WholeNumber = Field(
        0,
        description="Additional nodes that are checked and wait without ranks: one takes the place of a node that is "
        "lost or excluded, at the next restart.",
    )
    exclude_after: WholeNumber = Field(
        2,
        description="A node that failed so often is not used any more by the run, nor when it is resumed; 0: every "
        "node is used.",
    )
    wait_seconds: PositiveNumber = Field(600.0, description="How long to wait for nodes of an existing Ray cluster.")
    warm_start: bool | Auto = Field(
        "auto",
        description="true: each node imports torch, transformers and DeepSpeed once, and forks its ranks from that "
        "process, also after a restart. false: every rank is a fresh process. auto: true, for a script false.",
    )
    health_checks: Annotated[HealthChecks, BeforeValidator(_off)] = Field(
        "auto",
        description="Checks of GPUs, network and disk before ranks start (docs/health.md). auto: those that take at "
        "most a few seconds. full: longer ones, also on a single machine. off: none.",
    )
    env: dict[VariableName, Name] = Field(
        default_factory=dict,
        description="Environment variables for every rank. They are written to plan.json, so set no secrets here.",
    )

    @model_validator(mode="after")
    def _fewer_nodes(self) -> ClusterSection:
        if self.min_nodes is not None and "nodes" in self.model_fields_set and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes is {self.min_nodes}, but nodes is {self.nodes}: it must not be larger")
        return self

    @property
    def all_nodes(self) -> int:
        """The number of nodes, spare nodes included."""
        return self.nodes + self.spare_nodes


class SlurmSection(Section):
    """Options of the Slurm job, in addition to cluster.nodes and cluster.gpus_per_node. Only for `launcher submit`."""

    partition: slurm.Words | None = Field(None, description="Partition, or several separated by commas.")
    account: slurm.Word | None = Field(None, description="Account to charge.")
    qos: slurm.Word | None = Field(None, description="Quality of service.")
    time: slurm.Time | None = Field(
        None, description="Time limit: 90 (minutes), 24:00:00, 2-12:30:00 (days-hours:minutes:seconds)."
    )
    gres: slurm.Resources | None = Field(
        None, description="Generic resources per node, such as gpu:h100:8. GPUs without a type: cluster.gpus_per_node."
    )
    cpus_per_task: PositiveInt | None = Field(
        None, description="CPUs per node. Default: processes_per_node on CPUs, the site's default on GPUs."
    )
    mem: slurm.Memory | None = Field(None, description="Memory per node, such as 256G; 0: all of it.")
    constraint: slurm.Features | None = Field(None, description="Features that nodes must have, such as a100&nvlink.")
    reservation: slurm.Words | None = Field(None, description="Reservation to use.")
    nodelist: slurm.Hosts | None = Field(None, description="Nodes that the job must include, such as gpu[01-04].")
    exclude: slurm.Hosts | None = Field(None, description="Nodes to avoid.")
    exclusive: bool = Field(False, description="Do not share nodes with other jobs.")
    dependency: slurm.Dependency | None = Field(None, description="Jobs to wait for, such as afterok:123.")
    array: slurm.Array | None = Field(None, description="Indices of a job array, such as 0-3 or 0-15%4; one run each.")
    array_key: slurm.JobKey | None = Field(
        None, description="Job key that is set to the array index, such as train.seed."
    )
    signal_seconds: Annotated[PositiveInt, Field(le=65535)] = Field(
        300, description="Seconds before the time limit at which the run is asked to save and stop."
    )
    requeue: bool = Field(True, description="Queue the job again after a node failure or preemption.")
    resubmit: bool = Field(
        False,
        description="Submit another job that continues the run when the time limit stops it, until it is finished.",
    )
    max_jobs: PositiveInt | None = Field(
        None,
        description="With resubmit: how many jobs may carry out a run in a row, the first one included. Default: 10.",
    )
    mail_user: slurm.Address | None = Field(None, description="Recipient of mail: a user or an address.")
    mail_type: list[slurm.Mail] = Field(default_factory=list, description="Events to mail: BEGIN, END, FAIL, …")
    comment: slurm.Plain | None = Field(None, description="Comment that Slurm stores with the job.")
    modules: list[slurm.Module] = Field(default_factory=list, description="Environment modules to load.")
    activate: slurm.Plain | None = Field(
        None, description="Virtual environment or script to activate. Default: the environment of `launcher submit`."
    )
    container: slurm.Image | None = Field(None, description="Container image with the launcher installed.")
    container_mounts: list[slurm.Mount] = Field(
        default_factory=list, description="Folders in the container: /outside, /outside:/inside or /outside:/inside:ro."
    )
    container_runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis", description="pyxis: srun --container-image. apptainer: apptainer exec."
    )
    template: slurm.Plain | None = Field(
        None, description="Your own jinja2 template for the batch script; slurm/README.md lists its variables."
    )
    extra: list[slurm.ExtraOption] = Field(
        default_factory=list, description="Further sbatch options, such as --licenses=matlab:1."
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> SlurmSection:
        limit = slurm.time_seconds(self.time) if self.time else None
        if limit is not None and limit <= self.signal_seconds:
            found = f"signal_seconds is {self.signal_seconds}, but the time limit {self.time} is {limit} seconds"
            raise ValueError(f"{found}: the run would stop as soon as it starts; use a smaller signal_seconds")
        if self.array_key is not None and self.array is None:
            raise ValueError(
                f"array_key is {self.array_key}, but array is not set: set it, such as 0-3, or remove array_key"
            )
        if self.container_mounts and self.container is None:
            raise ValueError("container_mounts is set, but container is not")
        if self.max_jobs is not None and not self.resubmit:
            raise ValueError(
                f"max_jobs is {self.max_jobs}, but resubmit is not set: set it to true, or remove max_jobs"
            )
        return self


class CheckpointSection(Section):
    """Checkpoints that a run can resume from."""

    every: PositiveInt | None = Field(None, description="Save a checkpoint every N updates.")
    keep: PositiveInt = Field(
        2, description="How many of the newest checkpoints to keep. With 1, no other can replace a damaged one."
    )
    keep_every: PositiveInt | None = Field(None, description="Also save a checkpoint every N updates, and keep it.")
    keep_best: PositiveInt | None = Field(
        None,
        description="Also keep the N checkpoints with the lowest evaluation loss, of those that were evaluated at the "
        "same update.",
    )
    save_final: bool = Field(True, description="Save a checkpoint at the end.")
    background: bool | Auto = Field(
        "auto",
        description="Write checkpoints in the background while training continues; this needs host memory for a copy "
        "of what is saved. auto: if the memory is enough, according to the estimate.",
    )
    upload: UploadUrl | None = Field(
        None,
        description="Copy finished checkpoints and the export to cloud storage while training continues: "
        "s3://BUCKET/PATH, gs://BUCKET/PATH or file:///PATH. `launcher resume s3://BUCKET/PATH/RUN` continues there.",
    )
    upload_wait_seconds: Annotated[Number, Field(ge=0)] = Field(
        600.0, description="How long the end of a run waits for its last upload."
    )


def _words(value: Any) -> Any:
    """Splits a command that is written as one line."""
    if not isinstance(value, str):
        return value
    try:
        return shlex.split(value)
    except ValueError as error:
        raise PydanticCustomError("not_a_command", "a quote is not closed ({why})", {"why": str(error)}) from None


class ScriptSection(Section):
    """Your own training script, which loads its own model and data. A job with this section runs the script."""

    command: Annotated[list[Annotated[str, Field(pattern=r"^[^\x00]*$")]], BeforeValidator(_words)] = Field(
        default_factory=list,
        description="A Python file, or -m MODULE, and its arguments: a list, or one line. Default: what follows -- in "
        "`launcher exec`.",
    )
    folder: Name = Field(".", description="Folder in which every rank runs the script, visible to all nodes.")


class JobBase(Section):
    """The keys that every job has."""

    name: Annotated[str, Field(pattern=JOB_NAME_PATTERN)] = Field(
        "job", description="Letters, digits, '.', '_' and '-'. Default: the job file's name."
    )
    train: TrainSection = Field(default_factory=TrainSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    deepspeed: Name | dict[str, Any] = Field(
        "zero2",
        description="Path of a DeepSpeed JSON, name of a preset (zero1, zero2, zero3, …), the mapping itself, or auto: "
        "the first preset that fits, according to the memory estimate.",
    )
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    slurm: SlurmSection = Field(default_factory=SlurmSection)
    export: bool | Literal["best", "last"] = Field(
        True,
        description="Write a Hugging Face folder (safetensors) at the end. true and last: the weights after the last "
        "update. best: the checkpoint with the lowest evaluation loss; needs checkpoint.keep_best.",
    )
    output_dir: Name = Field("runs", description="Parent folder of run directories, visible to all nodes.")
    output_mode: OutputMode = Field(
        "private",
        description="Who can read the run directory, with its checkpoints, logs and export. private: only you. group: "
        "also your group, or that of output_dir if it has the setgid bit. Only you can write.",
    )


class Job(JobBase):
    """A fine-tuning job: one YAML file."""

    model: ModelSection
    data: DataSection


class ScriptJob(JobBase):
    """A job that runs your own script. Its model, if set, is only measured, for advice on the learning rate."""

    script: ScriptSection = Field(default_factory=ScriptSection)
    model: ModelSection | None = None
    data: DataSection | None = None

    @model_validator(mode="after")
    def _all_nodes(self) -> ScriptJob:
        if self.cluster.min_nodes is not None:
            raise ValueError("cluster.min_nodes is for a training: only a script itself knows how it changes its ranks")
        return self


AnyJob = Job | ScriptJob


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a job file: model and data are required unless it has a script."""
    training, document = Job.model_json_schema(), ScriptJob.model_json_schema()
    document["properties"] |= {name: training["properties"][name] for name in ("model", "data")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **document,
        "title": "launcher job file",
        "description": "A fine-tuning job, or a job with `script`, which runs your own script.",
        "if": {"not": {"required": ["script"]}},
        "then": {"required": ["model", "data"]},
    }
