"""Measuring a pretrained model, and turning a GGUF into a Hugging Face folder once."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RequestError, first_line
from launcher.job.model import ModelSection
from launcher.methods import adapted_modules, choose_trained
from launcher.plan.facts import ModelFacts
from launcher.token_store import publish_folder

Progress = Callable[..., None]
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def download(name: str, revision: str | None) -> Path:
    """The local snapshot of a hub model, fetched where it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.gguf"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        hint = "give a local folder, or download it first where there is internet (`hf download`)"
        reason = first_line(error)
        raise RequestError(
            Problem(
                f"{name} is no folder here and cannot be had from the hub: {reason}",
                key="model.name_or_path",
                hint=hint,
            )
        ) from None


def convert_gguf(folder: Path, gguf_file: str, target: Path, progress: Progress) -> None:
    """Writes the GGUF's weights, config and tokenizer as a Hugging Face folder `target` (float32)."""
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
    # The weights are plain float32 now; what says otherwise would make transformers look for a quantizer.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        progress(message="writing it as safetensors, once")
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def measure_model(folder: Path, section: ModelSection) -> ModelFacts:
    """Sizes of the model in `folder`, and of what `section` trains of it, counted on a model without memory.

    Raises RequestError.
    """
    from transformers import AutoConfig

    trust_remote_code = section.trust_remote_code
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise RequestError(Problem(f"{folder} holds no weights (*.safetensors)", key="model.name_or_path"))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = _empty_model(config, trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as error:
        reason = first_line(error)
        raise RequestError(
            Problem(
                f"no causal language model can be made from {folder}: {reason}",
                key="model.name_or_path",
                hint="a newer transformers may know it; model.trust_remote_code: true runs code that comes with it",
            )
        ) from None
    if section.liger:
        check_liger(str(config.model_type))
    facts = _facts(folder, config, model)
    if section.lora is None and not section.freeze:
        return facts
    model = choose_trained(model, section)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return facts.model_copy(update={"trainable_parameters": trained, "adapted_modules": adapted_modules(model)})


def check_liger(model_type: str) -> None:
    """Has liger-kernel kernels for this kind of model? Raises RequestError."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except (ImportError, RuntimeError) as error:
        found = f"liger-kernel cannot be loaded: {first_line(error)}"
        raise RequestError(Problem(found, key="model.liger", hint="fix the installation, or set it to false")) from None
    if model_type not in known:
        match = f"it knows {', '.join(sorted(known))}"
        raise RequestError(
            Problem(f"liger-kernel has no kernels for {model_type}: {match}", key="model.liger", hint="set it to false")
        )


def _empty_model(config: Any, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _facts(folder: Path, config: Any, model: Any) -> ModelFacts:
    text = config.get_text_config()
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    embedding = {id(e.weight): e.weight.numel() for e in embeddings if e is not None}
    hidden = int(text.hidden_size)
    parameters = sum(p.numel() for p in model.parameters())
    return ModelFacts(
        folder=str(folder),
        model_type=str(config.model_type),
        parameters=parameters,
        trainable_parameters=parameters,
        embedding_parameters=sum(embedding.values()),
        hidden_size=hidden,
        intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * hidden),
        layers=int(text.num_hidden_layers),
        attention_heads=int(text.num_attention_heads),
        key_value_heads=getattr(text, "num_key_value_heads", None),
        whole_attention=_whole_attention(text, model),
        vocab_size=int(text.vocab_size),
        max_positions=getattr(text, "max_position_embeddings", None),
        tied_embeddings=len(embedding) == 1,
        stored_dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        supports_gradient_checkpointing=bool(model.supports_gradient_checkpointing),
        has_chat_template=_has_chat_template(folder),
    )


def _whole_attention(text: Any, model: Any) -> bool:
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    exchangeable = bool(getattr(model, "_supports_attention_backend", False))
    return exchangeable and kinds == {"full_attention"} and window is None


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and '"chat_template"' in config.read_text()
