"""What a small model of the same architecture shows: whether it is causal, and which loss it has by itself.

Configs do not say whether a later token changes an earlier logit (`is_decoder`, masks built in the code, models that
bring code of their own). A small instance with random weights does, in about a second.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from launcher.errors import first_line
from launcher.prepare.shrink import shrunk, shrunk_most, with_fewer_layers

_SMALL = 20_000_000
"""Parameters up to which a model is tried as it is."""
_AFFORDABLE = 300_000_000
_LENGTH = 12
_TOLERANCE = 1e-3
"""Of the logits' spread. Experts that get other rows round otherwise; a token that is seen changes far more."""


@dataclass(frozen=True)
class Probe:
    """What was seen of a small instance. `failure` says why nothing was, and the rest is None then.

    `causal`: no later token changes an earlier logit. `own_loss` is the loss that the model computes from labels and
    `plain_loss` the mean next-token cross entropy of its logits, both in nats; `shifts_labels`: `own_loss` is for the
    next token (a few old classes leave shifting the labels to the caller). `router_loss` is the balance loss of its
    routers before its coefficient; None where the config does not ask for one, or the class has none.
    `has_router_loss`: it has one when it is asked.
    """

    causal: bool | None = None
    own_loss: float | None = None
    plain_loss: float | None = None
    shifts_labels: bool = True
    router_loss: float | None = None
    has_router_loss: bool = False
    failure: str | None = None


def probe(model_class: type, config: Any, parameters: int) -> Probe:
    """Builds a small `model_class` after `config`, whose full size is `parameters`, and looks at its logits."""
    import torch

    failure = "it is too large to be tried"
    for smaller in _attempts(parameters):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = _instance(model_class, smaller(config))
                found = _look(model) if model is not None else None
        except Exception as error:  # Code of any model, with a config that may not suit it.
            failure = f"{type(error).__name__}: {first_line(error)}"
            continue
        if found is not None:
            return found
    return Probe(failure=failure)


def _attempts(parameters: int) -> Iterator[Callable[[Any], Any]]:
    if parameters <= _SMALL:
        yield copy.deepcopy
    yield shrunk_most
    yield shrunk
    yield with_fewer_layers


def _instance(model_class: Any, config: Any) -> Any:
    """A model on the CPU in float32 whose layers matter to the logits; None where it would take too much memory."""
    import torch

    with torch.device("meta"):
        empty = model_class._from_config(copy.deepcopy(config), dtype=torch.float32)
    if sum(parameter.numel() for parameter in empty.parameters()) > _AFFORDABLE:
        return None
    model = model_class._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # As initialised, attention hardly shows in the logits; gates that begin at zero hide it altogether.
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.0 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _look(model: Any) -> Probe | None:
    """None where the logits show nothing: NaN, or the same whatever the input."""
    import torch

    with torch.no_grad():
        ids = _tokens(model.config)
        output = _labelled(model, ids)
        logits = output.logits[0].float()
        if logits.shape[0] != ids.shape[1] or not bool(torch.isfinite(logits).all()):
            return None
        causal = _causal(model, ids, logits)
        return None if causal is None else Probe(causal=causal, **_losses(model, ids, output))


def _causal(model: Any, ids: Any, logits: Any) -> bool | None:
    """Whether earlier logits stay as they are if the second or the last token changes; None if none change."""
    least = _TOLERANCE * float(logits.std())
    causal = True
    for position in (1, ids.shape[1] - 1):
        changed = ids.clone()
        changed[0, position] = ids[0, position - 1]
        difference = (_forward(model, changed).logits[0].float() - logits).abs().amax(dim=-1)
        if not float(difference[position]) > least:
            return None
        causal &= float(difference[:position].max()) <= least
    return causal


def _losses(model: Any, ids: Any, output: Any) -> dict[str, Any]:
    from torch.nn import functional

    logits = output.logits[0].float()
    router, own = _number(output, "aux_loss"), _number(output, "loss")
    unshifted = float(functional.cross_entropy(logits, ids[0]))
    return {
        "own_loss": own,
        "plain_loss": float(functional.cross_entropy(logits[:-1], ids[0, 1:])),
        "shifts_labels": own is None or abs(own - unshifted) > _TOLERANCE,
        "router_loss": router,
        "has_router_loss": router is not None or _has_router_loss(model, ids),
    }


def _tokens(config: Any) -> Any:
    """[1, length] of distinct tokens that are nothing special to the model."""
    import torch

    text = config.get_text_config()
    special = set()
    for part in (config, text):
        for key, value in part.to_dict().items():
            if "token" in key:
                special |= {value} if isinstance(value, int) else set(value) if _are_ids(value) else set()
    usual = [token for token in range(int(text.vocab_size)) if token not in special]
    return torch.tensor([usual[len(usual) // 3 :][:_LENGTH]])


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


def _number(output: Any, name: str) -> float | None:
    """A loss of the output; None where there is none, or a constant stands in for it."""
    import torch

    value = getattr(output, name, None)
    return float(value) if isinstance(value, torch.Tensor) else None
