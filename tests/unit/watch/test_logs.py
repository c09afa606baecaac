"""The lines of all nodes in the order of time, past and live."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cli.logs import _since
from launcher.errors import RequestError
from launcher.tail import lines_backwards
from launcher.watch import end_of_run
from launcher.watch.follow import HOLD_SECONDS, Follower
from launcher.watch.lines import Line, merged
from launcher.watch.print_lines import Printer
from launcher.watch.session import read_session
from launcher.watch.sources import Source, sources_of
from launcher.watch.terminal_safe import coloured, plain
from tests.time_limit import TIME_LIMIT_SECONDS
from tests.unit.inputs import command
from tests.unit.run_directories import START, Built, bytes_read, stamp
from tests.unit.run_directories import rank as told_rank


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return Built(tmp_path / "runs")


def shown(built: Built, *options: str) -> list[str]:
    """The texts that `launcher logs` prints, with the names of their files."""
    ended = command("logs", str(built.run.path), *options)
    assert (ended.status, ended.err) == (0, ""), ended.err
    return [f"{line.split()[0]}: {line.split('Z ', 1)[-1].strip()}" for line in ended.out.splitlines()]


def three_nodes(built: Built) -> None:
    built.nodes(["h0", "h1", "h10"])
    built.log(0, "h0", "agent", (0.0, "rank 0 started"), (9.0, "rank 0 ended with 1"))
    built.log(0, "h0", "rank-0", (1.0, "one"), (4.0, "four"))
    built.log(1, "h1", "rank-1", (2.0, "Traceback (most recent call last):"), (2.0, "  File x"), (2.0, "two"))
    built.log(2, "h10", "rank-2", (2.0, "as well"), (3.0, "three"))
    built.log(2, "h10", "node", (0.5, "ray is up"))


def test_lines_of_all_nodes_come_in_the_order_of_time(built: Built) -> None:
    three_nodes(built)
    assert shown(built) == [
        "node-0-h0/agent: rank 0 started",
        "node-2-h10/node: ray is up",
        "node-0-h0/rank-0: one",
        "node-1-h1/rank-1: Traceback (most recent call last):",
        "node-1-h1/rank-1: File x",
        "node-1-h1/rank-1: two",
        "node-2-h10/rank-2: as well",
        "node-2-h10/rank-2: three",
        "node-0-h0/rank-0: four",
        "node-0-h0/agent: rank 0 ended with 1",
    ]


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--node", "1"], ["Traceback (most recent call last):", "File x", "two"]),
        (["--node", "h10"], ["ray is up", "as well", "three"]),
        (["--rank", "0"], ["one", "four"]),
        (["--node", "2", "--rank", "2"], ["as well", "three"]),
        (["--grep", "^t[wh]"], ["two", "three"]),
        (["--tail", "2"], ["four", "rank 0 ended with 1"]),
        (["--tail", "2", "--grep", "o"], ["two", "four"]),
        (["--tail", "3", "--grep", "^(one|two|three)$"], ["one", "two", "three"]),
        (["--tail", "0"], []),
        (["--since", stamp(2.5)], ["three", "four", "rank 0 ended with 1"]),
        (["--since", stamp(2.5), "--tail", "9", "--rank", "2"], ["three"]),
        (["--since", "1s"], []),
    ],
    ids=" ".join,
)
def test_a_part_is_chosen(built: Built, options: list[str], texts: list[str]) -> None:
    three_nodes(built)
    assert [line.split(": ", 1)[1] for line in shown(built, *options)] == texts


def test_clocks_that_differ_are_set_right(built: Built) -> None:
    built.nodes(["h0", "h1"], offsets=[0.0, 30.0])
    built.log(0, "h0", "rank-0", (1.0, "first"), (3.0, "third"))
    built.log(1, "h1", "rank-1", (32.0, "second"), (34.0, "fourth"))
    ended = command("logs", str(built.run.path))
    assert ended.out.split("\n")[:4] == [
        f"node-0-h0/rank-0 {stamp(1.0)} first",
        f"node-1-h1/rank-1 {stamp(2.0)} second",
        f"node-0-h0/rank-0 {stamp(3.0)} third",
        f"node-1-h1/rank-1 {stamp(4.0)} fourth",
    ]


def test_a_line_without_a_time_belongs_to_the_line_before(built: Built) -> None:
    built.log(
        0, "h0", "rank-0", "before any", (1.0, "a"), "still a", "  and still", (3.0, "c"), torn=f"{stamp(4.0)} to"
    )
    built.log(1, "h1", "rank-1", (0.5, "early"), (2.0, "b"))
    wanted = ["before any", "early", "a", "still a", "and still", "b", "c", "to"]
    assert [line.split(": ", 1)[1].split()[-1] for line in shown(built)] == [text.split()[-1] for text in wanted]
    assert [line.split()[-1] for line in shown(built, "--tail", "7")] == [text.split()[-1] for text in wanted[1:]]
    assert [line.split()[-1] for line in shown(built, "--since", stamp(1.0))] == ["a", "a", "still", "b", "c", "to"]


def test_a_clock_that_was_set_back_does_not_change_a_file_s_order(built: Built) -> None:
    built.log(0, "h0", "rank-0", (5.0, "a"), (2.0, "b"), (6.0, "c"))
    built.log(1, "h1", "rank-1", (4.0, "x"), (5.5, "y"))
    texts = [line.split(": ")[1] for line in shown(built)]
    assert texts == ["x", "a", "b", "y", "c"]
    assert [line.split(": ")[1] for line in shown(built, "--tail", "4")] == texts[1:]


TEXTS = st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["", "a", "ab", "ä b", "x" * 90])), max_size=30)


@settings(max_examples=60, deadline=None)
@given(files=st.lists(TEXTS, min_size=1, max_size=4), count=st.integers(0, 40), since=st.integers(0, 20))
def test_tail_and_since_are_ends_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[tuple[int, str]]], count: int, since: int
) -> None:
    built = Built(tmp_path_factory.mktemp("runs"))
    for node, lines in enumerate(files):
        built.log(node, f"h{node}", f"rank-{node}", *sorted(lines))
    sources = sources_of(built.run, {})
    whole = [(line.time, line.text) for line in merged(sources)]
    assert whole == sorted(whole, key=lambda line: line[0])
    assert len(whole) == sum(map(len, files))
    assert [(line.time, line.text) for line in merged(sources, last=count)] == (whole[-count:] if count else [])
    late = [line for line in whole if line[0] >= START + since]
    assert [(line.time, line.text) for line in merged(sources, since=START + since)] == late


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.sampled_from(["", "a", "bc", "defghij"]), max_size=12).map("\n".join),
    block=st.integers(1, 9),
)
def test_lines_backwards_are_the_lines_backwards(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "file"
    path.write_text(text)
    found = [line.decode() for line in lines_backwards(path, block_bytes=block)]
    wanted = text.split("\n") if text else []
    assert found[::-1] == (wanted[:-1] if text.endswith("\n") else wanted)


def test_the_end_of_a_huge_file_is_not_found_by_reading_it(built: Built) -> None:
    path = built.log(0, "h0", "rank-0", (1.0, "start"))
    with path.open("r+b") as file:
        file.truncate(3 * 1024**3)  # a hole: no disk is used
    built.log(0, "h0", "rank-0", "", (2.0, "last but one"), (3.0, "last"))
    sources, before = sources_of(built.run, {}), bytes_read()
    assert [line.text for line in merged(sources, last=2)] == ["last but one", "last"]
    follower = Follower(lambda: sources)
    assert follower.ends[0] == path.stat().st_size
    assert bytes_read() - before < 1024**2


def test_since_reads_no_more_than_it_must(built: Built) -> None:
    path = built.log(0, "h0", "rank-0", *((i / 10, "x" * 100) for i in range(80_000)))
    before = bytes_read()
    lines = list(merged(sources_of(built.run, {}), since=START + 7_999.0))
    assert [line.time - START for line in lines] == pytest.approx([7_999.0 + i / 10 for i in range(10)])
    assert bytes_read() - before < path.stat().st_size / 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--node", "h11"], ("--node", "'h11'", "did you mean h1")),
        (["--node", "7"], ("--node", "0 (h0), 1 (h1), 2 (h10)")),
        (["--rank", "9"], ("--rank", "no rank 9", "ranks 0, 1, 2")),
        (["--node", "h1", "--rank", "0"], ("no rank 0 of node h1", "ranks 1")),
        (["--grep", "("], ("--grep", "no regular expression")),
        (["--since", "ten minutes"], ("--since", "'ten minutes' is no time", "10m")),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_is_not_there_is_told(built: Built, options: list[str], words: tuple[str, ...]) -> None:
    three_nodes(built)
    ended = command("logs", str(built.run.path), *options)
    assert (ended.status, ended.out) == (2, "")
    assert all(word in ended.err for word in words), ended.err


def test_a_run_is_found_by_its_name_and_the_nearest_is_named(built: Built, tmp_path: Path) -> None:
    three_nodes(built)
    by_name = command("logs", built.run.path.name, "--output-dir", str(tmp_path / "runs"), "--tail", "1")
    assert "rank 0 ended with 1" in by_name.out
    wrong = command("logs", "tiny-20260302-120000", "--output-dir", str(tmp_path / "runs"))
    assert wrong.status == 2
    assert "did you mean tiny-20260301-120000?" in wrong.err
    none = command("logs", str(tmp_path))
    assert none.status == 2
    assert "this is not a run directory" in none.err


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tiny", "tiny-20260302-120000"),
        ("tiny-20260301", "tiny-20260301-120000"),
        ("tiny-l", "tiny-lora-20260303-120000"),
        ("large", "large-slurm-9"),
        ("tiny-lora-20260303-120000", "tiny-lora-20260303-120000"),
    ],
)
def test_a_run_is_found_by_its_job_or_by_how_its_name_begins(tmp_path: Path, name: str, found: str) -> None:
    names = {
        "tiny-20260301-120000": 1,
        "tiny-20260302-120000": 2,
        "tiny-lora-20260303-120000": 3,
        "large-slurm-10": 1,
        "large-slurm-9": 2,  # Slurm counted anew
    }
    for run_name, day in names.items():
        run = Built(tmp_path / "runs", run_name)
        run.run.events_file.write_text(json.dumps({"time": stamp(86_400.0 * day), "event": "plan"}) + "\n")
        run.log(0, "h0", "rank-0", (1.0, f"of {run_name}"))
    output_dir = ("--output-dir", str(tmp_path / "runs"))
    assert command("logs", name, *output_dir).out.endswith(f" of {found}\n")
    # A folder of the job's name is no run, and hides none.
    several = command("logs", "tiny-2026", *output_dir)
    assert several.status == 2
    assert "2 runs in" in several.err and "tiny-20260301-120000, tiny-20260302-120000" in several.err


def test_no_logs_yet_is_told(built: Built) -> None:
    ended = command("logs", str(built.run.path))
    assert ended.status == 2
    assert "no node has written a log yet" in ended.err and "prepare" not in ended.err
    (built.run.logs / "prepare.log").write_text("tokenising\n")
    assert f"see {built.run.logs / 'prepare.log'}" in command("logs", str(built.run.path)).err


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172_800)])
def test_since_is_ago(text: str, seconds: float) -> None:
    assert _since(text, START) == START - seconds


def test_since_is_a_time() -> None:
    assert _since("2026-03-01T12:00:00Z", 0.0) == START
    assert _since("2026-03-01T13:00:00+01:00", 0.0) == START
    assert _since("2026-03-01 12:00", 0.0) == START
    assert _since(None, 0.0) is None
    with pytest.raises(RequestError):
        _since("10", 0.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


NASTY = "a\x1b[31mred\x1b[2J\x1b]0;title\x07 [bold]b[/]\x9b1A\x08\x1b]52;c;aGk=\x1b\\c\x1b(0d\rover\te"


def test_a_line_does_nothing_to_a_terminal(monkeypatch: pytest.MonkeyPatch, built: Built) -> None:
    assert plain(NASTY) == "ared [bold]b[/]cdover\te"
    assert coloured(NASTY) == "a\x1b[31mred [bold]b[/]cdover\te\x1b[0m"
    built.log(3, "h3", "rank-3", (1.0, NASTY))
    sources = sources_of(built.run, {})

    def printed(out: io.StringIO, **environment: str) -> str:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", **environment}.items():
            monkeypatch.setenv(name, value)
        Printer(out).print(merged(sources), sources)
        return out.getvalue()

    coloured_line = f"\x1b[35mnode-3-h3/rank-3\x1b[0m {stamp(1.0)} {coloured(NASTY)}\n"
    assert printed(Terminal()) == coloured_line
    assert printed(Terminal(), NO_COLOR="1") == f"node-3-h3/rank-3 {stamp(1.0)} {plain(NASTY)}\n"
    assert printed(io.StringIO()) == f"node-3-h3/rank-3 {stamp(1.0)} {NASTY}\n"


def test_a_reader_that_goes_away_is_no_error(built: Built) -> None:
    built.log(0, "h0", "rank-0", *((i / 10, f"line {i}") for i in range(20_000)))
    launcher = str(Path(sys.executable).with_name("launcher"))
    with subprocess.Popen(
        [launcher, "logs", str(built.run.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert b"line 0" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(TIME_LIMIT_SECONDS) == 0


class Script:
    """A clock by which things happen to the files while the follower waits."""

    def __init__(self, *steps: tuple[float, Callable[[], object]]) -> None:
        self.now, self._steps = 0.0, list(steps)
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.waits.append(seconds)
        self.now += seconds
        while self._steps and self._steps[0][0] <= self.now:
            self._steps.pop(0)[1]()

    @property
    def over(self) -> bool:
        return not self._steps


def followed(built: Built, clock: Script, after: float = 3.0) -> list[tuple[float, Line]]:
    """(when it was shown, line) for every line that a follower shows until `after` the script's end."""
    follower = Follower(lambda: sources_of(built.run, read_session(built.run).offsets), clock)
    seen: list[tuple[float, Line]] = []
    for batch in follower.batches(lambda: clock.over and follower.quiet_seconds > after):
        seen += [(clock.now, line) for line in batch]
    return seen


def test_lines_of_slower_files_fall_in_order(built: Built) -> None:
    built.log(0, "h0", "rank-0", (0.0, "old"))
    built.log(1, "h1", "rank-1", (0.0, "old"))
    clock = Script(
        (1.0, lambda: built.log(0, "h0", "rank-0", (1.0, "a"), (1.2, "c"))),
        (1.3, lambda: built.log(1, "h1", "rank-1", (1.1, "b"))),
        (2.0, lambda: built.log(1, "h1", "rank-1", torn=f"{stamp(2.0)} half")),
        (4.0, lambda: built.log(1, "h1", "rank-1", torn=" and half\n")),
        (5.0, lambda: built.log(2, "h2", "rank-2", (4.9, "new file"))),
        (6.0, lambda: built.log(1, "h1", "rank-1", torn=f"{stamp(6.0)} never ended")),
    )
    seen = followed(built, clock)
    assert [line.text for _, line in seen] == ["a", "b", "c", "half and half", "new file", "never ended"]
    # What is shown was held for as long as it takes, and not much longer than the poll's pace allows.
    assert 1.0 + HOLD_SECONDS <= seen[0][0] <= 1.0 + HOLD_SECONDS + 1.1


def test_a_follower_of_many_files_loses_nothing_and_slows_down_when_nothing_comes(built: Built) -> None:
    """64 files, of which each gains a line every half second at a moment of its own, on nodes with odd clocks."""
    hosts = [f"h{node}" for node in range(16)]
    offsets = [(node % 5 - 2) * 60.0 for node in range(16)]
    built.nodes(hosts, offsets=offsets)
    steps = []
    for second in range(20):
        for rank in range(64):
            at, node = 1.0 + second / 2 + rank / 200, rank // 4
            line = (at + offsets[node], f"{rank} {second}")
            steps.append((at, lambda n=node, r=rank, line=line: built.log(n, hosts[n], f"rank-{r}", line)))
    clock = Script(*sorted(steps, key=lambda step: step[0]))
    seen = [line for _, line in followed(built, clock, after=20.0)]
    assert len(seen) == 64 * 20
    assert len({line.text for line in seen}) == 64 * 20
    # The files themselves are new, and found within two seconds; from then on all is in order.
    late = [line.time for line in seen if line.time > START + 4.0]
    assert late == sorted(late)
    assert clock.waits[-3:] == [1.0] * 3


def test_follow_ends_with_the_run_and_begins_with_its_last_lines(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_of_run, "QUIET_SECONDS", 0.2)
    three_nodes(built)
    built.log(0, "h0", "rank-0", *((10 + i / 10, f"line {i}") for i in range(150)))
    built.state("failed", 30.0)
    assert [line.split()[-1] for line in shown(built, "-f")] == [str(i) for i in range(50, 150)]
    assert len(shown(built, "-f", "--tail", "3")) == 3
    assert len(shown(built, "-f", "--since", stamp(9.0))) == 151


def test_follow_ends_where_the_run_is_lost(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_of_run, "QUIET_SECONDS", 0.2)
    three_nodes(built)
    built.state("training", 30.0)
    ended = command("logs", str(built.run.path), "-f", "--tail", "1")
    assert (ended.status, len(ended.out.splitlines())) == (0, 1)
    assert "the run is lost" in ended.err


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--node", "h9"], "no node 'h9' has logs here"), (["--rank", "9"], "no rank 9 has a log here")],
    ids=["node", "rank"],
)
def test_follow_tells_what_will_never_come_once_that_is_known(built: Built, options: list[str], words: str) -> None:
    built.nodes(["h0", "h1"])
    built.state("training", time.time() - START)
    built.log(0, "h0", "rank-0", (1.0, "one"))
    built.node_json(0, "h0", 2.0, [told_rank(0)])
    launcher = str(Path(sys.executable).with_name("launcher"))
    # Held, so that the run is not lost however long the machine takes.
    with (
        built.run.held(),
        subprocess.Popen(
            [launcher, "logs", str(built.run.path), "-f", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process,
    ):
        # While a node has not told of its ranks, it waits.
        time.sleep(0.5)
        assert process.poll() is None
        built.node_json(1, "h1", 2.0, [told_rank(1)])
        out, err = process.communicate(timeout=TIME_LIMIT_SECONDS)
    assert (process.returncode, out) == (2, b"")
    assert words in err.decode()


@pytest.mark.parametrize("verb", [("logs", "-f"), ("watch",)], ids=" ".join)
def test_what_is_watched_ends_where_the_run_is_removed(built: Built, verb: tuple[str, ...]) -> None:
    three_nodes(built)
    built.state("training", time.time() - START)
    launcher = str(Path(sys.executable).with_name("launcher"))
    with (
        built.run.held(),
        subprocess.Popen(
            [launcher, *verb, str(built.run.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None and process.stdout.readline()
        shutil.rmtree(built.run.path)
        _, err = process.communicate(timeout=TIME_LIMIT_SECONDS)
    assert process.returncode == 1
    assert err.decode() == f"error: the run is gone: {built.run.path} was removed while it was watched\n"


def test_ctrl_c_ends_following_quietly(built: Built) -> None:
    three_nodes(built)
    built.state("training", time.time() - START)
    launcher = str(Path(sys.executable).with_name("launcher"))
    with (
        built.run.held(),
        subprocess.Popen(
            [launcher, "logs", str(built.run.path), "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None and process.stderr is not None
        assert b"rank 0 started" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
        assert process.wait(TIME_LIMIT_SECONDS) == 130


def test_source_names_are_their_paths() -> None:
    source = Source(Path("/runs/a/logs/node-2-gpu-a.site/rank-17.log"), 2, "gpu-a.site", 17)
    assert source.label == "node-2-gpu-a.site/rank-17"
