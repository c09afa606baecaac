"""The pretrained model of a plan, and the DeepSpeed engine around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.liger import apply_liger_kernel

from launcher import document_attention
from launcher.errors import RunFailed
from launcher.plan.schema import Plan
from launcher.trainable import set_trainable
from launcher.worker.experts import gather_experts_together
from launcher.worker.scheduler import client_scheduler
from launcher.worker.ulysses import exchange_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(plan: Plan) -> Any:
    """The pretrained model in the plan's precision, with the parameters that the job trains selected.

    Under ZeRO-3 each rank loads only its partition of the weights.
    """
    model_section = plan.training.job.model
    options: dict[str, Any] = {}
    attention = model_section.attn_implementation
    if plan.training.job.data.packing and attention in ("auto", "sdpa"):
        document_attention.register()
        attention = document_attention.NAME
    if attention != "auto":
        options["attn_implementation"] = attention
    with _sharded_loading(plan):
        model = AutoModelForCausalLM.from_pretrained(
            plan.training.model.folder,
            dtype=DTYPES[plan.precision],
            trust_remote_code=model_section.trust_remote_code,
            **options,
        )
    if model_section.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if model_section.liger:
        apply_liger_kernel(model, None)
    # Adapters are initialised at random: the same on every rank and under every ZeRO stage.
    set_seed(plan.job.train.seed)
    model = set_trainable(model, model_section)
    model.train()
    return model


def load_tokenizer(plan: Plan) -> Any:
    """The model's tokenizer."""
    return AutoTokenizer.from_pretrained(
        plan.training.model.folder, trust_remote_code=plan.training.job.model.trust_remote_code
    )


def make_engine(plan: Plan, model: Any, *, universal: bool = False) -> Any:
    """The DeepSpeed engine, as `deepspeed.initialize` returns it.

    `universal` makes it load a converted checkpoint. This overrides the JSON: DeepSpeed cannot load an ordinary
    checkpoint as a converted one.
    """
    config, checkpoint = plan.ds_config, plan.ds_config.get("checkpoint") or {}
    if universal != checkpoint.get("load_universal", False):
        config = {**config, "checkpoint": {**checkpoint, "load_universal": universal}}
    scheduler = client_scheduler(plan)
    if plan.zero_stage == 3:
        gather_experts_together(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        config=config,
        lr_scheduler=scheduler,
        mpu=exchange_attention(plan, model),
        dist_init_required=False,
    )
    if plan.training.job.model.torch_compile:
        engine.compile()
    return engine


def parameter_groups(model: Any) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings with weight decay, norms and biases without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if _dimensions(p) >= 2]
    vectors = [p for p in trained if _dimensions(p) < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _dimensions(parameter: Any) -> int:
    """The number of dimensions; under ZeRO-3 parameters are flat and `ds_shape` has the shape. Raises RunFailed."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if 0 in shape:
        raise RunFailed("DeepSpeed does not report the shape of a partitioned weight: it may be a matrix or a vector")
    return len(shape)


@contextlib.contextmanager
def _sharded_loading(plan: Plan) -> Iterator[None]:
    """Under ZeRO-3 transformers partitions weights as it loads them while an HfDeepSpeedConfig exists."""
    config = HfDeepSpeedConfig(plan.ds_config) if plan.zero_stage == 3 else None
    try:
        yield
    finally:
        del config
