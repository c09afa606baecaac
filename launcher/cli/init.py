"""`launcher init`: a job file to start from, and copies of what users edit."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import typer

from launcher.errors import Problem, RequestError
from launcher.job.read import load_yaml, validate_job
from launcher.presets import shipped_folder

_STARTER = """\
# A fine-tuning job. `launcher plan {name}.yaml` shows what it comes to, `launcher run {name}.yaml` carries it out,
# and `launcher schema` prints every key with its meaning.
name: {name}

model:
  name_or_path: {model}      # hub name or folder
  dtype: auto                # bfloat16 where the hardware has it
  gradient_checkpointing: false
  # lora: {{r: 16}}            # train low-rank adapters instead of all weights: alpha, dropout, target_modules, merge

data:
  train: {data}              # file(s), a glob or a hub name: jsonl, json, parquet, csv, txt
  eval: 0.02                 # files, or a fraction of the training rows
  format: auto               # messages | prompt-completion | instruction | text
  max_length: 2048           # tokens; longer rows are cut and counted

train:
  num_train_epochs: 3        # or max_steps
  train_batch_size: auto     # sequences an update = micro-batch x accumulation x ranks
  train_micro_batch_size_per_gpu: auto
  seed: 42

schedule:                    # auto: chosen from the model's size, the batch and the length; `launcher plan` says why
  shape: auto                # linear | cosine | constant | step | wsd | cosine_restarts | compound
  peak_lr: auto
  warmup: auto               # updates (100), a share (0.03) or tokens (2M tokens)

deepspeed: ds_configs/zero2.json   # yours to edit; "auto" is filled in

cluster:
  gpus_per_node: auto        # without GPUs: processes_per_node
  # nodes: 2                 # without it one; under Slurm as many as the allocation has

checkpoint:
  every: 500                 # updates
  keep: 2

output_dir: runs
"""


def init(
    folder: Path = typer.Argument(Path(), metavar="[DIR]", help="Where to write; made if it is not there."),
    model: str = typer.Option("HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub name or folder of the model."),
    data: str = typer.Option("data/train.jsonl", help="The training data."),
    name: str = typer.Option("my-job", help="The job's name, and the job file's."),
) -> None:
    """Write a commented job file, the DeepSpeed presets and the sbatch template. Nothing is overwritten."""
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
                f"already there, and nothing is overwritten: {', '.join(taken)}",
                hint="take another folder or --name",
            )
        )
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        typer.echo(f"wrote {target}")
    there = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    typer.echo(f"next: {there}launcher plan {name}.yaml    # once the training data is at {data}")


def starter_job(name: str, model: str, data: str) -> str:
    """The text of a commented job file. Raises RequestError for values that no job file can hold."""
    text = _STARTER.format(name=name, model=_quoted(model), data=_quoted(data))
    values, lines = load_yaml(text, f"{name}.yaml")
    validate_job(values, lines, f"{name}.yaml")
    return text


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
