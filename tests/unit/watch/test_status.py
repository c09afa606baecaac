"""The status of one run with its nodes, and of all runs."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.cli import status as status_command
from launcher.runs.excluded_nodes import exclude_node
from launcher.watch.node_status import NodeStatus, mark_stragglers
from launcher.watch.number_format import duration
from launcher.watch.sample_metrics import sampled
from launcher.watch.screen import plots_of
from launcher.watch.status import RunStatus, read_status, read_status_without_nodes
from launcher.watch.status_report import rank_range, status_view
from tests.unit.inputs import as_nobody, command
from tests.unit.run_directories import GIB, START, Built, bytes_read, rank, stamp


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return Built(tmp_path / "runs")


def at(built: Built, seconds: float) -> RunStatus:
    return read_status(built.run, START + seconds)


def text_of(status: RunStatus, most_nodes: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(status_view(status, most_nodes))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def training(built: Built, own: tuple[float, ...] = (0.30, 0.31, 0.30)) -> None:
    """One node with two ranks per value of `own`, the seconds of the second rank's own work per update."""
    built.plan(400)
    built.nodes([f"h{node}" for node in range(len(own))])
    built.state("training", 5.0)
    for node, seconds in enumerate(own):
        ranks = [rank(2 * node, own_seconds=0.2), rank(2 * node + 1, own_seconds=seconds, updates=18)]
        built.node_json(node, f"h{node}", 58.0, ranks)
    built.metrics(range(20), at=20.0)


def test_the_status_of_a_run_in_training(built: Built) -> None:
    training(built)
    status = at(built, 60.0)
    assert (status.state, status.state_seconds, status.live) == ("training", 55.0, True)
    assert (status.updates, status.total_updates) == (20, 400)
    assert status.left_seconds == pytest.approx(380 * 2.0)
    assert (status.loss, status.lr) == (pytest.approx(2.81), pytest.approx(2e-4))
    assert (status.tokens_per_second, status.step_seconds) == (349.5, 1.5)
    assert [node.host for node in status.nodes] == ["h0", "h1", "h2"]
    node = status.nodes[1]
    assert (node.ranks, node.ranks_alive, node.updates, node.phase) == ((2, 3), 2, 17, "training")
    assert (node.step_seconds, node.own_seconds, node.heartbeat_seconds) == (0.8, 0.31, 2.0)
    assert (node.memory_used_bytes, node.memory_bytes, node.cpu_percent) == (10 * GIB, 64 * GIB, 50.0)
    assert not any(node.straggler or node.stale for node in status.nodes)
    text = text_of(status)
    for words in ("training for 55 s", "update 20 of 400 (5%), about 12 min 40 s left", "loss 2.8100", "350 tokens/s"):
        assert words in text
    assert "GPU" not in text


def test_spare_and_excluded_nodes_are_listed(built: Built) -> None:
    training(built)
    # Of the last placing only.
    built.event(1.5, "spare_node", host="h3", address="10.0.0.3")
    assert at(built, 60.0).spare_nodes == ("h3",)
    built.nodes(["h0", "h3"], at=10.0)
    built.event(10.5, "spare_node", host="h4", address="10.0.0.4")
    exclude_node(built.run, "h1", "failed 2 times, the last time with rank 2: signal SIGKILL")
    status = at(built, 60.0)
    assert status.spare_nodes == ("h4",)
    assert status.excluded_nodes == {"h1": "failed 2 times, the last time with rank 2: signal SIGKILL"}
    text = text_of(status)
    assert "spare nodes, without ranks: h4\n" in text
    assert "excluded: h1 failed 2 times, the last time with rank 2: signal SIGKILL\n" in text


def test_a_straggler_is_marked(built: Built) -> None:
    training(built, own=(0.30, 0.31, 0.62))
    status = at(built, 60.0)
    assert status.compared == "own_seconds"
    assert [node.straggler for node in status.nodes] == [False, False, True]
    assert status.nodes[2].ratio == pytest.approx(0.62 / 0.31)
    text = text_of(status)
    assert re.search(r"h2 .* 2\.00x .* slow: rank 5\n", text)
    assert [node.slow_ranks for node in status.nodes] == [(), (), (5,)]
    assert status.nodes[2].rank_own_seconds == (0.2, 0.62)
    assert "above 1.25x the median of the nodes" in text


@pytest.mark.parametrize(
    ("own", "step", "compared", "slow"),
    [
        ((0.3, 0.6), (1.0, 1.0), "own_seconds", [1]),
        ((0.3, 0.36), (1.0, 1.0), "own_seconds", []),
        ((0.001, 0.009), (1.0, 1.0), "own_seconds", []),
        ((None, None, None), (1.0, 1.1, 1.3), "step_seconds", []),
        ((None, None, None), (1.0, 1.0, 1.3), "step_seconds", [2]),
        ((0.3, None, 0.5, 0.3), (1.0,) * 4, "own_seconds", [2]),
        ((0.3, None), (None, 1.0), None, []),
        ((), (), None, []),
    ],
)
def test_which_nodes_are_slow(own: Any, step: Any, compared: str | None, slow: list[int]) -> None:
    nodes = [
        NodeStatus(k, f"h{k}", own_seconds=o, step_seconds=s) for k, (o, s) in enumerate(zip(own, step, strict=True))
    ]
    key, marked = mark_stragglers(nodes)
    assert key == compared
    assert [node.node_rank for node in marked if node.straggler] == slow


def test_a_stale_heartbeat_is_marked_only_in_a_live_run(built: Built) -> None:
    training(built)
    built.node_json(1, "h1", 20.0, [rank(2), rank(3, alive=False, exit_code=-9)])
    status = at(built, 60.0)
    assert [node.stale for node in status.nodes] == [False, True, False]
    assert status.nodes[1].exit_codes == (-9,)
    assert re.search(r"h1 .* 40 s ago  stale exit -9", text_of(status))
    built.state("failed", 61.0, reason="rank 3 failed")
    assert not any(node.stale for node in at(built, 500.0).nodes)


def test_a_clock_that_is_set_back_between_two_updates_makes_no_time_negative(built: Built) -> None:
    built.plan(400)
    built.nodes(["h0"])
    built.metrics(range(5), at=3600.0)
    built.metrics(range(5, 10), at=30.0)
    assert at(built, 60.0).left_seconds == pytest.approx(390 * (8 * 2.0 + 1.5) / 9)


def test_a_clock_that_is_set_back_hides_no_node_and_an_earlier_attempt_is_none(built: Built) -> None:
    built.run.begin_attempt()
    built.nodes(["h0"], at=3600.0)
    built.node_json(0, "h0", 58.0, [rank(0)], attempt=1)
    assert [node.ranks_alive for node in at(built, 60.0).nodes] == [1]
    built.run.begin_attempt()
    assert [node.ranks_alive for node in at(built, 60.0).nodes] == [None]


def test_heartbeat_ages_use_the_supervisor_s_clock(built: Built) -> None:
    built.nodes(["h0", "h1", "h2"], offsets=[0.0, 100.0, -100.0])
    built.state("training", 2.0)
    for node, ahead in enumerate((0.0, 100.0, -100.0)):
        built.node_json(node, f"h{node}", 50.0 + ahead, [rank(node)])
    status = at(built, 53.0)
    assert [node.heartbeat_seconds for node in status.nodes] == [3.0] * 3


def test_a_node_without_a_report_has_a_row(built: Built) -> None:
    training(built)
    (built.run.node_logs(1, "h1") / "node.json").write_text('{"time": "2026')
    (built.run.node_logs(2, "h2") / "node.json").unlink()
    status = at(built, 60.0)
    assert [(node.host, node.updates) for node in status.nodes] == [("h0", 17), ("h1", None), ("h2", None)]
    assert "h2" in text_of(status)


def test_nodes_of_an_earlier_session_are_not_shown(built: Built) -> None:
    training(built)
    built.event(1000.0, "resume", update=20, samples=160)
    built.nodes(["h0", "h7"], at=1001.0)
    built.state("training", 1010.0)
    built.node_json(1, "h7", 1015.0, [rank(1)])
    built.metrics(range(20, 24), at=1015.0, every=3.0)
    status = at(built, 1030.0)
    assert [(node.host, node.updates) for node in status.nodes] == [("h0", None), ("h7", 17)]
    assert status.left_seconds == pytest.approx(376 * 3.0)


def test_gpus_have_their_own_columns(built: Built) -> None:
    training(built)
    gpu = {"name": "H100", "memory_used_bytes": 60 * GIB, "memory_bytes": 80 * GIB}
    gpus = [{"index": 0, "utilization_percent": 90, **gpu}, {"index": 1, "utilization_percent": 100, **gpu}]
    built.node_json(0, "h0", 58.0, [rank(0)], gpus=gpus)
    node = at(built, 60.0).nodes[0]
    assert (node.gpus, node.gpu_percent) == (2, 95.0)
    assert (node.gpu_memory_used_bytes, node.gpu_memory_total_bytes) == (120 * GIB, 160 * GIB)
    assert "120.0/160.0" in text_of(at(built, 60.0))


def test_a_run_without_a_supervisor_is_lost(built: Built) -> None:
    training(built)
    # Less than a minute of silence is not a loss: a checkpoint, an evaluation or a slow disk looks the same.
    assert at(built, 117.0).state == "training"
    status = at(built, 200.0)
    assert (status.state, status.written_state, status.live) == ("lost", "training", False)
    assert status.silent_seconds == 142.0
    assert status.left_seconds is None
    text = " ".join(text_of(status).split())
    assert "lost: its state is training, but no launcher holds its lock; last activity 2 min 22 s ago" in text
    assert read_status_without_nodes(built.run, START + 200.0).state == "lost"


def test_a_launcher_that_holds_the_lock_is_alive_without_any_output(built: Built) -> None:
    built.state("preparing", 1.0)
    with (built.run.path / "launcher.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(lock.name, (0, 0))
        assert at(built, 5000.0).state == "preparing"
    assert at(built, 5000.0).state == "lost"


def test_a_script_s_metrics_may_lack_any_key(built: Built) -> None:
    built.plan(50)
    built.state("training", 1.0)
    built.run.metrics_file.write_text('{"update": 3, "loss": "nan"}\n{"update": 4, "custom": [1]}\n{"upda')
    status = at(built, 10.0)
    assert (status.updates, status.loss, status.left_seconds) == (5, None, None)
    built.run.metrics_file.write_text('{"update": 3, "loss": "nan"}\n')
    assert at(built, 10.0).loss == "nan"
    assert "loss nan" in text_of(at(built, 10.0))
    # Without metrics the nodes' reports are used.
    built.run.metrics_file.unlink()
    built.nodes(["h0"], at=2.0)
    built.node_json(0, "h0", 9.0, [rank(0, updates=7), rank(1, updates=8)])
    assert at(built, 10.0).updates == 7


def test_damaged_files_are_ignored(built: Built) -> None:
    built.run.plan_file.write_text("{")
    with built.run.events_file.open("a") as file:
        file.write('{"time": "2026-03-01T12:00:0\n[1, 2]\nnull\n')
    built.state("training", 2.0)
    with built.run.metrics_file.open("wb") as file:
        file.write(b'\x00\xff{"update": 1}\n{"update": 2, "loss": 1.0}\n')
    status = at(built, 3.0)
    assert (status.state, status.total_updates, status.updates, status.loss) == ("training", None, 3, 1.0)
    built.run.state_file.write_text('{"state": "tr')
    assert at(built, 3.0).state == "unknown"


def test_the_newest_plan_is_used(built: Built) -> None:
    training(built)
    for number, updates in ((1, 300), (2, 200), (10, 100)):
        document = {"sha256": "0", "plan": {"length": {"total_updates": updates}}}
        (built.run.path / f"plan.revision-{number}.json").write_text(json.dumps(document))
    assert at(built, 60.0).total_updates == 100


def test_only_a_part_of_a_long_run_is_read(built: Built) -> None:
    training(built)
    with built.run.metrics_file.open("r+b") as file:
        file.truncate(2 * 1024**3)  # sparse: uses no disk space
    with built.run.metrics_file.open("a") as file:
        file.write("\n")
    built.metrics(range(20, 300), at=20.0)
    before = bytes_read()
    assert at(built, 600.0).updates == 300
    assert len(sampled(built.run.metrics_file)) > 0
    assert bytes_read() - before < 2 * 1024**2


def test_metrics_are_sampled_over_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"update": u, "loss": 1 / (1 + u)}) + "\n" for u in range(20_000)))
    updates = [line["update"] for line in sampled(path)]
    assert updates == sorted(set(updates))
    assert updates[0] == 0 and updates[-1] == 19_999
    steps = [b - a for a, b in pairwise(updates)]
    assert 150 < len(updates) <= 200
    assert max(steps) < 300
    path.write_text('{"update": 0, "loss": 2.0}\n{"update": 1, "loss": 1.0}\n{"upd')
    assert [line["update"] for line in sampled(path)] == [0, 1]
    assert sampled(tmp_path / "none") == []


def test_small_plots_of_loss_and_learning_rate(built: Built) -> None:
    training(built)
    loss, lr = plots_of(sampled(built.run.metrics_file), width=100, colour=False)
    assert loss.plain.startswith("loss") and "3.000" in loss.plain and "2.810" in loss.plain
    assert lr.plain.startswith("learning rate") and "2.0e-04" in lr.plain
    assert max(map(len, loss.plain.splitlines())) <= 50
    nan = [{"update": update, "loss": "nan", "lr": 1e-3} for update in range(3)]
    assert [plot.plain.split("\n")[0] for plot in plots_of(nan, width=100, colour=True)] == ["learning rate"]
    assert plots_of([], width=100, colour=True) == []


def test_nodes_with_problems_come_first_among_many(built: Built) -> None:
    training(built, own=(*(0.3,) * 39, 0.9))
    text = text_of(at(built, 60.0), most_nodes=5)
    assert "and 35 more nodes" in text
    assert re.search(r"\n *39  h39", text)
    assert text.index("h39") < text.index("h0 ")


def test_markup_in_names_is_printed_as_text(built: Built) -> None:
    built.nodes(["[red]x[/]", "h\x1b[2J1"])
    built.state("failed", 2.0, reason="[bold]an error[/] \x1b[2Jof a rank\nwith more")
    text = text_of(at(built, 10.0))
    assert "[red]x[/]" in text
    assert "[bold]an error[/] of a rank" in text
    assert "\x1b" not in text


def test_the_json_has_the_documented_keys(built: Built, tmp_path: Path) -> None:
    training(built)
    built.state("finished", 70.0, update=20, reason=None, slurm_job_id=77)
    found = json.loads(command("status", str(built.run.path), "--json").out)
    documented = re.findall(r"keys (?:of each node )?are: ([^.]+)\.", status_command.status.__doc__ or "")
    keys = [key.strip() for part in documented for key in part.split(",")]
    assert keys == [*found, *found["nodes"][0]]
    assert found["slurm_job_id"] == "77"
    listed = json.loads(command("status", "--output-dir", str(tmp_path / "runs"), "--json").out)
    assert listed == [{k: v for k, v in found.items() if k not in ("nodes", "compared")} | _ages(listed[0])]


def _ages(of: dict[str, Any]) -> dict[str, Any]:
    return {key: of[key] for key in ("state_seconds", "silent_seconds")}


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for day, (name, state) in enumerate((("b-old", "finished"), ("c-new", "failed"), ("a-newest", "training"))):
        built = Built(tmp_path / "runs", name)
        built.run.events_file.write_text(json.dumps({"time": stamp(86_400.0 * day), "event": "plan"}) + "\n")
        built.plan(10)
        built.metrics(range(day + 1), at=86_400.0 * day)
        built.state(state, 86_400.0 * day + 60)
    (tmp_path / "runs/.cache").mkdir()
    (tmp_path / "runs/notes.txt").write_text("not a run")
    ended = command("status", "--output-dir", str(tmp_path / "runs"))
    assert ended.status == 0
    rows = [line.split() for line in ended.out.splitlines()]
    assert [row[:2] for row in rows[1:4]] == [["a-newest", "lost"], ["c-new", "failed"], ["b-old", "finished"]]
    assert "3/10" in rows[1] and "2.9800" in rows[1] and "2026-03-03" in rows[1]
    assert "no launcher holds its lock" in ended.out


def test_an_empty_folder_and_a_missing_folder_are_reported(tmp_path: Path) -> None:
    assert command("status", "--output-dir", str(tmp_path)).out == f"no runs in {tmp_path}\n"
    ended = command("status", "--output-dir", str(tmp_path / "none"))
    assert ended.status == 2
    assert "cannot be read: No such file" in ended.err


def test_watch_without_a_terminal_prints_the_end_of_a_run(built: Built) -> None:
    training(built)
    built.state("finished", 70.0, update=20)
    ended = command("watch", str(built.run.path))
    assert ended.status == 0
    first, *rest = ended.out.splitlines()
    assert first.startswith("finished  update 20/400  loss 2.8100  lr 2.00e-04")
    assert "tiny-20260301-120000  finished" in rest[0]


def test_watching_does_not_change_the_run_directory(built: Built) -> None:
    """Another user's run can be watched without write permission, and watching creates no file in it."""
    training(built)
    built.log(0, "h0", "rank-0", (1.0, "a"))
    built.failure(60.0, {"rank": 0, "node_rank": 0, "host": "h0", "how": "exit code 1"})
    built.state("failed", 61.0, reason="rank 0 failed")

    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in built.run.path.rglob("*")}

    before = files()
    for verb in (["status"], ["status", "--json"], ["logs"], ["why"], ["watch"]):
        assert command(verb[0], str(built.run.path), *verb[1:]).status == 0
    assert files() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody to try this")
def test_a_run_without_read_permission_does_not_hide_the_others(built: Built, tmp_path: Path) -> None:
    training(built)
    built.run.path.chmod(0o755)
    built.run.events_file.chmod(0o600)
    runs = tmp_path / "runs"
    Built(runs, "b-closed").run.path.chmod(0o700)
    opened = Built(runs, "c-open")
    opened.state("failed", 5.0)
    opened.run.path.chmod(0o755)
    one = as_nobody(tmp_path, "status", str(built.run.path))
    assert one.status == 2 and "you do not have permission to read this" in one.err and "events.jsonl" in one.err
    closed = as_nobody(tmp_path, "why", "b-closed", "--output-dir", str(runs))
    assert closed.status == 2 and "you do not have permission to read this" in closed.err
    listed = as_nobody(tmp_path, "status", "--output-dir", str(runs))
    assert (listed.status, listed.err) == (0, "")
    rows = [re.split(r"  +", line.strip()) for line in listed.out.splitlines()]
    assert [row[:2] for row in rows[1:]] == [
        ["c-open", "failed"],
        ["tiny-20260301-120000", "permission denied"],
        ["b-closed", "permission denied"],
    ]
    states = json.loads(as_nobody(tmp_path, "status", "--json", "--output-dir", str(runs)).out)
    assert [run["state"] for run in states] == ["failed", "unreadable", "unreadable"]
    wrong = as_nobody(tmp_path, "status", "c-opne", "--output-dir", str(runs))
    assert wrong.status == 2 and "did you mean c-open?" in wrong.err


def test_a_stale_file_is_read_again(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS raises ESTALE if another host replaces the file while it is read."""
    training(built)
    errors = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]
    bytes_of = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name in ("state.json", "node.json") and errors:
            raise errors.pop()
        return bytes_of(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert at(built, 60.0).state == "unknown"
    assert (at(built, 60.0).state, len(errors)) == ("training", 0)
    errors += [OSError(errno.ESTALE, "Stale file handle")]
    assert [node.updates for node in at(built, 60.0).nodes] == [17] * 3


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "?"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (277_200, "3 d 5 h"),
    ],
)
def test_durations(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_rank_ranges() -> None:
    assert rank_range((0, 1, 2, 3)) == "0-3"
    assert rank_range((4,)) == "4"
    assert rank_range((1, 3)) == "1,3"
    assert rank_range(()) == "-"


def test_the_status_of_many_nodes_reads_each_file_once(built: Built) -> None:
    training(built, own=(0.3,) * 512)
    size = sum(path.stat().st_size for path in built.run.path.rglob("*") if path.is_file())
    before = bytes_read()
    assert len(read_status(built.run, time.time()).nodes) == 512
    assert bytes_read() - before < 1.2 * size


def test_a_launcher_that_touches_its_lock_is_alive_on_another_host(built: Built) -> None:
    built.state("preparing", 1.0)
    built.run.lock_file.touch()
    touched = built.run.lock_file.stat().st_mtime
    assert read_status(built.run, touched + 59).state == "preparing"
