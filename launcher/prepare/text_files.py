"""Reads text files: decompressed, decoded as UTF-8, and without a byte-order mark."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from launcher.errors import first_line
from launcher.prepare.rows import BadFile

BOM = "\ufeff"
_CHUNK = 1 << 20
_SAVE_AS_UTF8 = "save it as UTF-8, for example: iconv -f {} -t UTF-8 OLD > NEW"
_OTHER_MARKS = {  # UTF-32's marks start with UTF-16's, so they come first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


_BINARY = {  # first bytes of compressed files
    b"\x1f\x8b": ("gzip", ".gz"),
    b"BZh91AY&SY": ("bzip2", ".bz2"),
    b"\xfd7zXZ": ("xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
}


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed by its suffix. Raises BadFile for errors while it is open."""
    try:
        with _open(path) as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise BadFile(str(path), f"cannot be read: {first_line(error)}") from None


def text_chunks(path: Path) -> Iterator[str]:
    """The text of a file in pieces of about 1 MiB, with unchanged line ends. Raises BadFile if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 0
    with opened(path) as file:
        piece = file.read(_CHUNK)
        _check_mark(path, piece)
        piece = piece.removeprefix(codecs.BOM_UTF8)
        while piece:
            try:
                text = decoder.decode(piece)
            except UnicodeDecodeError as error:
                raise not_utf8(path, lines + error.object[: error.start].count(b"\n") + 1, error) from None
            lines += piece.count(b"\n")
            yield text
            piece = file.read(_CHUNK)
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise not_utf8(path, lines + 1, error) from None


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends, split only at newlines. Raises BadFile if it is not UTF-8."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                _check_mark(path, line)
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise not_utf8(path, number, error) from None


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if suffix == ".bz2":
        return cast(IO[bytes], bz2.open(path, "rb"))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if suffix == ".zst":
        return _open_zstd(path)
    return path.open("rb")


def _open_zstd(path: Path) -> IO[bytes]:
    """Uses the zstd in pyarrow."""
    import io

    import pyarrow

    stream: Any = pyarrow.input_stream(str(path), compression="zstd")
    return io.BufferedReader(stream, _CHUNK)


def _check_mark(path: Path, start: bytes) -> None:
    """Raises BadFile for text in UTF-16 or UTF-32, with or without a mark, and for a compressed file."""
    for magic, (kind, suffix) in _BINARY.items():
        if start.startswith(magic):
            raise BadFile(str(path), f"cannot be read: it is compressed with {kind}", f"add {suffix} to its name")
    name = next((name for mark, name in _OTHER_MARKS.items() if start.startswith(mark)), None)
    if name is None and b"\0" in start[:4]:
        name = "UTF-16"
    if name is not None:
        raise BadFile(str(path), f"cannot be read: it is {name}, not UTF-8", _SAVE_AS_UTF8.format(name))


def not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> BadFile:
    """The error for text that is not UTF-8."""
    message = f"cannot be read: byte 0x{error.object[error.start]:02x} in this line is not UTF-8"
    return BadFile(str(path), message, _SAVE_AS_UTF8.format("WINDOWS-1252"), line)
