"""Tokenising a data set once, into token stores that every rank maps."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RequestError, first_line
from launcher.plan.facts import DataFacts, SplitFacts
from launcher.prepare.formats import BadRow, Example, detect_format, to_example
from launcher.prepare.sources import DataSource, hub_hint
from launcher.token_store import TokenWriter, publish_folder

Progress = Callable[..., None]
_BATCH = 512


@dataclass(frozen=True)
class TextRequest:
    """What is tokenised, and how."""

    train: DataSource
    eval: DataSource | float | None
    format: str
    max_length: int
    split: str
    seed: int


def tokenise(
    request: TextRequest, model_folder: Path, target: Path, trust_remote_code: bool, progress: Progress
) -> DataFacts:
    """Tokenises train and eval into `target`, which appears whole. Raises RequestError."""
    tokenizer = _tokenizer(model_folder, trust_remote_code)
    train, held_out = _load(request)
    kind = _format_of(request, train)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        work = _Work(tokenizer, kind, request.max_length, progress)
        found = work.write(train, temporary / "train", "data.train")
        evaluated = work.write(held_out, temporary / "eval", "data.eval") if held_out is not None else None
        facts = DataFacts(fingerprint=target.name, format=kind, train=found, eval=evaluated)
        facts = _moved(facts, target)
        (temporary / "facts.json").write_text(facts.model_dump_json(indent=2))
        publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return facts


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # what is missing or broken decides the kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"the tokenizer of {folder} cannot be loaded: {reason}"
        hint = "the folder needs the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights"
        raise RequestError(Problem(message, key="model.name_or_path", hint=hint)) from None
    if not tokenizer.is_fast:
        message = f"the tokenizer of {folder} has no fast version (tokenizer.json)"
        raise RequestError(Problem(message, key="model.name_or_path"))
    return tokenizer


def read_data_facts(target: Path) -> DataFacts | None:
    """The facts of data tokenised before, None where there are none."""
    try:
        return _moved(DataFacts.model_validate_json((target / "facts.json").read_text()), target)
    except FileNotFoundError:
        return None


def _moved(facts: DataFacts, target: Path) -> DataFacts:
    """`facts` with the folders where they lie now."""
    train = facts.train.model_copy(update={"folder": str(target / "train")})
    held_out = facts.eval.model_copy(update={"folder": str(target / "eval")}) if facts.eval else None
    return facts.model_copy(update={"train": train, "eval": held_out})


def _load(request: TextRequest) -> tuple[Any, Any]:
    """(train rows, eval rows or None)."""
    train = _open(request.train, request.split, "data.train")
    if request.eval is None:
        return train, None
    if isinstance(request.eval, DataSource):
        return train, _open(request.eval, request.split, "data.eval")
    held_out = max(1, round(len(train) * request.eval))
    if held_out >= len(train):
        raise RequestError(Problem(f"{request.eval} of {len(train)} rows leaves none to train on", key="data.eval"))
    parts = train.train_test_split(test_size=held_out, seed=request.seed)
    return parts["train"], parts["test"]


def _open(source: DataSource, split: str, key: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        if source.hub_name:
            return datasets.load_dataset(source.hub_name, split=split)
        options = {"sample_by": "document"} if source.builder == "text" else {}
        files = [str(path) for path in source.files]
        return datasets.load_dataset(source.builder, data_files=files, split="train", **options)
    except Exception as error:  # each builder raises its own kinds for a broken file
        cause = error.__cause__ or error
        reason = first_line(cause)
        what = source.hub_name or ", ".join(str(path) for path in source.files[:3])
        hint = hub_hint(source.hub_name) if source.hub_name else None
        raise RequestError(Problem(f"{what} cannot be read: {reason}", key=key, hint=hint)) from None


def _format_of(request: TextRequest, rows: Any) -> str:
    if len(rows) == 0:
        raise RequestError(Problem("there are no rows", key="data.train"))
    try:
        found = detect_format(rows.column_names) if request.format == "auto" else request.format
        if request.format != "auto":
            to_example(rows[0], found, lambda *_, **__: "")
    except BadRow as error:
        raise RequestError(
            Problem(str(error), key="data.format", hint="rename the columns, or set data.format")
        ) from None
    return found


class _Work:
    def __init__(self, tokenizer: Any, kind: str, max_length: int, progress: Progress) -> None:
        self.tokenizer, self.kind, self.max_length, self.progress = tokenizer, kind, max_length, progress
        self.render = self._render if tokenizer.chat_template else None

    def write(self, rows: Any, folder: Path, key: str) -> SplitFacts:
        """Tokenises `rows` into a token store. Raises RequestError where nothing is left to learn."""
        cut = dropped = partly = done = 0
        with TokenWriter(folder) as writer:
            for batch in _batches(rows):
                examples = [self._example(row, done + i, key) for i, row in enumerate(batch)]
                partly += sum(example.partly for example in examples if example)
                for pieces, was_cut in self._encode(examples):
                    kept = [(tokens, learned) for tokens, learned in pieces if sum(learned[1:])]
                    for tokens, learned in kept:
                        writer.add(tokens, learned)
                    cut += was_cut
                    dropped += not kept
                done += len(batch)
                self.progress(done=done, total=len(rows), message=f"tokenising {key}")
            facts = writer.facts()
        if not facts["sequences"]:
            raise RequestError(
                Problem(
                    f"none of {done} rows, read as {self.kind}, leaves anything to learn in {self.max_length} tokens",
                    key=key,
                    hint="raise data.max_length, or check data.format",
                )
            )
        return SplitFacts(folder=str(folder), rows=done, cut=cut, dropped=dropped, partly_learned=partly, **facts)

    def _example(self, row: dict[str, Any], index: int, key: str) -> Example | None:
        try:
            return to_example(row, self.kind, self.render)
        except BadRow as error:
            raise RequestError(Problem(f"row {index + 1}: {error}", key=key)) from None

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False, tools: Any = None) -> str:
        import jinja2

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, tools=tools
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise BadRow(f"the chat template refuses these messages: {error}") from None
        return text

    def _encode(self, examples: Sequence[Example | None]) -> Iterator[tuple[list[tuple[list[int], list[int]]], bool]]:
        """For each example its (tokens, learned) sequences of at most max_length, and whether something was cut off."""
        for complete in (True, False):
            chosen = [e for e in examples if e is not None and e.complete is complete]
            if chosen:
                encoded = self.tokenizer(
                    [e.text for e in chosen], add_special_tokens=not complete, return_offsets_mapping=True
                )
                for example, tokens, offsets in zip(
                    chosen, encoded["input_ids"], encoded["offset_mapping"], strict=True
                ):
                    yield self._sequences(example, tokens, offsets)
        for _ in range(examples.count(None)):
            yield [], False

    def _sequences(
        self, example: Example, tokens: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[list[tuple[list[int], list[int]]], bool]:
        learned = _learned(example, offsets)
        end = self.tokenizer.eos_token_id
        if not example.complete and end is not None and (not tokens or tokens[-1] != end):
            tokens, learned = [*tokens, end], [*learned, 1]
        if self.kind != "text":
            return [(tokens[: self.max_length], learned[: self.max_length])], len(tokens) > self.max_length
        starts = range(0, len(tokens), self.max_length)
        return [(tokens[s : s + self.max_length], learned[s : s + self.max_length]) for s in starts], False


def _learned(example: Example, offsets: list[tuple[int, int]]) -> list[int]:
    """1 for each token that begins inside a learned span; special tokens added by the tokenizer are (0, 0)."""
    learned = [0] * len(offsets)
    spans = iter(sorted(example.spans))
    span = next(spans, None)
    for i, (start, stop) in enumerate(offsets):
        while span is not None and start >= span[1]:
            span = next(spans, None)
        if span is None:
            break
        learned[i] = int(stop > start and start >= span[0])
    return learned


def _batches(rows: Any) -> Iterator[list[dict[str, Any]]]:
    for columns in rows.iter(batch_size=_BATCH):
        names = list(columns)
        yield [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
