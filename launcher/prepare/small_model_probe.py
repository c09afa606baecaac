"""Probes a small model of the same architecture: whether it is causal, and which loss it computes.

A config does not show whether a later token changes an earlier logit (`is_decoder`, masks built in the code, remote
code). A small instance with random weights shows it in about a second.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from launcher.errors import first_line
from launcher.prepare.small_config import config_with_fewer_layers, small_config, smallest_config

_SMALL = 20_000_000
"""Up to this number of parameters, the model itself is run."""
_AFFORDABLE = 300_000_000
_LENGTH = 12
_TOLERANCE = 1e-3
"""As a fraction of the logits' standard deviation: above the rounding in experts, far below a visible token."""


@dataclass(frozen=True)
class ModelProbeResult:
    """The result for a small instance. `failure`: why the probe failed; the other fields are None then.

    `causal`: no later token changes an earlier logit. `own_loss` is the loss that the model computes from labels,
    `plain_loss` the mean next-token cross entropy of its logits, both in nats. `shifts_labels`: `own_loss` is for the
    next token (a few old classes expect shifted labels). `router_loss` is the balance loss of the routers before its
    coefficient; None if the config does not enable it or the class has none. `has_router_loss`: the class has one.
    `chunked_loss`: the loss from the output layer alone (`launcher.chunked_loss`) equals that of the logits.
    `packed_attention`: see `launcher.prepare.packing_probe`.
    """

    causal: bool | None = None
    own_loss: float | None = None
    plain_loss: float | None = None
    shifts_labels: bool = True
    router_loss: float | None = None
    has_router_loss: bool = False
    chunked_loss: bool = False
    packed_attention: tuple[str, ...] = ()
    failure: str | None = None


def probe_small_model(model_class: type, config: Any, parameters: int) -> ModelProbeResult:
    """Builds a small `model_class` from `config`, whose full size is `parameters`, and probes its logits."""
    import torch

    failure = "it is too large to run"
    for smaller in _attempts(parameters):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = _instance(model_class, smaller(config))
                found = _probe(model) if model is not None else None
        except Exception as error:  # The model's code can raise anything for such a config.
            failure = f"{type(error).__name__}: {first_line(error)}"
            continue
        if found is not None:
            return found
    return ModelProbeResult(failure=failure)


def _attempts(parameters: int) -> Iterator[Callable[[Any], Any]]:
    if parameters <= _SMALL:
        yield copy.deepcopy
    yield smallest_config
    yield small_config
    yield config_with_fewer_layers


def _instance(model_class: Any, config: Any) -> Any:
    """A float32 model on the CPU whose layers affect the logits; None if it needs too much memory."""
    import torch

    with torch.device("meta"):
        empty = model_class._from_config(copy.deepcopy(config), dtype=torch.float32)
    if sum(parameter.numel() for parameter in empty.parameters()) > _AFFORDABLE:
        return None
    model = model_class._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # With the default initialisation attention hardly affects the logits; zero-initialised gates hide it.
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.0 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _probe(model: Any) -> ModelProbeResult | None:
    """The result; None if the logits are NaN or Inf, or do not depend on the input."""
    import torch

    from launcher.prepare.packing_probe import packed_attention

    with torch.no_grad():
        ids = _tokens(model.config)
        output = _labelled(model, ids)
        logits = output.logits[0].float()
        if logits.shape[0] != ids.shape[1] or not bool(torch.isfinite(logits).all()):
            return None
        causal = _causal(model, ids, logits)
        if causal is None:
            return None
        packed = packed_attention(model, ids)
        return ModelProbeResult(causal=causal, packed_attention=packed, **_losses(model, ids, output))


def _causal(model: Any, ids: Any, logits: Any) -> bool | None:
    """Whether changing the second or the last token leaves earlier logits unchanged; None if no logits change."""
    threshold = _TOLERANCE * float(logits.std())
    causal = True
    for position in (1, ids.shape[1] - 1):
        changed = ids.clone()
        changed[0, position] = ids[0, position - 1]
        difference = (_forward(model, changed).logits[0].float() - logits).abs().amax(dim=-1)
        if not float(difference[position]) > threshold:
            return None
        causal &= float(difference[:position].max()) <= threshold
    return causal


def _losses(model: Any, ids: Any, output: Any) -> dict[str, Any]:
    from torch.nn import functional

    logits = output.logits[0].float()
    router, own = _number(output, "aux_loss"), _number(output, "loss")
    unshifted = float(functional.cross_entropy(logits, ids[0]))
    plain = float(functional.cross_entropy(logits[:-1], ids[0, 1:]))
    return {
        "own_loss": own,
        "plain_loss": plain,
        "chunked_loss": _chunked_loss_equals(model, ids, plain),
        "shifts_labels": own is None or abs(own - unshifted) > _TOLERANCE,
        "router_loss": router,
        "has_router_loss": router is not None or _has_router_loss(model, ids),
    }


def _tokens(config: Any) -> Any:
    """[1, length] distinct tokens that are not special tokens."""
    import torch

    text = config.get_text_config()
    special = set()
    for part in (config, text):
        for key, value in part.to_dict().items():
            if "token" in key:
                special |= {value} if isinstance(value, int) else set(value) if _are_ids(value) else set()
    normal = [token for token in range(int(text.vocab_size)) if token not in special]
    return torch.tensor([normal[len(normal) // 3 :][:_LENGTH]])


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int) for each in value)


def _labelled(model: Any, ids: Any) -> Any:
    try:
        return _forward(model, ids, labels=ids)
    except (ValueError, RuntimeError, IndexError):
        # Some classes cannot compute a loss without images or audio.
        return _forward(model, ids)


def _forward(model: Any, ids: Any, **options: Any) -> Any:
    import torch

    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)


def _has_router_loss(model: Any, ids: Any) -> bool:
    if not hasattr(model.config.get_text_config(), "output_router_logits"):
        return False
    try:
        return _number(_forward(model, ids, output_router_logits=True), "aux_loss") is not None
    except (TypeError, ValueError, AttributeError):
        return False


def _chunked_loss_equals(model: Any, ids: Any, plain: float) -> bool:
    from torch.nn import functional

    from launcher.chunked_loss import LossLayer

    if not LossLayer.fits(model):
        return False
    targets = functional.pad(ids[:, 1:], (0, 1))
    learned = functional.pad(ids[:, 1:] >= 0, (0, 1))
    try:
        with LossLayer(model).computing_loss(targets, learned):
            summed = _forward(model, ids).logits
    except (ValueError, RuntimeError, IndexError, TypeError):
        # The class does more with the logits than to return them.
        return False
    return summed.numel() == 1 and abs(float(summed) / int(learned.sum()) - plain) <= _TOLERANCE * (1 + plain)


def _number(output: Any, name: str) -> float | None:
    """A loss of the output; None if it is missing or a constant."""
    import torch

    value = getattr(output, name, None)
    return float(value) if isinstance(value, torch.Tensor) else None
