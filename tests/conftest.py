"""What all tests share: no hub, no GPU, one thread per rank, tiny models, and the time budget at the end."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")
os.environ.pop("RAY_ADDRESS", None)

import json
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.budget import Budget
from tests.tiny_models import make_tiny_model, write_chats

# In CI hypothesis draws the same examples each time, so that a commit always gives the same result.
settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a test that skips fails, with its reason: there everything that tests need is installed."""
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"no test may skip in CI: {item.nodeid}: {reason}"
    return report


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker of xdist, whose reports the controller gets
        config.pluginmanager.register(Budget())


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """Restores the umask, which commands in this process change to keep their files private."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture
def _east_of_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is nine hours ahead of UTC: on a machine in UTC they would be the same."""
    monkeypatch.setenv("TZ", "JST-9")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with tied embeddings, with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations, which a model can learn."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    write_chats(path, 40)
    return path


@pytest.fixture
def job_dict(tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A small job on two CPU ranks; the cache is shared by the session's tests."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    return json.loads(
        json.dumps(
            {
                "name": "tiny",
                "model": {"name_or_path": str(tiny_model)},
                "data": {"train": str(chats), "eval": 0.2, "max_length": 64, "cache_dir": str(cache)},
                "train": {"max_steps": 4, "restarts": 0, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4},
                "schedule": {"shape": "linear", "peak_lr": 1e-3, "warmup": 1},
                "cluster": {"processes_per_node": 2, "gpus_per_node": 0},
            }
        )
    )
