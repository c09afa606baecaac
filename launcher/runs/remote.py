"""Cloud storage through fsspec: objects under one URL, each of which appears only when it is complete."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError, Problem, RequestError, first_line
from launcher.files import sha256_of
from launcher.job import AnyJob, ScriptJob

KEY = "checkpoint.upload"
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_CHECKSUM = "sha256"
"""The name of the checksum in an object's metadata."""
_PART = ".part"
"""The ending of a file in a local folder that is being written."""
_LOGIN = re.compile(r"//[^/@\s]*@")
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        # Two parts of 50 MB at a time: an upload must not take the memory or the network of the run.
        "max_concurrency": 2,
        "config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}},
    },
}


class StoreError(LauncherError):
    """A request to cloud storage failed. The message contains no credentials."""


class Store:
    """Objects under a URL. Names are relative to it. Every method raises StoreError if its request fails."""

    def __init__(self, url: str) -> None:
        """Raises RequestError if the package for the URL's protocol is not installed."""
        self.url = url
        self._protocol, _, self._root = url.partition("://")
        package = _PACKAGES.get(self._protocol)
        if package is not None and find_spec(package) is None:
            hint = f"pip install 'ray-deepspeed-launcher[{self._protocol}]'"
            raise RequestError(Problem(f"{self._protocol}:// needs the package {package}", key=KEY, hint=hint))
        import fsspec

        # Without caches: other processes write here too.
        options = {"skip_instance_cache": True, "use_listings_cache": False, **_OPTIONS.get(self._protocol, {})}
        self._fs: Any = fsspec.filesystem(self._protocol, **options)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The size in bytes of every object in a folder, by its name relative to the folder."""
        path = self._path(folder)
        with _translated():
            try:
                found = self._fs.find(path, detail=True)
            except FileNotFoundError:
                return {}
        return {name[len(path) + 1 :]: each["size"] for name, each in sorted(found.items()) if each["type"] == "file"}

    def folders(self) -> list[str]:
        """The names of the folders directly under the URL."""
        with _translated():
            try:
                found = self._fs.ls(self._path(""), detail=True)
            except FileNotFoundError:
                return []
        return sorted(each["name"].rstrip("/").rpartition("/")[2] for each in found if each["type"] == "directory")

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if it does not exist."""
        with _translated():
            try:
                content: bytes = self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None
        return content

    def checksum(self, name: str) -> str | None:
        """The checksum that was stored with an object, of a local file that of its content; None if it has none."""
        path = self._path(name)
        with _translated():
            if self._protocol == "file":
                return sha256_of(Path(path))
            metadata = self._fs.metadata(path) if self._protocol == "s3" else self._fs.info(path).get("metadata")
        return (metadata or {}).get(_CHECKSUM)

    def put(self, file: Path, name: str, sha256: str, on_progress: Callable[[], None]) -> None:
        """Copies a local file, and stores its checksum. `on_progress` is called after each part; it may raise."""
        metadata = {_CHECKSUM: sha256}
        with self._new(name) as path:
            if self._protocol == "s3":
                self._fs.put_file(str(file), path, callback=_callback(on_progress), Metadata=metadata)
            elif self._protocol == "gs":
                self._fs.put_file(str(file), path, callback=_callback(on_progress), metadata=metadata)
            else:
                self._fs.put_file(str(file), path)

    def write(self, name: str, content: bytes) -> None:
        """Replaces an object."""
        with self._new(name) as path:
            self._fs.pipe_file(path, content)

    def get(self, name: str, file: Path) -> None:
        """Copies an object to a local file, whose folder is created."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with _translated():
            self._fs.get_file(self._path(name), str(file))

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects, in order; those that do not exist are ignored."""
        names = list(names)
        for name in names:
            with _translated():
                try:
                    self._fs.rm_file(self._path(name))
                except FileNotFoundError:
                    continue
        if self._protocol == "file":
            self._remove_empty_folders({str(Path(name).parent) for name in names})

    def discard_parts(self, folder: str) -> None:
        """Removes parts of uploads to a folder that were interrupted, which S3 keeps invisibly, and charges for.

        Not every server and not every permission allows it: then it does nothing.
        """
        if self._protocol != "s3":
            return
        bucket, key, _ = self._fs.split_path(self._path(folder))
        with suppress(StoreError), _translated():
            found = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
            for each in found.get("Uploads") or ():
                self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=each["Key"], UploadId=each["UploadId"])

    def check_writable(self) -> None:
        """Writes a small object and removes it. Raises RequestError if that fails."""
        name = f".launcher-check-{uuid.uuid4().hex[:8]}"
        try:
            self.write(name, b"written by launcher to check that it may write here\n")
            self.remove([name])
        except StoreError as error:
            raise RequestError(Problem(f"cannot write to {self.url}: {error}", key=KEY, hint=_hint(error))) from None

    @contextmanager
    def _new(self, name: str) -> Iterator[str]:
        """The path to write a new object to. Clouds show an object when it is complete, local folders do not."""
        path = self._path(name)
        with _translated():
            if self._protocol != "file":
                yield path
                return
            temporary = f"{path}.{uuid.uuid4().hex[:8]}{_PART}"
            self._fs.makedirs(str(Path(path).parent), exist_ok=True)
            try:
                yield temporary
                self._fs.mv(temporary, path)
            finally:
                if self._fs.exists(temporary):
                    self._fs.rm_file(temporary)
                self._remove_empty_folders({str(Path(name).parent)})

    def _remove_empty_folders(self, folders: set[str]) -> None:
        for folder in sorted(folders, key=len, reverse=True):
            path, root = Path(self._path(folder)), Path(self._root)
            while path != root and root in path.parents and path.is_dir() and not any(path.iterdir()):
                path.rmdir()
                path = path.parent

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")


def check_upload(job: AnyJob) -> None:
    """Checks that the launcher can write to the job's checkpoint.upload, if it is set. Raises RequestError.

    A script's run uploads nothing, and its plan warns of the key.
    """
    if job.checkpoint.upload is not None and not isinstance(job, ScriptJob):
        Store(job.checkpoint.upload).check_writable()


@contextmanager
def _translated() -> Iterator[None]:
    """Turns the errors of fsspec and of the cloud's library into StoreError."""
    try:
        yield
    except LauncherError:
        raise
    except Exception as error:
        raise StoreError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The first line of an error without the login of a URL."""
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return _LOGIN.sub("//", kind + first_line(error))


def _hint(error: StoreError) -> str:
    cause = error.__cause__
    if isinstance(cause, PermissionError):
        return "check the permissions of these credentials: list, read, write and delete"
    if isinstance(cause, FileNotFoundError):
        return "create the bucket, and check its name"
    return "check the address and the credentials, in the environment or in the cloud's own configuration"


def _callback(on_progress: Callable[[], None]) -> Any:
    from fsspec.callbacks import Callback

    class EachPart(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:  # noqa: ARG002
            on_progress()

    return EachPart()
