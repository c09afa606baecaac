"""Tokenising a data set once, into token stores that every rank maps."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RequestError
from launcher.plan.facts import DataFacts, SplitFacts
from launcher.prepare.formats import BadRow, Example, to_example
from launcher.prepare.read_rows import Rows, load_rows
from launcher.prepare.rows import Row
from launcher.prepare.sources import DataSource
from launcher.token_store import TokenWriter, publish_folder

Progress = Callable[..., None]


@dataclass(frozen=True)
class TextRequest:
    """What is tokenised, and how."""

    train: DataSource
    eval: DataSource | float | None
    format: str
    max_length: int
    split: str
    seed: int
    eval_split: str | None = None


def tokenise(
    request: TextRequest, model_folder: Path, target: Path, trust_remote_code: bool, progress: Progress
) -> DataFacts:
    """Tokenises train and eval into `target`, which appears whole. Raises RequestError."""
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
    try:
        work = _Work(tokenizer, kind, request.max_length, progress)
        found = work.write(loaded.train, temporary / "train", "data.train")
        evaluated = work.write(loaded.eval, temporary / "eval", "data.eval") if loaded.eval is not None else None
        facts = DataFacts(
            fingerprint=target.name,
            format=kind,
            train=found,
            eval=evaluated,
            shared_rows=loaded.shared_rows(),
            notes=loaded.notes(),
        )
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


class _Work:
    def __init__(self, tokenizer: Any, kind: str, max_length: int, progress: Progress) -> None:
        self.tokenizer, self.kind, self.max_length, self.progress = tokenizer, kind, max_length, progress
        self.render = self._render if tokenizer.chat_template else None

    def write(self, rows: Rows, folder: Path, key: str) -> SplitFacts:
        """Tokenises `rows` into a token store. Raises RequestError where nothing is left to learn."""
        cut = dropped = partly = done = 0
        with TokenWriter(folder) as writer:
            for batch in rows.batches():
                examples = [self._example(row, key) for row in batch]
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

    def _example(self, row: Row, key: str) -> Example | None:
        try:
            return to_example(row, self.kind, self.render)
        except BadRow as error:
            raise RequestError(row.place.problem(str(error), key)) from None

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
