"""The job file's sections and keys, typed and documented: what a user may ask for."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from launcher.job import slurm

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
TEMPLATE_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
Name = Annotated[str, Field(min_length=1, pattern=NAME_PATTERN)]


def _variable_name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) is None:
        raise PydanticCustomError("variable_name", "must be the name of an environment variable (A-Z, a-z, 0-9 and _)")
    return value


VariableName = Annotated[str, AfterValidator(_variable_name)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class LoraSection(Section):
    """Low-rank adapters (peft): the pretrained weights are frozen, and small matrices beside them are trained."""

    r: PositiveInt = Field(16, description="The rank of the adapters' matrices.")
    alpha: PositiveNumber | Auto = Field("auto", description="Adapters count alpha / r times. auto: twice r.")
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(0.0, description="Dropout in front of the adapters.")
    target_modules: Auto | Name | list[Name] = Field(
        "auto",
        description="Which modules get adapters, by the ends of their names (q_proj). auto: all linear layers but the "
        "head.",
    )
    merge: bool = Field(
        False,
        description="false: export/ holds the adapters alone, for peft. true: it holds the whole model with the "
        "adapters merged in, and export/adapter the adapters.",
    )


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
    lora: LoraSection | None = Field(
        None, description="Train low-rank adapters instead of all weights; {} takes the defaults."
    )
    freeze: list[Name] = Field(
        default_factory=list,
        description="Weights that are not trained: names of parameters or of modules, * and [0-9] standing for parts "
        "of a name, such as model.embed_tokens or model.layers.[0-7].",
    )
    torch_compile: bool = Field(
        False, description="Compile the model with torch.compile: slow first updates, faster ones after."
    )
    sequence_parallel_size: PositiveInt = Field(
        1,
        description="How many ranks share each sequence (DeepSpeed's Ulysses), for sequences too long for one. They "
        "count as one rank in the batch size.",
    )
    liger: bool = Field(
        False, description="Use liger-kernel's fused Triton kernels; needs GPUs and a model that it knows."
    )

    @model_validator(mode="after")
    def _one_method(self) -> ModelSection:
        if self.lora is not None and self.freeze:
            raise ValueError("lora freezes all pretrained weights already: leave freeze out, or lora")
        return self


class DataSection(Section):
    """The text to learn from."""

    train: Name | list[Name] = Field(
        description="File(s), glob(s), a folder (of files, or written by save_to_disk) or a hub name: jsonl, json, "
        "parquet, csv, tsv or txt."
    )
    eval: Annotated[Annotated[Number, Field(gt=0, lt=1)] | Name | list[Name] | None, BeforeValidator(_parsed)] = Field(
        None, description="File(s) as for train, or a fraction of the training rows such as 0.02."
    )
    split: Name = Field("train", description="The split taken of a hub data set, such as train or train[:1000].")
    eval_split: Name | None = Field(
        None, description="The split of a hub data set that data.eval names. Default: the same as data.split."
    )
    config: Name | None = Field(
        None, description="The configuration (subset) of a hub data set that data.train or data.eval names."
    )
    format: Literal["auto", "messages", "prompt-completion", "instruction", "text"] = Field(
        "auto", description="What a row holds. auto: told from the column names."
    )
    max_length: PositiveInt = Field(2048, description="Longest sequence in tokens; longer rows are cut and counted.")
    chat_template: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="A file with a Jinja chat template, or the template itself. Default: the tokenizer's."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template, such as enable_thinking: false."
    )
    learn: Literal["all", "last"] = Field(
        "all", description="Which assistant turns of a conversation are learned: all, or the last alone."
    )
    cache_dir: Name | None = Field(
        None, description="Where tokenised data is kept. Default: .cache in output_dir, which all nodes see."
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _free_names(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(TEMPLATE_RESERVED & set(given)):
            raise ValueError(f"{', '.join(taken)} cannot be set for a chat template: the data decides it")
        return given


LENGTHS = ("num_train_epochs", "max_steps", "total_samples")


class TrainSection(Section):
    """How much to train and in what batches. One of num_train_epochs, max_steps and total_samples."""

    num_train_epochs: PositiveNumber | None = Field(None, description="Passes over the training data.")
    max_steps: PositiveInt | None = Field(None, description="Updates (optimizer steps) in all.")
    total_samples: PositiveInt | None = Field(
        None, description="Sequences in all, whatever the batch; the last update is made whole."
    )
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
        lengths = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(lengths) > 1:
            both = "both" if len(lengths) == 2 else "all"
            raise ValueError(f"{' and '.join(lengths)} are {both} given: keep the one that you mean")
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
    env: dict[VariableName, Name] = Field(
        default_factory=dict,
        description="Environment variables for every rank; no secrets, they are written to plan.json.",
    )


class SlurmSection(Section):
    """What Slurm is asked for, besides cluster.nodes and cluster.gpus_per_node. For `launcher submit` alone."""

    partition: slurm.Words | None = Field(None, description="Partition, or several divided by commas.")
    account: slurm.Word | None = Field(None, description="The account that is charged.")
    qos: slurm.Word | None = Field(None, description="Quality of service.")
    time: slurm.Time | None = Field(
        None, description="Time limit: 90 (minutes), 24:00:00, 2-12:30:00 (days-hours:minutes:seconds)."
    )
    gres: slurm.Resources | None = Field(
        None, description="Generic resources of a node, such as gpu:h100:8. GPUs without a type come from cluster."
    )
    cpus_per_task: PositiveInt | None = Field(
        None, description="Processors of a node. Default: processes_per_node on CPUs, with GPUs what the site gives."
    )
    mem: slurm.Memory | None = Field(None, description="Memory of a node such as 256G; 0 is all of it.")
    constraint: slurm.Features | None = Field(None, description="Features that nodes must have, such as a100&nvlink.")
    reservation: slurm.Words | None = Field(None, description="A reservation to run in.")
    nodelist: slurm.Hosts | None = Field(None, description="Nodes that must be among those given, such as gpu[01-04].")
    exclude: slurm.Hosts | None = Field(None, description="Nodes to stay away from.")
    exclusive: bool = Field(False, description="Share nodes with no other job.")
    dependency: slurm.Dependency | None = Field(None, description="Jobs to wait for, such as afterok:123.")
    array: slurm.Array | None = Field(None, description="Indices of a job array, such as 0-3 or 0-15%4: a run each.")
    array_key: slurm.JobKey | None = Field(
        None, description="The job's key that is set to the array's index, such as train.seed."
    )
    signal_seconds: Annotated[PositiveInt, Field(le=65535)] = Field(
        300, description="So long before the time limit the run is asked to save and stop."
    )
    requeue: bool = Field(True, description="Queue the job again after a node failed or it was preempted.")
    mail_user: slurm.Address | None = Field(None, description="Who gets mail.")
    mail_type: list[slurm.Mail] = Field(default_factory=list, description="When: BEGIN, END, FAIL, TIME_LIMIT_90, …")
    comment: slurm.Plain | None = Field(None, description="A comment that Slurm keeps with the job.")
    modules: list[slurm.Module] = Field(default_factory=list, description="Environment modules to load.")
    activate: slurm.Plain | None = Field(
        None, description="A virtual environment's folder, or a script, to source. Default: where `submit` is called."
    )
    container: slurm.Image | None = Field(None, description="An image in which the launcher is found.")
    container_mounts: list[slurm.Mount] = Field(
        default_factory=list, description="What the container sees: /outside, /outside:/inside or /outside:/inside:ro."
    )
    container_runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis", description="pyxis: srun --container-image. apptainer: apptainer exec."
    )
    template: slurm.Plain | None = Field(
        None, description="A jinja2 template of one's own for the script; slurm/README.md says what it is given."
    )
    extra: list[slurm.ExtraOption] = Field(
        default_factory=list, description="More options of sbatch, such as --licenses=matlab:1."
    )

    @model_validator(mode="after")
    def _agreeing(self) -> SlurmSection:
        limit = slurm.time_seconds(self.time) if self.time else None
        if limit is not None and limit <= self.signal_seconds:
            found = f"signal_seconds is {self.signal_seconds}, and the time limit {self.time} has {limit} seconds"
            raise ValueError(f"{found}: the run would be stopped as it starts; give a smaller signal_seconds")
        if self.array_key is not None and self.array is None:
            raise ValueError(f"array_key is {self.array_key}, and there is no array: give array: 0-3, or leave it out")
        if self.container_mounts and self.container is None:
            raise ValueError("container_mounts is given, and there is no container")
        return self


class CheckpointSection(Section):
    """Checkpoints to go on from."""

    every: PositiveInt | None = Field(None, description="Save every so many updates, besides at the end.")
    keep: PositiveInt = Field(2, description="How many of the newest are kept.")
    save_final: bool = Field(True, description="Save one at the end as well.")


def _words(value: Any) -> Any:
    """A command in one line, as its words."""
    if not isinstance(value, str):
        return value
    try:
        return shlex.split(value)
    except ValueError as error:
        raise PydanticCustomError("not_a_command", "a quote is not closed ({why})", {"why": str(error)}) from None


class ScriptSection(Section):
    """Your own training script, which brings its model and data. It makes the job one for a script."""

    command: Annotated[list[Annotated[str, Field(pattern=r"^[^\x00]*$")]], BeforeValidator(_words)] = Field(
        default_factory=list,
        description="A Python file, or -m MODULE, and its arguments: a list, or one line. Default: what "
        "`launcher exec` is given after --.",
    )
    folder: Name = Field(
        ".", description="The folder in which every rank runs the script, on storage that all nodes see."
    )


class JobBase(Section):
    """What every job has."""

    name: Annotated[str, Field(pattern=JOB_NAME_PATTERN)] = Field(
        "job", description="Letters, digits, '.', '_' and '-'. Default: the job file's name."
    )
    train: TrainSection = Field(default_factory=TrainSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    deepspeed: Name | dict[str, Any] = Field(
        "zero2",
        description="A DeepSpeed JSON's path, a preset's name (zero1, zero2, zero3, …), the mapping itself, or auto: "
        "the first preset that fits, by the memory estimate.",
    )
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    slurm: SlurmSection = Field(default_factory=SlurmSection)
    export: bool = Field(True, description="Write a Hugging Face folder (safetensors) at the end.")
    output_dir: Name = Field("runs", description="Run directories are made in here, on storage that all nodes see.")


class Job(JobBase):
    """A fine-tuning job: one YAML file."""

    model: ModelSection
    data: DataSection


class ScriptJob(JobBase):
    """A job that runs your own script. A model named here is measured for advice on the learning rate."""

    script: ScriptSection = Field(default_factory=ScriptSection)
    model: ModelSection | None = None
    data: DataSection | None = None


AnyJob = Job | ScriptJob


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a job file: model and data are required unless it has a script."""
    training, document = Job.model_json_schema(), ScriptJob.model_json_schema()
    document["properties"] |= {name: training["properties"][name] for name in ("model", "data")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **document,
        "title": "launcher job file",
        "description": "A fine-tuning job, or with `script` a job that runs your own script.",
        "if": {"not": {"required": ["script"]}},
        "then": {"required": ["model", "data"]},
    }
