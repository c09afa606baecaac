"""`launcher init`: write a starter job file, and copies of the files that users edit."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import typer

from launcher.errors import Problem, RequestError
from launcher.job.read import load_yaml, validate_job
from launcher.presets import shipped_folder

_STARTER = """\
# A fine-tuning job. `launcher plan {name}.yaml` shows its plan, `launcher run {name}.yaml` runs it,
# and `launcher schema` prints every key with its description.
name: {name}

model:
  name_or_path: {model}      # hub name or folder
  dtype: auto                # bfloat16 if the hardware supports it
  gradient_checkpointing: false
  # lora: {{r: 16}}            # train low-rank adapters only; more keys: alpha, dropout, target_modules, merge

data:
  train: {data}              # file(s), a glob or a hub name: jsonl, json, parquet, csv, txt
  eval: 0.02                 # files, or a fraction of the training rows
  format: auto               # messages | prompt-completion | instruction | text
  max_length: 2048           # tokens; longer rows are truncated and counted
  # packing: true            # fill rows of max_length with several sequences instead of padding them

train:
  num_train_epochs: 3        # or max_steps
  train_batch_size: auto     # sequences per update = micro-batch x accumulation x ranks
  train_micro_batch_size_per_gpu: auto
  seed: 42

schedule:                    # auto: chosen from model size, batch size and run length; `launcher lr` explains why
  shape: auto                # linear | cosine | constant | step | wsd | cosine_restarts | compound
  peak_lr: auto
  warmup: auto               # updates (100), a fraction (0.03) or tokens (2M tokens)

deepspeed: ds_configs/zero2.json   # edit as you like; values "auto" are filled in

cluster:
  gpus_per_node: auto        # on CPUs, set processes_per_node instead
  # nodes: 2                 # default: 1, or under Slurm all nodes of the allocation

checkpoint:
  every: 500                 # updates
  keep: 2

output_dir: runs
"""


def init(
    folder: Path = typer.Argument(Path(), metavar="[DIR]", help="Where to write; created if missing."),
    model: str = typer.Option("HuggingFaceTB/SmolLM2-135M-Instruct", help="The model's hub name or folder."),
    data: str = typer.Option("data/train.jsonl", help="The training data."),
    name: str = typer.Option("my-job", help="The name of the job and of its file."),
) -> None:
    """Write a commented job file, the DeepSpeed presets and the sbatch template. Overwrites nothing."""
    files = {Path(f"{name}.yaml"): starter_job(name, model, data).encode()}
    for shipped in ("ds_configs", "slurm"):
        for path in sorted(shipped_folder(shipped).iterdir()):
            if path.is_file():
                files[Path(shipped) / path.name] = path.read_bytes()
    if folder.exists() and not folder.is_dir():
        raise RequestError(Problem("this is a file; a folder is needed", file=str(folder)))
    taken = [str(folder / path) for path in files if (folder / path).exists()]
    if taken:
        raise RequestError(
            Problem(
                f"these files already exist and are not overwritten: {', '.join(taken)}",
                hint="give another folder or --name",
            )
        )
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        typer.echo(f"wrote {target}")
    change_folder = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    typer.echo(f"next: {change_folder}launcher plan {name}.yaml    # once the training data is at {data}")


def starter_job(name: str, model: str, data: str) -> str:
    """The text of a commented job file. Raises RequestError for values that are invalid in a job file."""
    text = _STARTER.format(name=name, model=_quoted(model), data=_quoted(data))
    values, lines = load_yaml(text, f"{name}.yaml")
    validate_job(values, lines, f"{name}.yaml")
    return text


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
