"""The exporting process: `python -m launcher.worker.exporter` exports a checkpoint as a Hugging Face folder.

It reads a request (launcher/runs/export.py) from standard input and writes JSON lines: {"progress": text}, or
{"error": text}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers.utils import logging as transformers_logging

from launcher.errors import LauncherError, RunFailed, code_of, needs_no_traceback, os_error_text
from launcher.export_folder import ExportRequest
from launcher.files import keep_private, use_output_mode
from launcher.plan.schema import Plan
from launcher.plan_file import read_plan
from launcher.worker.export import trained_weights, write_export
from launcher.worker.full_disk import naming_full_disk
from launcher.worker.model import DTYPES, load_model

_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_MODEL_STATES = "mp_rank_00_model_states.pt"
_PROGRESS_REPORTS = 8
"""Number of progress reports while the weights are read."""


def main() -> int:
    """Returns 0 if exported, 1 if failed (traceback on standard error). Only answers go to standard output."""
    keep_private()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to standard error

    def answer(**message: str) -> None:
        answers.write(json.dumps(message) + "\n")

    request = ExportRequest.model_validate_json(sys.stdin.read())
    transformers_logging.disable_progress_bar()
    try:
        with naming_full_disk(request.folder):
            export_checkpoint(request, lambda text: answer(progress=text))
    except LauncherError as error:
        answer(error=str(error), code=error.code)
        return 1
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, OSError) and needs_no_traceback(error):
            answer(error=f"the export could not be written: {os_error_text(error)}", code=code_of(error))
        return 1
    return 0


def export_checkpoint(request: ExportRequest, progress: Callable[[str], None]) -> None:
    """Exports a checkpoint to the folder of the request. Raises RunFailed if the checkpoint does not fit the model.

    Without a requested dtype, the weights are bit for bit those that the run itself would export at that update.
    """
    trained = read_plan(request.plan_file)
    use_output_mode(trained.job.output_mode)
    plan = unsharded_plan(trained, request)
    progress("reading the pretrained model")
    model = load_model(plan).to(DTYPES[plan.precision])
    copy_weights(model, saved_weights(request.checkpoint, trained, plan.precision, progress), progress)
    progress("writing the export")
    write_export(model, trained_weights(model, plan), plan, request.folder)


def unsharded_plan(plan: Plan, request: ExportRequest) -> Plan:
    """The plan changed to load the model unsharded, in the requested dtype, and without options that need a GPU."""
    precision = _PRECISIONS[request.dtype] if request.dtype else plan.precision
    section = plan.training.job.model
    changes: dict[str, Any] = {"attn_implementation": "auto", "liger": False, "gradient_checkpointing": False}
    if section.lora is not None and request.merge:
        changes["lora"] = section.lora.model_copy(update={"merge": True})
    job = plan.training.job.model_copy(update={"model": section.model_copy(update=changes)})
    workload = plan.training.model_copy(update={"job": job})
    return plan.model_copy(update={"workload": workload, "precision": precision, "zero_stage": 0})


def saved_weights(checkpoint: Path, plan: Plan, precision: str, progress: Callable[[str], None]) -> Mapping[str, Any]:
    """The trained weights of a checkpoint by name: tensors, or lazy ones that `contiguous()` turns into tensors.

    Under ZeRO 3 they are assembled from the ranks' float32 shards; the weights in training are a cast of these. Under
    ZeRO 1 and 2 the shards are used only for an export that is more precise than the weights in training.
    """
    if plan.zero_stage == 3:
        return _from_shards(checkpoint)
    if precision == "fp32" and plan.precision != "fp32":
        try:
            return _from_shards(checkpoint)
        except (ValueError, FileNotFoundError) as error:
            # Without ZeRO, or with bfloat16 and float32 gradient accumulation, DeepSpeed uses another optimizer.
            if plan.zero_stage > 0 and "is not a zero checkpoint" not in str(error):
                raise
            progress(f"this run's optimizer has no ZeRO shards: exporting its {plan.precision} weights as float32")
    states = torch.load(checkpoint / _MODEL_STATES, map_location="cpu", mmap=True, weights_only=False)
    weights: Mapping[str, Any] = states["module"]
    return weights


def _from_shards(checkpoint: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoint.parent), tag=checkpoint.name, exclude_frozen_parameters=True, lazy_mode=True
    )
    return found


@torch.no_grad()
def copy_weights(model: Any, weights: Mapping[str, Any], progress: Callable[[str], None]) -> None:
    """Copies weights into a model, one at a time. Raises RunFailed if one does not fit or a trained one is missing."""
    own = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    copied: set[int] = set()
    step = max(1, len(weights) // _PROGRESS_REPORTS)
    for number, (name, weight) in enumerate(weights.items()):
        if number % step == 0:
            progress(f"reading the checkpoint: {number} of {len(weights)} weights")
        target = own.get(name)
        if target is None or target.shape != weight.shape:
            raise RunFailed(f"the checkpoint belongs to a different model: it differs in {name}")
        target.copy_(weight.contiguous())
        copied.add(id(target))
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in copied]
    if missing:
        raise RunFailed(f"the checkpoint belongs to a different model: it lacks {', '.join(missing[:5])}")


if __name__ == "__main__":
    sys.exit(main())
