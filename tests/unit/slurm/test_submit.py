"""Submission to Slurm: scripts compared with golden files, valid values, and the behaviour of the scripts."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher.errors import RequestError
from launcher.job import Job, load_job
from launcher.job.slurm import SET_ELSEWHERE, gres_gpus, time_seconds
from launcher.presets import shipped_folder
from launcher.slurm.options import sbatch_options
from launcher.slurm.sbatch_errors import STATES, explain_sbatch_error, job_status
from launcher.slurm.submit import SHIPPED, SlurmRequest, SubmitContext, Templates, read_templates, slurm_request
from tests.time_limit import TIME_LIMIT_SECONDS
from tests.unit.inputs import Ended, command, job_of, write_folder
from tests.unit.test_imports import fresh

GOLDEN = Path(__file__).parent / "golden"
HERE = SubmitContext(Path("/home/me/project"), "launcher", ())
SHIPPED_TEXT = (shipped_folder("slurm") / SHIPPED).read_text()
FINETUNE = shipped_folder("slurm") / "finetune.sbatch"
EXTENDING = """\
{% extends "submit.sbatch.j2" %}
{% block setup %}
{{ super() }}
export NCCL_SOCKET_IFNAME=ib0
{% endblock %}
"""
FROM_NOTHING = """\
#!/bin/bash -l
#SBATCH --constraint={{ job.slurm.constraint }}
#SBATCH --output=mine-%j.log
srun {{ launcher | quote }} node {{ job_arguments | quote }}
"""


def request_of(job: Job, *overrides: str, file: str = "my job.yaml", own: str | None = None) -> SlurmRequest:
    texts = {SHIPPED: SHIPPED_TEXT} | ({"own.j2": own} if own is not None else {})
    templates = Templates(SHIPPED if own is None else "own.j2", texts)
    return slurm_request(job, Path(file), overrides, HERE, templates)


def on_cpus(**slurm: Any) -> Job:
    return job_of(cluster={"nodes": 2, "gpus_per_node": 0, "processes_per_node": 4}, slurm=slurm)


PLAIN_SCRIPT = request_of(on_cpus()).script
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], str | None]] = {
    "two_nodes_with_gpus": (
        {
            "cluster": {"nodes": 2, "gpus_per_node": 8},
            "slurm": {
                "partition": "h100,a100",
                "account": "proj-42",
                "qos": "long",
                "time": "2-12:30:00",
                "cpus_per_task": 96,
                "mem": 0,
                "constraint": "[rack1*2&rack2*4]",
                "exclude": "gpu[03-05,9],bad",
                "exclusive": True,
                "mail_user": "me@example.org",
                "mail_type": ["END", "FAIL"],
                "comment": 'for "paper" #3, 100%',
                "modules": ["cuda/12.4", "gcc"],
                "activate": "my venv",
                "extra": ["--licenses=fs:1", "--contiguous"],
            },
        },
        ("schedule.peak_lr=1e-5", "data.train=[a.jsonl, 'b c.jsonl']", "model.revision=$(rm -rf x);`y`"),
        None,
    ),
    "array_with_dependency": (
        {
            "name": "seeds",
            "output_dir": "/scratch/50% of it/runs",
            "cluster": {"gpus_per_node": 0, "processes_per_node": 2},
            "slurm": {
                "array": "0-15:5%2",
                "array_key": "train.seed",
                "dependency": "afterok:12:13_4,singleton",
                "requeue": False,
                "signal_seconds": 120,
            },
        },
        (),
        None,
    ),
    "cpus_only": ({"cluster": {"nodes": 3, "gpus_per_node": 0, "processes_per_node": 4}}, (), None),
    "two_nodes_and_a_spare_node": (
        {"cluster": {"nodes": 2, "spare_nodes": 1, "gpus_per_node": 0}, "slurm": {"time": "1:00:00"}},
        (),
        None,
    ),
    "named_gpus_in_pyxis": (
        {
            "slurm": {
                "gres": "gpu:h100:4,lscratch:100G",
                "container": "nvcr.io#nvidia/pytorch:25.01-py3",
                "container_mounts": ["/data", "/scratch:/scratch:ro"],
            }
        },
        ("train.max_steps=20",),
        None,
    ),
    "gpus_in_apptainer": (
        {
            "cluster": {"gpus_per_node": 4},
            "slurm": {
                "gres": "lscratch:100G",
                "container": "/images/train.sif",
                "container_mounts": ["/data"],
                "container_runtime": "apptainer",
            },
        },
        (),
        None,
    ),
    "on_fewer_nodes": (
        {"cluster": {"nodes": 4, "min_nodes": 2, "gpus_per_node": 8}, "slurm": {"container": "/images/train.sqsh"}},
        (),
        None,
    ),
    "extending_ours": ({"cluster": {"gpus_per_node": 0}, "slurm": {"modules": ["gcc"]}}, (), EXTENDING),
    "own_from_nothing": (
        {
            "cluster": {"nodes": 2, "gpus_per_node": 0},
            "slurm": {"constraint": "a100&nvlink", "array": "0-1", "dependency": "afterany:7", "comment": "a b"},
        },
        (),
        FROM_NOTHING,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_scripts_equal_the_golden_files(name: str) -> None:
    """After an intended change: WRITE_GOLDEN=1 pytest tests/unit/slurm/test_submit.py, then read the diff."""
    sections, overrides, own = CASES[name]
    made = request_of(job_of(**sections), *overrides, own=own)
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("WRITE_GOLDEN"):
        golden.write_text(made.script)
    assert made.script == golden.read_text()
    assert parses(made.script)
    if own != FROM_NOTHING:
        assert made.argv == ("sbatch", "--parsable")


def test_options_that_a_template_leaves_out_go_to_the_command_line() -> None:
    sections, overrides, own = CASES["own_from_nothing"]
    made = request_of(job_of(**sections), *overrides, own=own)
    explicit = ("--nodes=2", "--dependency=afterany:7", "--array=0-1", "--comment=a b")
    assert made.argv == ("sbatch", "--parsable", *explicit)


def test_options_after_the_first_command_are_not_read() -> None:
    late = "#!/bin/bash\nhostname\n{{ directives | join('\\n') }}\n"
    assert "--partition=p" in request_of(on_cpus(partition="p"), own=late).argv
    early = "#!/bin/bash\n# mine\n\n{{ directives | join('\\n') }}\nhostname\n"
    assert request_of(on_cpus(partition="p"), own=early).argv == ("sbatch", "--parsable")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("#!/bin/bash\n{{ slrum }}\n", 2, "'slrum' is undefined"),
        ("#!/bin/bash\n\n{{ job.slurm.tme }}\n", 3, "tme"),
        ("#!/bin/bash\n{% if %}\n", 2, "not a jinja2 template"),
        ("#!/bin/bash\n{{ ''.__class__.__mro__ }}\n", 2, "unsafe"),
        ("#!/bin/bash\n{% include '/etc/passwd' %}\n", 2, "found /etc/passwd, but only"),
        ("#!/bin/bash\n{{ 1 / 0 }}\n", 2, "division by zero"),
        ("hostname\n", 1, "does not start with #!"),
    ],
)
def test_a_failing_template_is_reported_with_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        request_of(on_cpus(), own=text)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line) == ("own.j2", line)
    assert says in problem.message


def test_a_template_is_found_from_the_folder_or_reported_as_missing(tmp_path: Path) -> None:
    (tmp_path / "mine.j2").write_text("#!/bin/sh\n")
    found = read_templates(on_cpus(template="mine.j2"), tmp_path)
    assert found.texts[found.name] == "#!/bin/sh\n"
    assert read_templates(on_cpus(), tmp_path).texts == {SHIPPED: SHIPPED_TEXT}
    with pytest.raises(RequestError, match=r"slurm\.template: .*other\.j2 cannot be read: No such file"):
        read_templates(on_cpus(template="other.j2"), tmp_path)


def test_the_environment_does_not_override_the_job() -> None:
    kept = ("PATH", "SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_WCKEY", "HF_TOKEN")
    dropped = (
        "SBATCH_WAIT",
        "SBATCH_PARTITION",
        "SBATCH_SIGNAL",
        "SLURM_JOB_ID",
        "SLURM_MEM_PER_CPU",
        "SRUN_CPUS_PER_TASK",
    )
    here = dataclasses.replace(HERE, variables=(*kept, *dropped))
    made = slurm_request(on_cpus(partition="p"), Path("j"), (), here, Templates(SHIPPED, {SHIPPED: SHIPPED_TEXT}))
    assert set(made.unset) == set(dropped)
    assert made.command().startswith("env -u SBATCH_PARTITION -u SBATCH_SIGNAL -u ")


GOOD: dict[str, list[Any]] = {
    "partition": ["gpu", "gpu,cpu-2", "4090"],
    "account": ["proj_1"],
    "qos": ["high"],
    "time": ["90", "1:30", "24:00:00", "2-12", "2-12:30", "2-12:30:05", "UNLIMITED", "0"],
    "gres": ["gpu:8", "gpu:h100:8", "lscratch:10G", "gpu:a100:2,gpu:h100:2,fs"],
    "mem": ["64G", "64000", 64000, 0, "2t"],
    "constraint": ["a", "a&b", "[rack1|rack2]", "[(knl&snc4)*4&haswell*1]", "!x"],
    "reservation": ["maint_1"],
    "nodelist": ["n1", "n[1-3,7],m[01-10]-ib", "rack[1-2]node[1-16]"],
    "exclude": ["n1"],
    "dependency": [
        "afterok:1",
        "after:1+5:2,afterany:3_*",
        "afterok:20:21?afternotok:23",
        "singleton",
        "aftercorr:5_1",
    ],
    "array": ["0-15", "0,6,16-32", "0-15:4", "1-9:2,12%3", 5],
    "mail_user": ["me", "me@example.org"],
    "comment": ["a 'b' \"c\" #d $(e) `f` \\ é ü 文"],
    "activate": ["~/venv", "/x y/venv"],
    "template": ["my template.j2"],
    "container": ["/x.sqsh", "docker://a/b:c", "nvcr.io#nvidia/pytorch:25.01"],
    "modules": [["cuda/12.4", "gcc@13.2+x"]],
    "extra": [["--licenses=a:1", "--contiguous", "--time-min=5"]],
    "mail_type": [["END", "TIME_LIMIT_90"]],
    "signal_seconds": [60],
    "cpus_per_task": [8],
}
BAD: dict[str, list[Any]] = {
    "partition": ["", "a b", "-p", "a,", "a;b", "é", "a\n", 5],
    "account": ["a,b", "$USER", "a\n#SBATCH --x"],
    "qos": ["a#b", "'a'"],
    "time": [1.5, "1:2:3:4", "2d", "1-", "-1", "1:2:3\n", "٣"],
    "gres": ["gpu:", "gpu h100", "gpu:8;x", ":8"],
    "mem": ["64 G", "64GB", "-1", "G", True],
    "constraint": ["-a", "a b", "a;b", "a$b", "a`b", "a#b", ""],
    "reservation": ["a b"],
    "nodelist": ["/etc/passwd", "n[1-", "n[a-b]", "n1 n2", "n1,,n2"],
    "exclude": ["-n1"],
    "dependency": ["123", "afterok", "afterok:", "afterok:a", "afterok:1?afterok:2,afterok:3", "afterok:1,", "later:1"],
    "array": ["0-", "a", "0-15:0", "0-15%0", "1 2", "[0-3]"],
    "mail_user": ["a b", "-a", "a;b@c"],
    "comment": ["", "a\nb", "a\x00b", "a\x85b", "a\u2028b", "a\x7fb", "a\x1b[1m", "a\ud800"],
    "activate": ["", "a\nb"],
    "template": ["", "a\rb"],
    "container": ["-x", "a b", "a$b"],
    "container_mounts": [["-v"], ["/a,/b"], ["/a:/b:ro:x"]],
    "modules": ["gcc", ["-gcc"], ["gcc;x"], ["a b"]],
    "extra": [
        "--x",
        ["x"],
        ["-p x"],
        ["--x=a\n#SBATCH --y"],
        ["--X"],
        ["--x="],
        ["--parsable"],
        ["--wrap=x"],
        ["--help"],
    ],
    "mail_type": [["SOMETIMES"], "END"],
    "signal_seconds": [0, 65536],
    "cpus_per_task": [0, "many"],
    "container_runtime": ["docker"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in GOOD.items() for value in values])
def test_valid_values_are_accepted(key: str, value: Any) -> None:
    signal_seconds = {"signal_seconds": 30} if key == "time" else {}
    found = getattr(on_cpus(**{key: value}, **signal_seconds).slurm, key)
    assert found == (str(value) if key in ("mem", "array") else value)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_invalid_values_are_rejected_with_their_key(key: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"the job: slurm\.{key}(\.0)?: ") as caught:
        on_cpus(**{key: value})
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("option", sorted(SET_ELSEWHERE))
def test_extra_cannot_repeat_an_option_that_has_a_key(option: str) -> None:
    """Not even abbreviated: sbatch accepts the first letters of an option."""
    for given_as in (f"--{option}=1", f"--{option}", f"--{option[: max(4, len(option) - 1)]}=1"):
        with pytest.raises(RequestError, match=r"what is set by|not of the sbatch command"):
            on_cpus(extra=[given_as])


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({}, "cluster.gpus_per_node: auto, but Slurm gives a job only"),
        ({"slurm": {"gres": "lscratch:1"}}, "cluster.gpus_per_node: auto, but Slurm gives a job only"),
        ({"cluster": {"gpus_per_node": 4}, "slurm": {"gres": "gpu:h100:8"}}, "4, but slurm.gres requests 8"),
        ({"cluster": {"gpus_per_node": 0}, "slurm": {"gres": "gpu"}}, "0, but slurm.gres requests 1"),
        ({"cluster": {"gpus_per_node": 0, "address": "head:6379"}}, "cluster.address: head:6379"),
        ({"cluster": {"gpus_per_node": 8}, "slurm": {"cpus_per_task": 4}}, "4 CPUs for 8 ranks per node"),
        (
            {"cluster": {"gpus_per_node": 0, "processes_per_node": 2}, "slurm": {"cpus_per_task": 1}},
            "1 CPUs for 2 ranks",
        ),
        ({"cluster": {"gpus_per_node": 0}, "output_dir": "/a\\b"}, "output_dir: /a\\b contains a backslash"),
        ({"cluster": {"gpus_per_node": 0}, "output_dir": "/a\u2028b"}, "contains a line break"),
    ],
)
def test_contradictions_are_reported(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        request_of(job_of(**sections))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("slurm", "says"),
    [
        ({"time": "5"}, "signal_seconds is 300, but the time limit 5 is 300 seconds"),
        ({"array_key": "train.seed"}, "array is not set"),
        ({"container_mounts": ["/x"]}, "container is not"),
        ({"max_jobs": 3}, "max_jobs is 3, but resubmit is not set"),
    ],
)
def test_keys_that_depend_on_each_other(slurm: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        on_cpus(**slurm)
    on_cpus(time="5", signal_seconds=299)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("2-12:30:05", 217805),
        ("0", None),
        ("INFINITE", None),
    ],
)
def test_times_in_seconds(time: str, seconds: int | None) -> None:
    assert time_seconds(time) == seconds


@pytest.mark.parametrize(
    ("gres", "gpus"), [("gpu", 1), ("gpu:8", 8), ("gpu:a100", 1), ("gpu:a:2,gpu:b:3,fs:9", 5), ("gpumem:9", None)]
)
def test_gpus_in_generic_resources(gres: str, gpus: int | None) -> None:
    assert gres_gpus(gres) == gpus


def parses(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


def words_of(line: str) -> list[str]:
    return shlex.split(line.removeprefix("#SBATCH "), comments=True)


PUNCTUATION = "ab1 -_=,:;#$(){}[]<>|&*?!~^%@+./\\'\"`é文\U0001f600\xa0"
PLAIN = st.text(st.sampled_from(PUNCTUATION), max_size=12)
ANYTHING = st.text(st.sampled_from(PUNCTUATION + "\t\n\r\x00\x0b\x1b\x7f\x85\u2028") | st.characters(), max_size=12)
TEXT_KEYS = sorted(set(GOOD) - {"cpus_per_task", "signal_seconds"})
LISTS = ("modules", "extra", "mail_type")
KEYS_SCHEMA = Job.model_json_schema()["$defs"]["SlurmSection"]["properties"]


def patterns(schema: Any) -> list[str]:
    """The patterns in the schema of a key, at any depth."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    own = [schema["pattern"]] if isinstance(schema, dict) and "pattern" in schema else []
    return own + [pattern for value in inner for pattern in patterns(value)]


def texts_for(key: str) -> st.SearchStrategy[tuple[str, str]]:
    """The key with arbitrary text, or with text that matches its pattern."""
    own = [st.from_regex(f"\\A{pattern[1:-1]}\\Z") for pattern in patterns(KEYS_SCHEMA[key]) if "[^" not in pattern]
    options = [PLAIN.map("--licenses=".__add__), ANYTHING.map("--licenses=".__add__)] if key == "extra" else []
    return st.tuples(st.just(key), st.one_of(ANYTHING, PLAIN, *own, *own, *own, *options))


@settings(max_examples=200, deadline=None)
@given(st.one_of(map(texts_for, TEXT_KEYS)))
def test_no_value_becomes_another_line_or_word_of_the_script(key_and_text: tuple[str, str]) -> None:
    """Any text is either rejected, or becomes one word of one line in a script that bash can parse."""
    key, value = key_and_text
    more = {"time": {"signal_seconds": 1}}.get(key, {})
    try:
        job = on_cpus(**{key: [value] if key in LISTS else value}, **more)
        made = request_of(job)
    except RequestError:
        return
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", value)
    options = sbatch_options(job, HERE.cwd / "runs")
    lines = {"modules": 1, "activate": 1}.get(key, len(options) - len(sbatch_options(on_cpus(), HERE.cwd / "runs")))
    assert made.script.count("\n") == PLAIN_SCRIPT.count("\n") + lines
    assert len(made.script.splitlines()) == made.script.count("\n")
    directives = [line for line in made.script.splitlines() if line.startswith("#SBATCH ")][:-1]
    assert [words_of(line) for line in directives] == [[option.argument()] for option in options]
    assert parses(made.script)


@settings(max_examples=25, deadline=None)
@given(st.lists(PLAIN, max_size=4), PLAIN, PLAIN.filter(lambda name: name not in ("", ".", "..")), PLAIN.filter(bool))
def test_arguments_arrive_unchanged(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str], name: str, activate: str, image: str
) -> None:
    """bash runs the script with a fake srun that records its arguments."""
    folder = tmp_path_factory.mktemp("programs")
    with_programs(folder)
    file = f"/jobs/{name}.yaml"
    script = folder / "envs" / activate.replace("/", "_").replace("~", "_") / "bin/activate"
    script.parent.mkdir(parents=True)
    script.write_text("export ACTIVATED=yes\n")
    # Folders with a comma or colon cannot be mounted; another test covers that.
    contained = image[0] in "ab1" and not set(",:") & set(str(Path(file).parent))
    mounted = {"container": "/x.sqsh", "container_mounts": ["/data", "/jobs"]} if contained else {}
    made = request_of(on_cpus(activate=str(script.parent.parent), **mounted), *overrides, file=file)
    done = run_script(folder, made.script)
    assert done.returncode == 0, done.stderr
    assert called(folder / "node") == ["node", str(Path(file)), *overrides]
    here = f"{HERE.cwd}:{HERE.cwd}"
    container = [
        "--container-image=/x.sqsh",
        f"--container-workdir={HERE.cwd}",
        f"--container-mounts={here},/data,/jobs",
    ]
    given = called(folder / "srun")
    place = given.index("--wait=60") + 1
    after = given[place:]
    assert "--export=ALL" in given[:place]
    assert after == [*(container if mounted else []), "launcher", "node", str(Path(file)), *overrides]


def mounts_of(file: str, output_dir: str = "runs", mounts: tuple[str, ...] = (), runtime: str = "pyxis") -> str:
    """The mounts for a job file; the user's mounts are last."""
    container = {"container": "/x.sqsh", "container_mounts": list(mounts), "container_runtime": runtime}
    job = job_of(cluster={"gpus_per_node": 0}, output_dir=output_dir, slurm=container)
    line = next(line for line in request_of(job, file=file).script.splitlines() if line.startswith("stop()"))
    words = shlex.split(line)
    if runtime == "apptainer":
        assert words[words.index("--pwd") + 1] == "/home/me/project"
        return words[words.index("--bind") + 1]
    assert "--container-workdir=/home/me/project" in words
    return next(word for word in words if word.startswith("--container-mounts=")).removeprefix("--container-mounts=")


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_container_mounts_each_folder_of_the_job_once(runtime: str) -> None:
    project = "/home/me/project"
    assert mounts_of("job.yaml", runtime=runtime) == f"{project}:{project}"
    apart = mounts_of("../jobs/job.yaml", output_dir="/scratch/runs", runtime=runtime)
    assert apart == f"/home/me/jobs:/home/me/jobs,{project}:{project},/scratch/runs:/scratch/runs"
    assert mounts_of("job.yaml", "/scratch/runs", ("/scratch", "/home/me:/mine:ro"), runtime) == (
        f"{project}:{project},/scratch,/home/me:/mine:ro"
    )
    assert mounts_of("job.yaml", mounts=("/other:/home/me",), runtime=runtime) == "/other:/home/me"


@pytest.mark.parametrize(("file", "says"), [("/a,b/job.yaml", "a comma or a colon"), ("/job.yaml", "the root of the")])
def test_a_folder_that_cannot_be_mounted_is_rejected(file: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        mounts_of(file)


@pytest.mark.parametrize("character", list("\n\r\t\x00\x0b\x1b\x7f\x85\u2028\udcff"), ids=ascii)
def test_arguments_with_control_characters_are_rejected(character: str) -> None:
    for words in ({"file": f"a{character}.yaml"}, {"overrides": f"name=a{character}"}):
        with pytest.raises(
            RequestError, match="contains a line break, a control character or bytes that are not UTF-8"
        ):
            request_of(on_cpus(), *filter(None, [words.get("overrides")]), file=words.get("file", "job.yaml"))


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="no sbatch here: apt-get install slurm-client")
@settings(max_examples=60, deadline=None)
@given(PLAIN, PLAIN)
def test_sbatch_understands_the_quoting(tmp_path_factory: pytest.TempPathFactory, comment: str, folder: str) -> None:
    """The real sbatch prints with --verbose what it parsed, before it fails to reach a controller."""
    assume(comment and "\\" not in folder)
    made = request_of(job_of(cluster={"gpus_per_node": 0}, output_dir=f"/{folder}", slurm={"comment": comment}))
    conf = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    conf.write_text(
        "ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nMessageTimeout=1\nNodeName=n CPUs=1\n"
        "PartitionName=p Nodes=ALL Default=YES\n"
    )
    environment = {"PATH": os.environ["PATH"], "SLURM_CONF": str(conf)}
    done = subprocess.run(
        ["sbatch", "--verbose"],
        input=made.script,
        text=True,
        capture_output=True,
        env=environment,
        timeout=TIME_LIMIT_SECONDS,
    )
    understood = dict(re.findall(r"^sbatch: ([a-z-]+) +: (.*)$", done.stderr, re.MULTILINE))
    log = str(Path(f"/{folder}")).replace("%", "%%") + "/tiny-slurm-%j.log"
    assert (understood["comment"], understood["output"]) == (comment, log)
    assert understood["nodes"] == "1"


FAKE_SRUN = """\
#!/bin/bash
# Skips srun's options, and executes the command.
printf '%s\\0' "$@" >{folder}/srun
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
FAKE_LAUNCHER = """\
#!/bin/bash
if [[ $2 == --stop ]]; then
    printf '%s\\0' "$@" >{folder}/stop.new && mv {folder}/stop.new {folder}/stop
    exit 1  # a failing stop must not change the job's exit status
fi
printf '%s\\0' "$@" >{folder}/node.new && mv {folder}/node.new {folder}/node
{body}
"""
UNTIL_STOPPED = "for _ in {1..9000}; do [[ -e $FOLDER/stop ]] && exit 7; sleep 0.05; done; exit 9"


def with_programs(folder: Path, body: str = "exit 0") -> None:
    """A fake srun and launcher in `folder` that record their arguments."""
    for name, text in (("srun", FAKE_SRUN), ("launcher", FAKE_LAUNCHER)):
        (folder / "bin").mkdir(exist_ok=True)
        program = folder / "bin" / name
        program.write_text(text.format(folder=shlex.quote(str(folder)), body=body))
        program.chmod(0o755)


def environment_of(folder: Path, **more: str) -> dict[str, str]:
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "3"}
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FOLDER": str(folder), **slurm, **more}


def run_script(folder: Path, script: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-s"],
        input=script,
        text=True,
        capture_output=True,
        env=environment_of(folder, **more),
        timeout=TIME_LIMIT_SECONDS,
    )


def called(record: Path) -> list[str]:
    return record.read_text().split("\0")[:-1]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


@pytest.fixture(params=["finetune.sbatch, copied", "submit.sbatch.j2, rendered"])
def batch_job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    """A batch script as Slurm runs it, with its arguments."""
    script = tmp_path / "a copy.sbatch"
    if request.param.startswith("finetune"):
        shutil.copy(FINETUNE, script)
        return ["bash", str(script), "my job.yaml", "model.revision=$(x); `y`"]
    script.write_text(request_of(on_cpus(), "model.revision=$(x); `y`", file="my job.yaml").script)
    return ["bash", str(script)]


def job_words(batch_job: list[str]) -> list[str]:
    file = "my job.yaml" if batch_job[2:] else str(HERE.cwd / "my job.yaml")
    return [file, "model.revision=$(x); `y`"]


@pytest.mark.parametrize("status", [0, 1, 143])
def test_the_batch_job_has_the_exit_status_of_srun(batch_job: list[str], tmp_path: Path, status: int) -> None:
    with_programs(tmp_path, f"exit {status}")
    done = subprocess.run(batch_job, env=environment_of(tmp_path, SLURM_CPUS_PER_TASK="5"), timeout=TIME_LIMIT_SECONDS)
    assert done.returncode == status
    assert called(tmp_path / "node") == ["node", *job_words(batch_job)]
    options = called(tmp_path / "srun")
    assert {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=5"} <= set(options[: options.index("launcher")])


@pytest.mark.parametrize(("finished", "status"), [(0, 0), (1, 137)])
@pytest.mark.parametrize("copied", [False, True])
def test_a_finished_run_that_lost_a_task_ends_with_status_0(
    tmp_path: Path, finished: int, status: int, copied: bool
) -> None:
    script = tmp_path / "script"
    if copied:
        changed = "lost_node=(--no-kill --wait=0)"
        assert f": {changed}\n" in FINETUNE.read_text()
        script.write_text(FINETUNE.read_text().replace("lost_node=(--wait=60)", changed))
    else:
        script.write_text(request_of(job_of(cluster={"nodes": 3, "min_nodes": 2, "gpus_per_node": 0})).script)
    with_programs(tmp_path, f'[ "$2" = --finished ] && exit {finished}; exit 137')
    done = subprocess.run(["bash", str(script)], env=environment_of(tmp_path), timeout=TIME_LIMIT_SECONDS)
    assert done.returncode == status
    assert {"--no-kill", "--wait=0"} <= set(called(tmp_path / "srun"))


def test_usr1_stops_the_run_and_waits_for_its_end(batch_job: list[str], tmp_path: Path) -> None:
    with_programs(tmp_path, UNTIL_STOPPED)
    process = subprocess.Popen(batch_job, env=environment_of(tmp_path), text=True)
    wait_for(tmp_path / "node", process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(TIME_LIMIT_SECONDS) == 7
    assert called(tmp_path / "stop") == ["node", "--stop", *job_words(batch_job)]


def test_term_waits_for_the_end_of_the_run(batch_job: list[str], tmp_path: Path) -> None:
    with_programs(tmp_path, UNTIL_STOPPED)
    process = subprocess.Popen(batch_job, env=environment_of(tmp_path), text=True)
    wait_for(tmp_path / "node", process)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.poll() is None
    (tmp_path / "stop").touch()
    assert process.wait(TIME_LIMIT_SECONDS) == 7


def test_the_script_to_copy_is_valid() -> None:
    text = FINETUNE.read_text()
    assert parses(text)
    lines = text.splitlines()
    for words in ("--signal=B:USR1@300", "--requeue", "--open-mode=append", "--ntasks-per-node=1"):
        assert f"#SBATCH {words}" in lines
    for words in ("partition", "account", "gres", "mem", "time"):
        assert re.search(rf"^##?SBATCH --{words}=", text, re.MULTILINE), words
    assert len(lines) <= 45


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here: apt-get install shellcheck")
@pytest.mark.parametrize("script", [FINETUNE, *sorted(GOLDEN.glob("*.sbatch"))], ids=lambda path: path.name)
def test_shellcheck_has_no_warning(script: Path) -> None:
    # Its remarks below a warning are about quotes that are meant to be literal, and a file that is not here.
    command = ["shellcheck", "--shell=bash", "--severity=warning", str(script)]
    checked = subprocess.run(command, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout


def test_states_of_slurm_map_to_job_status() -> None:
    assert set(STATES.values()) == {"waiting", "running", "finished", "failed", "stopped"}
    assert job_status("CANCELLED by 1000") == job_status("CANCELLED+") == "stopped"
    assert (job_status("PENDING"), job_status("NODE_FAIL"), job_status("NEW_ONE"), job_status("")) == (
        "waiting",
        "failed",
        "unknown",
        "unknown",
    )


@pytest.mark.parametrize(
    ("message", "in_job", "key"),
    [
        ("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job …", True, "slurm.partition"),
        ("Batch job submission failed: Invalid account or account/partition combination", True, "slurm.account"),
        ("Batch job submission failed: Requested time limit is invalid (missing or exceeds)", True, "slurm.time"),
        ("Batch job submission failed: Job dependency problem", True, "slurm.dependency"),
        ("Batch job submission failed: Requested node configuration is not available", True, None),
        ("Batch job submission failed: Something new", True, None),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", False, None),
        ("sbatch: fatal: Could not establish a configuration source", False, None),
    ],
)
def test_messages_of_sbatch_lead_to_the_key(message: str, in_job: bool, key: str | None) -> None:
    found = explain_sbatch_error(message)
    assert (found.in_job, found.key) == (in_job, key)


JOB = """\
model: {name_or_path: model}
data: {train: data/train.jsonl}
cluster: {gpus_per_node: 0, processes_per_node: 4, nodes: 2}
slurm:
  partition: debug
  time: "30"
"""
FAKE_SBATCH = """\
#!/bin/bash
cat >"$FOLDER/script"; env >"$FOLDER/environment"; printf '%s\\0' "$@" >"$FOLDER/sbatch"
{body}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path, JOB)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "RAY_"))]:
        monkeypatch.delenv(name)
    return tmp_path


def submit_with(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, *arguments: str) -> Ended:
    """Runs `launcher submit` with a fake sbatch; tests/cluster has the real one."""
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin/sbatch"
    program.write_text(FAKE_SBATCH.format(body=body))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("FOLDER", str(folder))
    return command("submit", "job.yaml", *arguments)


def test_a_dry_run_prints_what_would_be_submitted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("train.max_steps=3", "slurm.array_key=train.seed", "--array", "0-3%2", "--dependency", "afterok:1")
    before = set(folder.rglob("*"))
    shown = command("submit", "job.yaml", *words, "--dry-run")
    assert shown.status == 0
    assert set(folder.rglob("*")) == before
    assert "sbatch --parsable" in shown.err
    for line in ("#SBATCH --array=0-3%2", "#SBATCH --dependency=afterok:1", "#SBATCH --nodes=2"):
        assert line in shown.out.splitlines()

    (line,) = (line for line in shown.out.splitlines() if line.startswith("job=("))
    file, *overrides = shlex.split(line.removeprefix("job=(").removesuffix(")"))
    assert load_job(Path(file), *overrides, "train.seed=2").job.slurm.array_key == "train.seed"

    monkeypatch.setenv("SLURM_JOB_ID", "17")
    ended = submit_with(folder, monkeypatch, "echo '91;far'", *words, "--parsable")
    assert (ended.status, ended.out) == (0, "91;far\n")
    assert (folder / "script").read_text() == shown.out
    assert called(folder / "sbatch") == ["--parsable"]
    assert "SLURM_JOB_ID" not in (folder / "environment").read_text()
    assert (folder / "runs").is_dir()


def test_a_dry_run_imports_no_heavy_packages(folder: Path) -> None:
    body = "sys.argv = ['launcher', 'submit', 'job.yaml', '--dry-run']; from launcher.cli import main; main()"
    assert fresh(body, folder) == command("submit", "job.yaml", "--dry-run").out


def test_the_printed_summary_of_a_submission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bin").mkdir()
    (folder / "bin/squeue").write_text("#!/bin/sh\necho 'PENDING|Dependency'\n")
    (folder / "bin/squeue").chmod(0o755)
    ended = submit_with(folder, monkeypatch, "echo 'sbatch: Mind the quota' >&2; echo 91")
    assert ended.status == 0
    for words in ("job 91: waiting (Dependency)", f"{folder}/runs/job-slurm-91.log", f"logs --follow {folder}/runs/"):
        assert words in ended.out
    assert "note: sbatch: Mind the quota" in ended.err
    assert f"{folder}/runs/job-slurm-91_INDEX.log" in submit_with(folder, monkeypatch, "echo 91", "--array=0-1").out


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("echo 'sbatch: error: invalid partition specified: debug' >&2; exit 1", 2, "job.yaml:5: slurm.partition: "),
        ("echo 'sbatch: error: something new' >&2; exit 1", 2, "sbatch: error: something new"),
        ("exit 3", 2, "sbatch ended with status 3 and printed nothing"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", 1, "Slurm did not answer: Unable to contact"),
        ("true", 1, "sbatch accepted the job but printed no job id, only ''"),
        ("echo Submitted batch job 7", 1, "only 'Submitted batch job 7'"),
    ],
)
def test_errors_of_sbatch_are_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, status: int, says: str
) -> None:
    ended = submit_with(folder, monkeypatch, body)
    assert ended.status == status
    assert says in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("slurm.partition=a b",), "command line: slurm.partition: must be names of letters"),
        (("--array", "0-"), "command line: slurm.array: must be indices"),
        (("--dependency", "after\n"), "command line: slurm.dependency: must be type:job"),
        (("slurm.time=24:00:00:00",), "command line: slurm.time: must be a Slurm time"),
        (("cluster.gpus_per_node=auto",), "command line: cluster.gpus_per_node: auto, but Slurm gives"),
        (("model.name_or_path=./nowhere",), "nowhere"),
        (("name=a/b",), "name: must be letters"),
        (("cluster.env.A=a\n",), "contains a line break"),
        (("--address", "http://h:8265", "--array", "0-1"), "--array is for slurm, but the job is submitted to ray"),
        (("--to", "slurm", "--address", "http://h:8265"), "--address is for ray, but the job is submitted to slurm"),
        (("--to", "pbs"), "'pbs' is not one of"),
    ],
)
def test_invalid_input_is_reported_and_nothing_is_submitted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    ended = submit_with(folder, monkeypatch, "echo 1", *arguments)
    assert ended.status == 2
    assert says in ended.err
    assert not (folder / "sbatch").exists()
    assert not (folder / "runs").exists()


def test_the_target_of_a_submission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "job.yaml").write_text(JOB.split("slurm:")[0])
    ended = command("submit", "job.yaml", "--dry-run")
    assert (ended.status, "Slurm or Ray must be chosen" in ended.err) == (2, True)
    assert command("submit", "job.yaml", "--dry-run", "--to", "slurm").status == 0
    assert command("submit", "job.yaml", "--dry-run", "--array", "0-1").status == 0
    monkeypatch.setenv("PATH", str(folder))
    ended = command("submit", "job.yaml", "--to", "slurm")
    assert (ended.status, "sbatch is not installed here" in ended.err) == (2, True)


def test_init_copies_the_templates(folder: Path) -> None:
    assert command("init", "new").status == 0
    for name in (SHIPPED, FINETUNE.name):
        assert (folder / "new/slurm" / name).read_bytes() == (shipped_folder("slurm") / name).read_bytes()
    own = "slurm.template=new/slurm/submit.sbatch.j2"
    assert command("submit", "job.yaml", own, "--dry-run").out.replace(f" {own}", "") == (
        command("submit", "job.yaml", "--dry-run").out
    )


SCRIPT_JOB = """\
train: {max_steps: 10, train_micro_batch_size_per_gpu: 2}
schedule: {peak_lr: 0.05}
deepspeed: zero2
cluster: {gpus_per_node: 0, processes_per_node: 4, nodes: 2}
slurm: {partition: debug}
"""


@pytest.mark.parametrize("before", [("--dry-run", "job.yaml"), ("job.yaml", "--dry-run")])
def test_a_users_script_is_submitted(folder: Path, before: tuple[str, ...]) -> None:
    """Its arguments are passed on unchanged."""
    (folder / "job.yaml").write_text(SCRIPT_JOB)
    (folder / "my train.py").write_text("")
    ended = command("submit", *before, "train.seed=3", "--", "my train.py", "--array", "0", "--", "a=b", "--dry-run")
    assert ended.status == 0, ended.err
    (line,) = (line for line in ended.out.splitlines() if line.startswith("job=("))
    words = shlex.split(line.removeprefix("job=(").removesuffix(")"))
    own = ["--", "my train.py", "--array", "0", "--", "a=b", "--dry-run"]
    assert words == [str(folder / "job.yaml"), "train.seed=3", *own]
    assert "#SBATCH --nodes=2" in ended.out and "--array" not in ended.out.split("job=(")[0]
    assert parses(ended.out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "To run your own script, add a section `script` instead"),
        (("--",), "a script is missing after --"),
        (("--", "none.py"), "the script none.py does not exist"),
        (("--", "--lr", "1"), "the command must start with a Python script or -m MODULE, found --lr"),
        (("--", "train.py", "a\nb"), "contains a line break"),
        (
            ("--array=0-1", "slurm.array_key=train.seed", "--", "train.py"),
            "the index would follow the script's arguments",
        ),
        (("slurm.resubmit=true", "--", "train.py"), "slurm.resubmit: this does not work with a script"),
        (("deepspeed=auto", "--", "train.py"), "deepspeed: auto chooses a preset by the memory"),
        (("--resume", "--", "train.py"), "--resume takes a run directory and overrides, no script"),
        (("--to", "ray", "--address=http://h:8265", "--", "train.py"), "launcher exec JOB.YAML -- SCRIPT"),
    ],
)
def test_a_script_that_cannot_be_submitted_is_reported(folder: Path, arguments: tuple[str, ...], says: str) -> None:
    (folder / "job.yaml").write_text(SCRIPT_JOB)
    (folder / "train.py").write_text("")
    ended = command("submit", "job.yaml", "--dry-run", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert says in ended.err
