"""Tokenises a data set once, into token stores that every rank memory-maps."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from launcher.bins import Bins
from launcher.errors import Problem, RequestError
from launcher.lock import hold, read_holder
from launcher.plan.facts import DataFacts, SplitFacts
from launcher.prepare.cache import UNFINISHED_LOCK, describe
from launcher.prepare.chat_template import read_template
from launcher.prepare.part_processes import PartProcesses
from launcher.prepare.part_tokeniser import SplitSettings, TemplateSettings
from launcher.prepare.read_rows import Loaded, Rows, load_rows
from launcher.prepare.row_formats import detect_format
from launcher.prepare.row_parts import NotLines
from launcher.prepare.row_values import BadRow
from launcher.prepare.sources import DataSource
from launcher.prepare.split_store import remove_journal
from launcher.prepare.text_tokenizer import TextTokenizer, text_tokenizer
from launcher.prepare.write_split import SplitWriter
from launcher.token_store import TokenStore, publish_folder

Progress = Callable[..., None]
_RETRY_SECONDS = 0.5


@dataclass(frozen=True)
class TextRequest:
    """The data to tokenise, and the settings. `processes` as in `PartProcesses`; it does not change the result."""

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
    processes: int | None = None


def tokenise(
    request: TextRequest, model_folder: Path, target: Path, trust_remote_code: bool, progress: Progress
) -> DataFacts:
    """Tokenises train and eval into `target`, which is created atomically. Raises RequestError.

    What a killed process has finished is not tokenised again. Waits if another process tokenises into `target`.
    """
    tokenizer = _tokenizer(model_folder, trust_remote_code)
    template = template_settings(tokenizer, model_folder, request)
    if template is not None:
        template.template()  # raises for a template that is not valid
    with _unfinished(target, progress) as folder:
        if folder is None:
            return read_data_facts(target) or tokenise(request, model_folder, target, trust_remote_code, progress)
        try:
            facts = _Tokenising(request, text_tokenizer(tokenizer), template, folder, progress).facts(target)
        except RequestError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        (folder / "facts.json").write_text(facts.model_dump_json(indent=2))
        describe(folder, _about(request, facts))
        for name in ("train", "eval"):
            remove_journal(folder / name)
        (folder / UNFINISHED_LOCK).unlink()
        publish_folder(folder, target)
    return facts


@contextlib.contextmanager
def _unfinished(target: Path, progress: Progress) -> Iterator[Path | None]:
    """The folder in which this process alone may tokenise for `target`; None if `target` has been finished."""
    folder = target.with_name(f".{target.name}.partial")
    waits = False
    while not (target / "facts.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if _take(folder / UNFINISHED_LOCK, stack):
                yield folder
                return
        if not waits and (holder := read_holder(folder / UNFINISHED_LOCK)) is not None:
            progress(message=f"waiting for {holder}, which tokenises the same data")
            waits = True
        time.sleep(_RETRY_SECONDS)
    yield None


def _take(lock: Path, stack: contextlib.ExitStack) -> bool:
    """Whether this process now holds the lock, until `stack` is closed."""
    try:
        held = stack.enter_context(hold(lock))
    except FileNotFoundError:  # the process that held it has just renamed or removed the folder
        return False
    holder = read_holder(lock)  # None if that happened after the file was opened
    return held and holder is not None and (holder.host, holder.pid) == (socket.gethostname(), os.getpid())


@dataclass
class _Tokenising:
    """One tokenising of a job's data into `folder`."""

    request: TextRequest
    tokenizer: TextTokenizer
    template: TemplateSettings | None
    folder: Path
    progress: Progress

    def facts(self, target: Path) -> DataFacts:
        """Writes the splits. Returns their facts, with the folders that they will have. Raises RequestError."""
        try:
            loaded = self._load(by_lines=True)
        except RequestError:  # the first rows may not be as the others
            loaded = self._load(by_lines=False)
        if all(rows.lines is None for rows in loaded.splits()):
            return self._write(loaded, target)
        try:
            facts = self._write(loaded, target)
            if self.request.format != "auto" or _format_of(loaded) == loaded.kind:
                return facts
        except NotLines:
            pass
        except RequestError:
            # As for other files: an unreadable row is reported before one that does not match the format.
            if self._load(by_lines=False).kind == loaded.kind:
                raise
        return self._write(self._load(by_lines=False), target)

    def _load(self, by_lines: bool) -> Loaded:
        request = self.request
        return load_rows(
            request.train,
            request.eval,
            data_format=request.format,
            split=request.split,
            eval_split=request.eval_split or request.split,
            seed=request.seed,
            by_lines=by_lines,
        )

    def _write(self, loaded: Loaded, target: Path) -> DataFacts:
        request = self.request
        with PartProcesses(self.tokenizer, request.max_length, request.processes) as processes:

            def write(rows: Rows, source: DataSource) -> SplitFacts:
                key = rows.key
                padded, compared = pads_nulls(source), rows.compared
                settings = SplitSettings(key, loaded.kind, self.template, request.learn, padded, compared)
                writer = SplitWriter(settings, processes, self.progress)
                return writer.write(rows, self.folder / key.rpartition(".")[2], self.tokenizer.eos_token_id is not None)

            found = write(loaded.train, request.train)
            found = found.model_copy(update={"bins": self._bins()})
            source = request.eval if isinstance(request.eval, DataSource) else request.train
            evaluated = write(loaded.eval, source) if loaded.eval is not None else None
        sources = self.template.template().sources if self.template is not None and request.chat_template else None
        facts = DataFacts(
            fingerprint=target.name,
            format=loaded.kind,
            train=found,
            eval=evaluated,
            shared_rows=loaded.shared_rows(),
            notes=loaded.notes(),
            chat_template=sources["default"] if sources else None,
        )
        return _with_folders(facts, target)

    def _bins(self) -> int:
        """The number of bins that the training sequences fill if they are packed."""
        return len(Bins(np.diff(TokenStore(self.folder / "train").offsets), self.request.max_length))


def _about(request: TextRequest, facts: DataFacts) -> str:
    """What the data was made of, in a few words."""
    source = request.train
    named = source.hub_name or str(source.saved or source.files[0])
    more = f" and {len(source.files) - 1} more" if len(source.files) > 1 else ""
    return f"{named}{more}, {facts.train.rows} rows, max_length {request.max_length}"


def _format_of(loaded: Loaded) -> str:
    """The format of rows by the columns of all of them; "" if they match no format. They have been read."""
    held_out = (
        loaded.eval.column_names if loaded.eval is not None and loaded.eval.readers == loaded.train.readers else ()
    )
    try:
        return detect_format((*loaded.train.column_names, *held_out))
    except BadRow:
        return ""


def pads_nulls(source: DataSource) -> bool:
    """Whether objects of this source are padded with null for the keys of other rows: all but JSON."""
    return source.builder != "json"


def template_settings(tokenizer: Any, folder: Path, request: TextRequest) -> TemplateSettings | None:
    """The job's chat template, else the tokenizer's; None if both are missing. Raises RequestError."""
    source, name = tokenizer.chat_template, f"the chat template of {_model_name(folder)}"
    if request.chat_template is not None:
        source, name = read_template(request.chat_template)
    if not source:
        return None
    tokens = tuple(tokenizer.get_added_vocab())
    return TemplateSettings(source, name, tokenizer.special_tokens_map, tokens, request.chat_template_kwargs)


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
