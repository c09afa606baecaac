"""Measures a pretrained model, and converts a GGUF to a Hugging Face folder once."""

from __future__ import annotations

import copy
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import Problem, RequestError, first_line
from launcher.job.schema import ModelSection
from launcher.plan.facts import ModelFacts
from launcher.prepare.model_flops import forward_flops
from launcher.prepare.model_kind import (
    check_causal,
    check_config,
    check_weights,
    kind_notes,
    router_loss_coefficient,
    unused_weights,
)
from launcher.prepare.model_sizes import model_sizes
from launcher.prepare.small_model_probe import probe_small_model
from launcher.prepare.stored_weights import check_adapter, check_stored_types
from launcher.token_store import publish_folder
from launcher.trainable import adapted_modules, set_trainable

Progress = Callable[..., None]
T = TypeVar("T")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def download(name: str, revision: str | None) -> Path:
    """The local snapshot of a hub model; downloads it if necessary."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.gguf"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        hint = "use a local folder, or download the model on a machine with internet access (`hf download`)"
        reason = first_line(error)
        raise RequestError(
            Problem(
                f"{name} is not a local folder and cannot be downloaded from the hub: {reason}",
                key="model.name_or_path",
                hint=hint,
            )
        ) from None


def convert_gguf(folder: Path, gguf_file: str, target: Path, progress: Progress) -> None:
    """Converts the GGUF's weights, config and tokenizer to the Hugging Face folder `target` (float32)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress(message=f"reading {gguf_file}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    except ImportError as error:
        raise RequestError(
            Problem(
                first_line(error),
                key="model.gguf_file",
                hint="pip install gguf",
            )
        ) from None
    except (ValueError, KeyError, OSError) as error:
        raise RequestError(Problem(f"{gguf_file} cannot be read: {error}", key="model.gguf_file")) from None
    # The weights are float32 now; with these attributes transformers would look for a quantizer.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        progress(message="converting it to safetensors")
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def measure_model(folder: Path, section: ModelSection, *, trained_here: bool = True) -> ModelFacts:
    """Sizes of the model in `folder`, and of the parameters that `section` trains, counted on a meta-device model.

    `trained_here`: the launcher trains the model, not the user's script. It then also checks the model's kind, its
    weights, and the logits of a small instance. Raises RequestError.
    """
    if trained_here:
        check_adapter(folder)
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise RequestError(Problem(f"{folder} has no weights (*.safetensors)", key="model.name_or_path"))
    config = _checked_call(folder, lambda: _read_config(folder, section))
    if trained_here:
        check_config(config, section)
        check_stored_types(folder)
    model = _checked_call(folder, lambda: _empty_model(config, section))
    if section.liger:
        check_liger(str(config.model_type))
    facts = _checked_call(folder, lambda: model_sizes(folder, config, model))
    if trained_here:
        per_token, per_pair = forward_flops(model)
        facts = facts.model_copy(update={"flops_per_token": per_token, "flops_per_pair": per_pair})
        facts = facts.model_copy(update=_checked(folder, section, config, model, facts.parameters))
    if section.lora is None and not section.freeze:
        return facts
    from launcher.chunked_loss import LossLayer

    model = set_trainable(model, section)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return facts.model_copy(
        update={
            "trainable_parameters": trained,
            "adapted_modules": adapted_modules(model),
            # Adapters may have replaced the output layer.
            "chunked_loss": facts.chunked_loss and LossLayer.fits(model),
        }
    )


def _checked_call(folder: Path, make: Callable[[], T]) -> T:
    """Runs `make` and converts every error of transformers, or of code from the model, to RequestError."""
    try:
        return make()
    except Exception as error:
        # A config that does not fit its class can raise anything: KeyError, AssertionError, ZeroDivisionError.
        reason = first_line(error) if isinstance(error, ValueError | OSError | ImportError) else _named(error)
        raise RequestError(
            Problem(
                f"cannot build a causal language model from {folder}: {reason}",
                key="model.name_or_path",
                hint="try a newer transformers; model.trust_remote_code: true runs code from the model",
            )
        ) from None


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _checked(folder: Path, section: ModelSection, config: Any, model: Any, parameters: int) -> dict[str, Any]:
    """Facts from the checkpoint's list of weights and from a small instance. Raises RequestError."""
    loading = _checked_call(folder, lambda: _loading_report(folder, section))
    probe = probe_small_model(type(model), model.config, parameters)
    check_causal(config, probe)
    check_weights(loading, {name for name, _ in model.named_parameters(remove_duplicate=False)}, str(folder))
    coefficient = router_loss_coefficient(config, probe)
    notes = (*unused_weights(loading), *kind_notes(config, probe, coefficient))
    return {
        "router_loss_coefficient": coefficient,
        "chunked_loss": probe.chunked_loss,
        "packed_attention": probe.packed_attention,
        "notes": notes,
    }


def check_liger(model_type: str) -> None:
    """Raises RequestError if liger-kernel has no kernels for this type of model."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except (ImportError, RuntimeError) as error:
        found = f"liger-kernel cannot be loaded: {first_line(error)}"
        raise RequestError(Problem(found, key="model.liger", hint="fix the installation, or set it to false")) from None
    if model_type not in known:
        match = f"it supports {', '.join(sorted(known))}"
        raise RequestError(
            Problem(f"liger-kernel has no kernels for {model_type}: {match}", key="model.liger", hint="set it to false")
        )


def _read_config(folder: Path, section: ModelSection) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)


def _empty_model(config: Any, section: ModelSection) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # Some classes modify their config.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=section.trust_remote_code)


def _loading_report(folder: Path, section: ModelSection) -> dict[str, Any]:
    """Which weights are missing, unexpected or of another shape. Reads no weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        _, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=section.trust_remote_code,
        )
    finally:
        logging.set_verbosity(verbosity)
    return dict(loading)
