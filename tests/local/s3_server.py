"""An S3 server on this machine (moto) as a process that can be killed, and a proxy that cuts or holds connections."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import boto3

from tests.time_limit import TIME_LIMIT_SECONDS

BUCKET = "bucket"
_HOST = "127.0.0.1"


def variables(port: int) -> dict[str, str]:
    """The environment with which S3 is asked at a port of this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://{_HOST}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class Server:
    """A server with an empty bucket. It keeps its objects in memory."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind((_HOST, 0))
            self.port: int = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", _HOST, "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + TIME_LIMIT_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection((_HOST, self.port)):
                break
            assert time.monotonic() < deadline, "moto does not start"
            time.sleep(0.05)
        self.client().create_bucket(Bucket=BUCKET)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def client(self):
        given = variables(self.port)
        return boto3.client(
            "s3",
            endpoint_url=given["AWS_ENDPOINT_URL"],
            aws_access_key_id=given["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=given["AWS_SECRET_ACCESS_KEY"],
            region_name=given["AWS_DEFAULT_REGION"],
        )

    def names(self) -> list[str]:
        listed = self.client().list_objects_v2(Bucket=BUCKET)
        return [each["Key"] for each in listed.get("Contents", [])]


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.kill()


class Proxy:
    """Forwards connections to a port. After `limit` bytes to that port it cuts, or holds, every connection.

    `reached` is set then; `limit` None forwards everything.
    """

    def __init__(self, port: int, limit: int | None, *, hold: bool = False) -> None:
        self._to, self.limit, self._hold = port, limit, hold
        self._passed, self._lock = 0, threading.Lock()
        self.reached = threading.Event()
        self._listener = socket.create_server((_HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((_HOST, self._to))
                for source, target, counted in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._forward, args=(source, target, counted), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if counted and self._over(len(data)):
                    if self._hold:
                        continue
                    break
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _over(self, count: int) -> bool:
        with self._lock:
            self._passed += count
            if self.limit is None or self._passed <= self.limit:
                return False
        self.reached.set()
        return True


def use(monkeypatch, port: int) -> None:
    """S3 is at this port from now on, in this process."""
    for name, value in variables(port).items():
        monkeypatch.setenv(name, value)
    assert "AWS_PROFILE" not in os.environ
