"""Tokenises a data set once, into token stores that every rank memory-maps."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from launcher.bins import Bins
from launcher.errors import Problem, RequestError
from launcher.plan.facts import DataFacts, SplitFacts
from launcher.prepare.chat_template import ChatTemplate, read_template
from launcher.prepare.encode import Encoder
from launcher.prepare.read_rows import Rows, load_rows
from launcher.prepare.row_formats import Reader
from launcher.prepare.sources import DataSource
from launcher.prepare.write_split import SplitWriter
from launcher.token_store import TokenStore, publish_folder

Progress = Callable[..., None]


@dataclass(frozen=True)
class TextRequest:
    """The data to tokenise, and the settings."""

    train: DataSource
    eval: DataSource | float | None
    format: str
    max_length: int
    split: str
    seed: int
    eval_split: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    learn: Literal["all", "last"] = "all"


def tokenise(
    request: TextRequest, model_folder: Path, target: Path, trust_remote_code: bool, progress: Progress
) -> DataFacts:
    """Tokenises train and eval into `target`, which is created atomically. Raises RequestError."""
    tokenizer = _tokenizer(model_folder, trust_remote_code)
    loaded = load_rows(
        request.train,
        request.eval,
        data_format=request.format,
        split=request.split,
        eval_split=request.eval_split or request.split,
        seed=request.seed,
    )
    kind = loaded.kind
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    template = chat_template_of(tokenizer, model_folder, request)
    encoder = Encoder(tokenizer, request.max_length, kind == "text")

    def write(rows: Rows, source: DataSource, name: str) -> SplitFacts:
        reader = Reader(kind, template, request.learn, pads_nulls(source))
        writer = SplitWriter(reader, encoder, progress)
        return writer.write(rows.batches(), len(rows), temporary / name, f"data.{name}", rows.column_names)

    try:
        found = write(loaded.train, request.train, "train")
        bins = Bins(np.diff(TokenStore(temporary / "train").offsets), request.max_length)
        found = found.model_copy(update={"bins": len(bins)})
        source = request.eval if isinstance(request.eval, DataSource) else request.train
        evaluated = write(loaded.eval, source, "eval") if loaded.eval is not None else None
        supplied = template.sources["default"] if template is not None and request.chat_template else None
        facts = DataFacts(
            fingerprint=target.name,
            format=kind,
            train=found,
            eval=evaluated,
            shared_rows=loaded.shared_rows(),
            notes=loaded.notes(),
            chat_template=supplied,
        )
        facts = _with_folders(facts, target)
        (temporary / "facts.json").write_text(facts.model_dump_json(indent=2))
        publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return facts


def pads_nulls(source: DataSource) -> bool:
    """Whether objects of this source are padded with null for the keys of other rows: all but JSON."""
    return source.builder != "json"


def chat_template_of(tokenizer: Any, folder: Path, request: TextRequest) -> ChatTemplate | None:
    """The job's chat template, else the tokenizer's; None if both are missing. Raises RequestError."""
    source, name = tokenizer.chat_template, f"the chat template of {_model_name(folder)}"
    if request.chat_template is not None:
        source, name = read_template(request.chat_template)
    if not source:
        return None
    tokens = list(tokenizer.get_added_vocab())
    return ChatTemplate(source, name, tokenizer.special_tokens_map, tokens, request.chat_template_kwargs)


def _model_name(folder: Path) -> str:
    """The model's hub name if the folder is in the hub's cache, else the folder's name."""
    cached = next((part for part in folder.parts if part.startswith("models--")), None)
    return cached.removeprefix("models--").replace("--", "/") if cached else folder.name


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the type depends on what is missing or broken
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"the tokenizer of {folder} cannot be loaded: {reason}"
        hint = "the folder needs the tokenizer's files (tokenizer.json, tokenizer_config.json) and the weights"
        raise RequestError(Problem(message, key="model.name_or_path", hint=hint)) from None
    if not tokenizer.is_fast:
        message = f"the tokenizer of {folder} has no fast version (tokenizer.json)"
        raise RequestError(Problem(message, key="model.name_or_path"))
    return tokenizer


def read_data_facts(target: Path) -> DataFacts | None:
    """The facts of data that is already tokenised, or None."""
    try:
        return _with_folders(DataFacts.model_validate_json((target / "facts.json").read_text()), target)
    except FileNotFoundError:
        return None


def _with_folders(facts: DataFacts, target: Path) -> DataFacts:
    """`facts` with the current folders of the splits."""
    train = facts.train.model_copy(update={"folder": str(target / "train")})
    held_out = facts.eval.model_copy(update={"folder": str(target / "eval")}) if facts.eval else None
    return facts.model_copy(update={"train": train, "eval": held_out})
