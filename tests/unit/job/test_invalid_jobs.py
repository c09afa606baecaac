"""Invalid jobs with words that their messages must contain. Nothing starts and no file is left behind."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.ds_config.catalogue import load_catalogue
from tests.unit.inputs import JOB, command, data_facts, model_facts, remember, write_folder


@dataclass(frozen=True)
class InvalidJob:
    """A job file's text, overrides and extra files, and words of the expected error."""

    id: str
    expected: tuple[str, ...] | str
    text: str | bytes = JOB
    overrides: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contradiction:
    """A job that is invalid only for the measured model or data."""

    id: str
    expected: tuple[str, ...] | str
    text: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def with_model(value: str) -> str:
    return JOB.replace("{name_or_path: model}", value)


def with_data(value: str) -> str:
    return JOB.replace("{train: data/train.jsonl}", value)


def with_cluster(value: str) -> str:
    return JOB.replace("{gpus_per_node: 0, processes_per_node: 4}", value)


SHAPE_OF_FILE = [
    InvalidJob("empty file", ("job.yaml: a job file must be a mapping", "found nothing", "launcher init"), text=""),
    InvalidJob("only comments", ("found nothing", "launcher init"), text="# model:\n# data:\n"),
    InvalidJob("list at top", ("a job file must be a mapping", "found a list"), text="- model\n- data\n"),
    InvalidJob("one word", ("a job file must be a mapping", "found text"), text="fine-tune\n"),
    InvalidJob(
        "tab",
        ("job.yaml:5: not valid YAML", "'\\t'", "spaces, not tabs"),
        text=JOB + "train:\n\tmax_steps: 3\n",
    ),
    InvalidJob(
        "unclosed brace", ("job.yaml:5: not valid YAML", "expected ',' or '}'"), text=JOB + "train: {max_steps: 3\n"
    ),
    InvalidJob(
        "unclosed quote",
        ("job.yaml:5: not valid YAML", "while scanning a quoted scalar"),
        text=JOB + "output_dir: 'runs\n",
    ),
    InvalidJob("two documents", ("job.yaml:4", "expected a single document"), text=JOB + "---\nname: b\n"),
    InvalidJob("contains itself", ("job.yaml", "a value contains itself"), text="model: &m {name_or_path: *m}\n"),
    InvalidJob("invalid date", ("job.yaml", "month must be in 1..12", "quotes"), text=JOB + "name: 2026-13-45\n"),
    InvalidJob("control character", ("job.yaml:4", "U+0007", "remove it"), text=JOB + "name: a\x07b\n"),
    InvalidJob("not UTF-8", ("job.yaml: not UTF-8 text", "byte 0"), text=b"\xff\xfea: b"),
    InvalidJob(
        "duplicated section", ("job.yaml:4: duplicate key data", "line 2", "keep one"), text=JOB + "data: {train: x}\n"
    ),
    InvalidJob(
        "duplicated key",
        ("job.yaml:6: duplicate key max_steps", "line 5"),
        text=JOB + "train:\n  max_steps: 3\n  max_steps: 4\n",
    ),
    InvalidJob(
        "python tag", ("job.yaml:4: not valid YAML", "python/object"), text=JOB + "name: !!python/object:os.x {}\n"
    ),
]

KEYS = [
    InvalidJob("misspelt section", ("job.yaml:4: schedul: unknown key", "did you mean schedule?"), JOB + "schedul: {}"),
    InvalidJob(
        "misspelt key",
        ("job.yaml:5: train.max_stps: unknown key", "did you mean max_steps?"),
        text=JOB + "train:\n  max_stps: 3\n",
    ),
    InvalidJob(
        "misspelt key in a list of sections",
        ("job.yaml:7: schedule.segments.0.kid: unknown key", "did you mean kind?", "kind: this key is required"),
        text=JOB + "schedule:\n  shape: compound\n  segments:\n  - {kid: linear, until: 1.0, to: 0}\n",
    ),
    InvalidJob("section's key at the top", ("job.yaml:4: seed", "it belongs in train.seed"), text=JOB + "seed: 3\n"),
    InvalidJob(
        "key in the wrong section", ("train.peak_lr", "belongs in schedule.peak_lr"), JOB + "train: {peak_lr: 1e-5}\n"
    ),
    InvalidJob("dotted key", ("train.max_steps: unknown key", "max_steps under train"), JOB + "train.max_steps: 3\n"),
    InvalidJob("number as a key", ("job.yaml:4: 1: a key must be text, found 1"), text=JOB + "1: 2\n"),
    InvalidJob("unlike any key", ("train.zzz", "valid keys: num_train_epochs, max_steps"), JOB + "train: {zzz: 3}\n"),
    InvalidJob("no model", ("model: this key is required", "name_or_path"), text="data: {train: data/train.jsonl}\n"),
    InvalidJob("no data", ("data: this key is required", "train, eval"), text="model: {name_or_path: model}\n"),
    InvalidJob("no training data", ("job.yaml:2: data.train: this key is required", "jsonl"), with_data("{eval: 0.1}")),
    InvalidJob("empty section", ("job.yaml:4: train: must be a mapping of keys, found nothing"), text=JOB + "train:\n"),
]


def value(name: str, text: str, *expected: str) -> InvalidJob:
    """A job with an invalid value on line 4."""
    return InvalidJob(name, ("job.yaml:4", *expected), text=JOB + text + "\n")


VALUES = [
    value("yes for a number", "train: {max_steps: yes}", "train.max_steps: must be a whole number, found true"),
    value(
        "on for a learning rate", "schedule: {peak_lr: on}", "schedule.peak_lr: must be a number or 'auto', found true"
    ),
    value("text for a number", "train: {max_steps: lots}", "must be a whole number, found 'lots'"),
    value("negative", "train: {max_steps: -3}", "must be greater than 0, found -3"),
    value("zero", "train: {train_batch_size: 0}", "must be greater than 0 or 'auto', found 0"),
    value("float for an int", "train: {max_steps: 2.5}", "must be a whole number, found 2.5"),
    value("not a number", "schedule: {peak_lr: .nan}", "must be a finite number or 'auto', found nan"),
    value("infinite", "train: {num_train_epochs: .inf}", "must be a finite number, found inf"),
    value("infinite as text", "train: {weight_decay: '1e999'}", "must be a finite number"),
    value("number for a switch", "checkpoint: {save_final: 3}", "save_final: must be true or false, found 3"),
    value("number for the export", "export: 3", "export: must be true or false or 'best' or 'last', found 3"),
    value("seed too large", "train: {seed: 4294967296}", "train.seed: must be less than 4294967296"),
    value("both lengths", "train: {num_train_epochs: 3, max_steps: 9}", "num_train_epochs and max_steps are both set"),
    value("beta of one", "train: {betas: [0.9, 1.0]}", "betas must be in [0, 1), found [0.9, 1.0]"),
    value("one beta", "train: {betas: [0.9]}", "train.betas: too few values", "beta1 and beta2"),
    value("name with a slash", "name: a/b", "must be letters, digits", "found 'a/b'"),
    value("name with a newline", 'name: "a\\nb"', "must be letters, digits", "found 'a\\nb'"),
    value("newline in a value", 'output_dir: "runs\\nx"', "output_dir: must be text without line breaks", "'runs\\nx'"),
    value("empty text", "output_dir: ''", "output_dir: must not be empty"),
    value("misspelt shape", "schedule: {shape: liner}", "found 'liner'", "did you mean linear?"),
    value("unknown shape", "schedule: {shape: 7}", "'cosine_restarts' or 'compound', found 7"),
    value("floor above the peak", "schedule: {floor: 2}", "schedule.floor: must be less than or equal to 1"),
    value("list for a JSON", "deepspeed: [1]", "deepspeed: must be text or a mapping of keys, found [1]"),
    InvalidJob(
        "unknown format",
        ("job.yaml:2: data.format", "found 'chat'"),
        with_data("{train: data/train.jsonl, format: chat}"),
    ),
    InvalidJob(
        "messages for a template",
        ("job.yaml:2: data.chat_template_kwargs", "messages cannot be set for a chat template"),
        with_data("{train: x, chat_template_kwargs: {messages: []}}"),
    ),
    InvalidJob(
        "trains on the first turn",
        ("job.yaml:2: data.learn", "must be 'all' or 'last'"),
        with_data("{train: x, learn: first}"),
    ),
    InvalidJob(
        "evaluates on all", ("job.yaml:2: data.eval", "less than 1", "found 1.5"), with_data("{train: x, eval: 1.5}")
    ),
    InvalidJob("length of zero", ("data.max_length: must be greater than 0"), with_data("{train: x, max_length: 0}")),
    InvalidJob(
        "environment of numbers", ("job.yaml:3: cluster.env.A: must be text, found 1"), with_cluster("{env: {A: 1}}")
    ),
]

OVERRIDES = [
    InvalidJob(
        "override without =", ("an override must be section.key=value", "train.max_steps=20"), overrides=("train.x",)
    ),
    InvalidJob("override without a key", ("an override must be section.key=value", "'=3'"), overrides=("=3",)),
    InvalidJob(
        "misspelt override",
        ("command line: train.max_stps", "did you mean max_steps?"),
        overrides=("train.max_stps=3",),
    ),
    InvalidJob(
        "invalid value in an override", ("command line: train.max_steps", "found 'x'"), overrides=("train.max_steps=x",)
    ),
    InvalidJob("override into a scalar", ("name is 'job' in the job file", "name.x"), overrides=("name.x=1",)),
    InvalidJob(
        "override of a section", ("command line: train: must be a mapping of keys, found 3",), overrides=("train=3",)
    ),
    InvalidJob("tag in an override", ("'train.seed=!!int x'", "not valid YAML"), overrides=("train.seed=!!int x",)),
    InvalidJob("alias of itself in an override", ("not valid YAML",), overrides=("deepspeed=&a [*a]",)),
    InvalidJob("override with half a list", ("'train.betas=[0.9'", "not valid YAML"), overrides=("train.betas=[0.9",)),
    InvalidJob(
        "overrides of two lengths",
        ("num_train_epochs and max_steps are both set",),
        overrides=("train.max_steps=20", "train.num_train_epochs=1"),
    ),
]

LAUGHS = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 20))
TAGS_AND_SIZES = [
    InvalidJob(
        "tag !!int", ("job.yaml:4: not valid YAML: the value does not fit its tag !!int",), JOB + "x: !!int ''\n"
    ),
    InvalidJob("tag !!bool", ("job.yaml:4: not valid YAML", "tag !!bool"), JOB + "x: !!bool maybe\n"),
    InvalidJob("tag !!timestamp", ("job.yaml:4: not valid YAML", "tag !!timestamp"), JOB + "x: !!timestamp soon\n"),
    InvalidJob("nested aliases", ("job.yaml: more than 100,000 values", "repeats"), JOB + "x0: &x0 [a]\n" + LAUGHS),
    InvalidJob(
        "hexadecimal number", ("job.yaml:4: not valid YAML: a number is too large",), JOB + f"x: 0x{'f' * 5000}\n"
    ),
    InvalidJob(
        "length of a run",
        ("job.yaml:4: train.max_steps: must be less than or equal to 10000000, found 100000000",),
        JOB + "train: {max_steps: 100000000}\n",
    ),
    InvalidJob(
        "batch of 301 digits",
        ("train.train_batch_size: must be less",),
        JOB + f"train: {{train_batch_size: 1{'0' * 300}}}\n",
    ),
    InvalidJob("no files", ("job.yaml:2: data.train", "at least 1 item"), with_data("{train: []}")),
    InvalidJob("long file name", ("File name too long",), with_data("{train: " + "a" * 300 + "}")),
    InvalidJob("long output folder", ("File name too long",), JOB + f"output_dir: {'a' * 300}\n"),
    InvalidJob(
        "key of the JSON that is a number",
        ("job.yaml:4: deepspeed.bf16.1: a key must be text",),
        JOB + "deepspeed: {bf16: {1: true}}\n",
    ),
    InvalidJob(
        "date in the JSON",
        ("job.yaml:4: deepspeed.x: found datetime.date(2026, 1, 2)",),
        JOB + "deepspeed: {x: 2026-01-02}\n",
    ),
    InvalidJob(
        "half a character in the JSON",
        ("job.yaml:4: deepspeed.x: found '\\ud800', which is not text",),
        JOB + 'deepspeed: {x: "\\ud800"}\n',
    ),
    InvalidJob(
        "number in a JSON file",
        ("ds.json:2: x: the number is too large",),
        JOB + "deepspeed: ds.json\n",
        files={"ds.json": f'{{\n"x": 1{"0" * 309}}}'},
    ),
    InvalidJob(
        "bytes for the chat template",
        ("job.yaml:2: data.chat_template_kwargs: must be text, numbers",),
        with_data("{train: data/train.jsonl, chat_template_kwargs: {a: !!binary aGk=}}"),
    ),
]

FILES = [
    InvalidJob(
        "data file missing",
        ("job.yaml:2: data.train: no file matches data/trian.jsonl", "did you mean data/train.jsonl?"),
        with_data("{train: data/trian.jsonl}"),
    ),
    InvalidJob(
        "empty glob",
        ("no file matches data/*.parquet", "working directory"),
        text=with_data("{train: 'data/*.parquet'}"),
    ),
    InvalidJob(
        "one of two missing", ("no file matches data/b.jsonl"), with_data("{train: [data/train.jsonl, data/b.jsonl]}")
    ),
    InvalidJob(
        "two kinds",
        ("job.yaml:2: data.train: all files must have the same type, found .csv, .jsonl"),
        with_data("{train: [data/train.jsonl, data/a.csv]}"),
        files={"data/a.csv": "text\na\n"},
    ),
    InvalidJob(
        "unknown suffix",
        ("data/a.xlsx has an unsupported file type", "valid: .jsonl"),
        with_data("{train: data/a.xlsx}"),
        files={"data/a.xlsx": "?"},
    ),
    InvalidJob(
        "folder without data",
        ("data.train: the folder model/sub contains no data", ".csv"),
        with_data("{train: model/sub}"),
        files={"model/sub/readme.md": "?"},
    ),
    InvalidJob(
        "evaluation data missing",
        ("data.eval: no file matches data/held-ot.jsonl", "data/held-out.jsonl?"),
        with_data("{train: data/train.jsonl, eval: data/held-ot.jsonl}"),
    ),
    InvalidJob(
        "model folder missing",
        ("job.yaml:1: model.name_or_path: folder not found: modle", "did you mean model?"),
        with_model("{name_or_path: ./modle}"),
    ),
    InvalidJob(
        "model folder without config",
        ("data has no config.json", "not a Hugging Face model"),
        with_model("{name_or_path: data}"),
    ),
    InvalidJob(
        "folder of a GGUF",
        ("has no config.json", "model.gguf_file"),
        with_model("{name_or_path: gg}"),
        files={"gg/a.gguf": "GGUF"},
    ),
    InvalidJob(
        "model is a file",
        ("is a file, not a folder", "model.gguf_file"),
        with_model("{name_or_path: model/config.json}"),
    ),
    InvalidJob(
        "GGUF missing",
        ("model.gguf_file: b.gguf not found in gg", "the folder has: a.gguf"),
        with_model("{name_or_path: gg, gguf_file: b.gguf}"),
        files={"gg/a.gguf": "GGUF"},
    ),
    InvalidJob(
        "home directory of an unknown user",
        (
            "job.yaml:4: output_dir: ~no-such-user/runs: the home directory ~no-such-user is unknown",
            "write ./~no-such-user",
        ),
        JOB + "output_dir: ~no-such-user/runs\n",
    ),
    InvalidJob(
        "JSON missing",
        ("job.yaml:4: deepspeed: the file my.json does not exist", "current folder: "),
        JOB + "deepspeed: my.json\n",
    ),
    InvalidJob(
        "misspelt preset",
        ("deepspeed: the file zero3_cpu_ofload does not exist", "did you mean the preset zero3_cpu_offload?"),
        JOB + "deepspeed: zero3_cpu_ofload\n",
    ),
    InvalidJob("unlike any preset", ("presets: zero1, zero2, zero3"), JOB + "deepspeed: qqq\n"),
    InvalidJob(
        "broken JSON",
        ("ds.json:3: not valid JSON"),
        JOB + "deepspeed: ds.json\n",
        files={"ds.json": '{\n  "zero_optimization": {},\n  "bf16" {}\n}\n'},
    ),
    InvalidJob(
        "key twice in the JSON",
        ("ds.json:3: bf16", "duplicate key"),
        JOB + "deepspeed: ds.json\n",
        files={"ds.json": '{\n"bf16": {},\n"bf16": {}\n}\n'},
    ),
    InvalidJob(
        "output on a file",
        ("job.yaml: output_dir", "is a file; a folder is needed"),
        JOB + "output_dir: data/train.jsonl/runs\n",
    ),
]

NUMBERS = [
    InvalidJob(
        "batch and world size",
        ("train_batch_size 30 is not divisible by world size 4", "28 or 32"),
        JOB + "train: {train_batch_size: 30}\n",
    ),
    InvalidJob(
        "batch and micro-batch",
        ("world size 4 x train_micro_batch_size_per_gpu 3 = 12", "24 or 36"),
        JOB + "train: {train_batch_size: 32, train_micro_batch_size_per_gpu: 3}\n",
    ),
    InvalidJob(
        "batch below the world size",
        ("not divisible", "the nearest valid size: 4"),
        JOB + "train: {train_batch_size: 2}\n",
    ),
    InvalidJob(
        "all three",
        ("micro-batch 2 x accumulation 3 x world size 4 = 24", "set it to 24", "it is then 4"),
        JOB + "train: {train_batch_size: 32, train_micro_batch_size_per_gpu: 2, gradient_accumulation_steps: 3}\n",
    ),
    InvalidJob(
        "batch in tokens without packing",
        ("job.yaml:4: train.tokens_per_batch: a batch can only be given in tokens", "data.packing: true"),
        JOB + "train: {tokens_per_batch: 65536}\n",
    ),
    InvalidJob(
        "batch in tokens below the world size",
        ("train.tokens_per_batch: 5000 tokens are fewer than 4 bins of 2048", "use at least 8192"),
        JOB + "train: {tokens_per_batch: 5000}\n",
        ("data.packing=true",),
    ),
    InvalidJob(
        "batch sizes of job and JSON",
        ("not divisible by world size 4 x train_micro_batch_size_per_gpu 3",),
        JOB + "train: {train_batch_size: 32}\ndeepspeed: {train_micro_batch_size_per_gpu: 3}\n",
    ),
    InvalidJob(
        "evaluates after the end",
        ("job.yaml:4: train.eval_every: 50 is more than the run's 20 updates", "at most 20"),
        JOB + "train: {max_steps: 20, eval_every: 50}\n",
    ),
    InvalidJob(
        "no evaluation data",
        ("train.eval_every: the job has no evaluation data", "data.eval"),
        JOB + "train: {max_steps: 20, eval_every: 5}\n",
    ),
    InvalidJob(
        "GPUs and processes",
        ("job.yaml:3: cluster.processes_per_node: 3 processes and 8 GPUs", "each GPU has one rank"),
        with_cluster("{gpus_per_node: 8, processes_per_node: 3}"),
    ),
    InvalidJob(
        "more nodes at least than at all",
        ("job.yaml:3: cluster", "min_nodes is 4, but nodes is 2"),
        with_cluster("{nodes: 2, min_nodes: 4, gpus_per_node: 0}"),
    ),
    InvalidJob("no minimum of nodes", ("cluster.min_nodes", "0"), with_cluster("{min_nodes: 0, gpus_per_node: 0}")),
    InvalidJob(
        "unknown health checks",
        ("job.yaml:3: cluster.health_checks", "'auto', 'off' or 'full'", "found true"),
        with_cluster("{gpus_per_node: 0, health_checks: on}"),
    ),
    InvalidJob("negative restarts", ("train.restarts", "-1"), JOB + "train: {max_steps: 20, restarts: -1}\n"),
    InvalidJob("negative hang_seconds", ("train.hang_seconds", "-5"), JOB + "train: {hang_seconds: -5}\n"),
    InvalidJob(
        "hang_seconds as text", ("train.hang_seconds", "soon"), JOB + "train: {max_steps: 20, hang_seconds: soon}\n"
    ),
    InvalidJob(
        "ZeRO stage 4",
        ("zero_optimization.stage", "4 is not an allowed value", "one of 0, 1, 2, 3"),
        JOB + "deepspeed: {zero_optimization: {stage: 4}}\n",
    ),
    InvalidJob(
        "both half precisions",
        ("fp16 and bf16 are both on",),
        JOB + "deepspeed: {fp16: {enabled: true}, bf16: {enabled: true}}\n",
    ),
]

WRONG_TYPES = [
    InvalidJob(
        f"wrong type of {name}",
        (f"job.yaml:{line}: deepspeed.{key}: found", "Write a block"),
        text=JOB + f"deepspeed:\n  {text}\n",
    )
    for name, key, line, text in (
        ("scheduler params", "scheduler.params", 5, "scheduler: {type: WarmupLR, params: 5}"),
        ("scheduler", "scheduler", 5, "scheduler: 5"),
        ("optimizer params", "optimizer.params", 5, "optimizer: {type: AdamW, params: 5}"),
        ("optimizer", "optimizer", 5, "optimizer: [AdamW]"),
        ("precision", "bf16", 5, "bf16: true"),
        ("ZeRO block", "zero_optimization", 5, "zero_optimization: 3"),
    )
]

TABLE = [*SHAPE_OF_FILE, *KEYS, *VALUES, *OVERRIDES, *TAGS_AND_SIZES, *FILES, *NUMBERS, *WRONG_TYPES]

CONTRADICTIONS = [
    Contradiction(
        "beyond the positions",
        ("job.yaml:2: data.max_length: 2048 is more than the 1024 positions", "at most 1024"),
        model={"max_positions": 1024},
    ),
    Contradiction(
        "no gradient checkpointing",
        ("model.gradient_checkpointing: llama does not support it", "false"),
        text="model: {name_or_path: model, gradient_checkpointing: true}\n",
        model={"supports_gradient_checkpointing": False},
    ),
    Contradiction(
        "no chat template",
        ("data.format: this model's tokenizer has no chat template", "instruct"),
        text="data: {train: data/train.jsonl, format: messages}\n",
        model={"has_chat_template": False},
    ),
    Contradiction(
        "epochs below a batch",
        ("train.train_batch_size: the run has 20 sequences, fewer than one batch of 64", "at most 20"),
        text="train: {train_batch_size: 64}\n",
        data={"sequences": 20},
    ),
    Contradiction(
        "evaluates beyond the epochs",
        ("train.eval_every: 40 is more than the run's 32 updates",),
        text="train: {train_batch_size: 32, eval_every: 40}\ndata: {train: data/train.jsonl, eval: 0.1}\n",
        data={"evaluated": 100},
    ),
    Contradiction(
        "peak unsafe",
        ("job.yaml:4: schedule.peak_lr: a peak of 0.0002 is high", "at most 5e-05", "schedule.allow_unsafe: true"),
        text="schedule: {peak_lr: 2e-4}\n",
    ),
    Contradiction(
        "warm-up beyond the run",
        ("schedule.warmup: the warm-up of 500 updates is longer than the run of 20", "warm up for 4 updates"),
        text="train: {max_steps: 20}\nschedule: {warmup: 500}\n",
    ),
    Contradiction(
        "log warm-up by default",
        ("scheduler.params.warmup_type: The log ramp is the default", "schedule.allow_unsafe: true"),
        text="train: {max_steps: 20}\ndeepspeed: {optimizer: {type: AdamW, params: {lr: 1e-5}}, scheduler: {type: "
        "WarmupDecayLR, params: {total_num_steps: 20, warmup_num_steps: 10, warmup_max_lr: 1e-5}}}\n",
    ),
    Contradiction(
        "DeepSpeed's inherited 1e-3",
        ("job.yaml:5: deepspeed.scheduler.params: no warmup_max_lr", "peaks at 1e-3"),
        text="train: {max_steps: 20}\ndeepspeed: {optimizer: {type: AdamW, params: {lr: 1e-5}}, scheduler: {type: "
        "WarmupDecayLR, params: {total_num_steps: 20, warmup_num_steps: 10, warmup_type: linear}}}\n",
    ),
    Contradiction("unknown warm-up", ("schedule.warmup", "'soon'"), text="schedule: {warmup: soon}\n"),
    Contradiction(
        "segments end early",
        ("schedule.segments", "until: 1.0"),
        text="schedule: {shape: compound, segments: [{kind: linear, until: 0.5, to: 0}]}\n",
    ),
    Contradiction(
        "learning rates of job and JSON",
        ("optimizer.params.lr", "schedule.peak_lr in the job is 1e-05", "2e-05 here"),
        text="schedule: {peak_lr: 1e-5}\ndeepspeed: {optimizer: {type: AdamW, params: {lr: 2e-5}}}\n",
    ),
    Contradiction(
        "batches of job and JSON",
        ("train_batch_size: 16 here, but train.train_batch_size in the job is 32",),
        text="train: {train_batch_size: 32}\ndeepspeed: {train_batch_size: 16}\n",
    ),
    Contradiction(
        "clipping of job and JSON",
        ("gradient_clipping: 0.5 here", "in the job is 1.0"),
        text="train: {gradient_clipping: 1.0}\ndeepspeed: {gradient_clipping: 0.5}\n",
    ),
    Contradiction(
        "precision of job and JSON",
        ("the JSON sets bf16", "model.dtype in the job"),
        text="model: {name_or_path: model, dtype: float32}\ndeepspeed: {bf16: {enabled: true}}\n",
    ),
    Contradiction(
        "a parameter that the optimizer lacks",
        ("job.yaml:4: train.betas: SGD does not accept it", "job.yaml:4: train.eps: SGD does not", "weight_decay"),
        text="train: {betas: [0.9, 0.95], eps: 1e-7, weight_decay: 0.1}\n"
        "deepspeed: {optimizer: {type: SGD, params: {lr: 1e-6}}}\n",
    ),
    Contradiction(
        "a parameter of another optimizer",
        ("train.eps: Adafactor does not accept it",),
        text="train: {eps: 1e-7}\ndeepspeed: {optimizer: {type: Adafactor, params: {lr: 1e-6}}}\n",
    ),
    Contradiction(
        "fp16 on CPUs",
        ("fp16.enabled", "DeepSpeed does not support fp16 on CPUs"),
        text="model: {name_or_path: model, dtype: float16}\n",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def catalogue() -> None:
    """Caches DeepSpeed's keys: for a version other than the shipped one this starts a process."""
    load_catalogue()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a valid job, its model and its data. Starting a process fails the test."""

    def fail(*arguments: object, **_: object) -> None:
        raise AssertionError(f"a process was started: {arguments}")

    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", fail)
    return tmp_path


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def check_error(err: str, expected: tuple[str, ...] | str) -> None:
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for words in (expected,) if isinstance(expected, str) else expected:
        assert words in err


def test_the_rows_have_different_names() -> None:
    assert len(TABLE) + len(CONTRADICTIONS) >= 35
    names = [row.id for row in (*TABLE, *CONTRADICTIONS)]
    assert len(set(names)) == len(names)


def test_the_unchanged_job_is_valid(folder: Path) -> None:
    remember(folder / "job.yaml", (), model_facts(), data_facts())
    ended = command("plan", "job.yaml")
    assert ended.status == 0, ended.err


RUNS = [pytest.param("run", row, id=row.id) for row in TABLE]
PLANS = [pytest.param("plan", row, id=f"{row.id}, planned") for row in (*NUMBERS, *WRONG_TYPES)]


@pytest.mark.parametrize(("verb", "row"), RUNS + PLANS)
def test_an_invalid_job_fails_before_anything_starts(verb: str, row: InvalidJob, folder: Path) -> None:
    for name, content in row.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "job.yaml").write_bytes(row.text if isinstance(row.text, bytes) else row.text.encode())
    before = tree(folder)

    ended = command(verb, "job.yaml", *row.overrides)

    check_error(ended.err, row.expected)
    assert (ended.status, ended.out) == (2, "")
    assert tree(folder) == before


@pytest.mark.parametrize("verb", ["run", "plan"])
@pytest.mark.parametrize("row", CONTRADICTIONS, ids=lambda row: row.id)
def test_a_contradiction_with_model_or_data_creates_no_run_directory(
    row: Contradiction, verb: str, folder: Path
) -> None:
    sections = [line for line in JOB.splitlines() if f"{line.split(':')[0]}:" not in row.text]
    (folder / "job.yaml").write_text("\n".join(sections) + "\n" + row.text)
    remember(folder / "job.yaml", (), model_facts(**row.model), data_facts(**row.data))
    before = tree(folder)

    ended = command(verb, "job.yaml")

    check_error(ended.err, row.expected)
    assert ended.status == 2
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("name", "words"), [("nothing.yaml", "job file not found"), ("data", "this is a folder, not a job file")]
)
def test_a_path_that_is_not_a_job_file(name: str, words: str) -> None:
    ended = command("run", name)
    check_error(ended.err, (words, name))
    assert ended.status == 2


def test_all_errors_are_reported_together(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB + "train: {max_steps: no, sed: 3}\nschedule: {shape: sine}\n")
    ended = command("run", "job.yaml")
    assert ended.status == 2
    assert [line.split(": ")[2] for line in ended.err.splitlines() if line.startswith("error: ")] == [
        "train.max_steps",
        "train.sed",
        "schedule.shape",
    ]
