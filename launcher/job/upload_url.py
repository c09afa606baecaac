"""URLs of cloud storage: which are accepted, and what is wrong with the others. No message repeats a refused URL."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

PROTOCOLS = ("s3", "gs", "file")
_FORMS = "write s3://BUCKET/PATH, gs://BUCKET/PATH or file:///ABSOLUTE/PATH"
_OTHER_NAMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
_BUCKET = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://?")


class InvalidUrl(Exception):
    """A URL that is not accepted: the reason, and a hint. Neither contains the URL, which may contain a secret."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


def is_url(text: str) -> bool:
    """Whether a text names cloud storage rather than a path. `Path` turns the two slashes of a URL into one."""
    match = _SCHEME.match(text)
    return match is not None and match[1].lower() in (*PROTOCOLS, *_OTHER_NAMES)


def checked_url(text: str) -> str:
    """The URL without slashes at its end. Raises InvalidUrl."""
    match = _SCHEME.match(text)
    if not text.isprintable():
        raise InvalidUrl("must not contain control characters", _FORMS)
    if match is None or "://" not in text:
        raise InvalidUrl("must be a URL, not a path", _path_hint(text))
    try:
        parts = urlsplit(text)
    except ValueError:
        raise InvalidUrl("is not a valid URL", _FORMS) from None
    if "@" in unquote(parts.netloc) or "@" in text.partition("://")[2].partition("/")[0]:
        hint = "give credentials in the environment (AWS_ACCESS_KEY_ID, …) or in the cloud's own configuration"
        raise InvalidUrl("must not contain a user or a password", hint)
    if parts.scheme not in PROTOCOLS:
        other = _OTHER_NAMES.get(parts.scheme)
        raise InvalidUrl(f"the protocol {match[1]}:// is not supported", f"write {other}://…" if other else _FORMS)
    if "?" in text or "#" in text:
        raise InvalidUrl("must not contain ? or #", "leave out the query: credentials belong in the environment")
    if any(part in ("..", ".") for part in parts.path.split("/")):
        raise InvalidUrl("must not contain . or .. as a folder", _FORMS)
    if parts.scheme == "file":
        _check_file(parts.netloc, parts.path)
    elif not _BUCKET.match(parts.netloc):
        raise InvalidUrl(f"the name of the bucket is missing or not valid after {parts.scheme}://", _FORMS)
    return text.rstrip("/")


def _check_file(host: str, path: str) -> None:
    if host or not path.startswith("/") or not path.strip("/"):
        raise InvalidUrl("must contain an absolute path after file://", "write three slashes: file:///ABSOLUTE/PATH")


def _path_hint(text: str) -> str:
    path = text if text.startswith("/") and text.isprintable() and "@" not in text else "/ABSOLUTE/PATH"
    return f"for a folder on this machine write file://{path}; else s3://BUCKET/PATH or gs://BUCKET/PATH"
