"""What the encoder needs of a tokenizer, without transformers: it can be sent to other processes."""

from __future__ import annotations

from typing import Any, Protocol

Ids = list[int]
_REMEMBERED_WORDS = 1 << 17
_CALLS = ("__call__", "_encode_plus", "_batch_encode_plus")


class TextTokenizer(Protocol):
    """A tokenizer of texts, and its end-of-text token."""

    eos_token: str | None
    eos_token_id: int | None

    def ids(self, texts: list[str]) -> list[Ids]:
        """The token ids of each text, without the tokens that the tokenizer adds at both ends."""

    def ids_and_offsets(self, text: str) -> tuple[Ids, list[tuple[int, int]]]:
        """As `ids`, with the characters (start, stop) of each token."""

    def ids_with_ends(self, text: str) -> Ids:
        """The token ids of a text, with the tokens that the tokenizer adds at both ends."""


class LibraryTokenizer:
    """A tokenizer of the tokenizers library, called directly: transformers' wrapper costs as much as the tokenising."""

    def __init__(self, backend: Any, eos_token: str | None, eos_token_id: int | None, split_special: bool) -> None:
        self.eos_token, self.eos_token_id, self._split_special = eos_token, eos_token_id, split_special
        self._prepare(backend)

    def ids(self, texts: list[str]) -> list[Ids]:
        return [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def ids_and_offsets(self, text: str) -> tuple[Ids, list[tuple[int, int]]]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def ids_with_ends(self, text: str) -> Ids:
        ids: Ids = self._backend.encode(text).ids
        return ids

    def _prepare(self, backend: Any) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self._split_special  # not part of the JSON text
        # The library remembers the tokens of the first 10,000 different words, and of no later ones.
        if hasattr(backend.model, "_resize_cache"):
            backend.model._resize_cache(_REMEMBERED_WORDS)
        self._backend = backend

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_backend": self._backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        vars(self).update(state)
        self._prepare(Tokenizer.from_str(state["_backend"]))


class CalledTokenizer:
    """A transformers tokenizer with Python code of its own for tokenising: it is called, and stays in its process."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_token: str | None = tokenizer.eos_token
        self.eos_token_id: int | None = tokenizer.eos_token_id

    def ids(self, texts: list[str]) -> list[Ids]:
        return list(self._tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []

    def ids_and_offsets(self, text: str) -> tuple[Ids, list[tuple[int, int]]]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def ids_with_ends(self, text: str) -> Ids:
        return list(self._tokenizer(text)["input_ids"])


def text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """A transformers tokenizer for the encoder: without transformers' wrapper, unless its class has its own one."""
    if isinstance(tokenizer, LibraryTokenizer | CalledTokenizer):
        return tokenizer
    calls = [getattr(type(tokenizer), name) for name in _CALLS if hasattr(type(tokenizer), name)]
    if not all(call.__module__.startswith("transformers.tokenization_utils") for call in calls):
        return CalledTokenizer(tokenizer)
    end, end_id = tokenizer.eos_token, tokenizer.eos_token_id
    return LibraryTokenizer(tokenizer.backend_tokenizer, end, end_id, tokenizer.split_special_tokens)


def is_sendable(tokenizer: TextTokenizer) -> bool:
    """Whether the tokenizer can be sent to other processes."""
    if not isinstance(tokenizer, LibraryTokenizer):
        return False
    try:
        tokenizer.__getstate__()
    except Exception:  # a backend with Python code has no JSON text; the library raises a plain Exception
        return False
    return True
