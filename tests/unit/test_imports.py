"""Which package may import which, and which commands run without a heavy package."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import launcher
from tests.time_limit import TIME_LIMIT_SECONDS

PACKAGE = Path(launcher.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "ray", "peft")

HOMES = {
    "torch": (
        "worker/",
        "prepare/model_facts.py",
        "prepare/model_sizes.py",
        "prepare/probe.py",
        "ds_config/build_catalogue.py",
    ),
    "deepspeed": ("worker/", "ds_config/build_catalogue.py"),
    "transformers": ("worker/", "prepare/model_facts.py", "prepare/tokenise.py"),
    "datasets": ("worker/", "prepare/hub_rows.py"),
    "pyarrow": ("prepare/arrow_rows.py", "prepare/text_files.py"),
    "peft": ("trainable.py", "worker/"),
    "liger_kernel": ("prepare/model_facts.py",),
    "ray": ("fleet/", "ray_jobs.py"),
    "subprocess": (
        "slurm/",
        "runs/export.py",
        "runs/planning.py",
        "fleet/process.py",
        "prepare/__init__.py",
        "prepare/universal.py",
        "ds_config/catalogue.py",
    ),
}
"""The files in which a heavy package, or the one that starts processes, is imported."""


def imported(module: Path) -> set[str]:
    """The packages that a module imports, at its top or in a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
            found.add(str(node.module).split(".")[0])
    return found


def place(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def test_the_import_contracts_hold() -> None:
    """The contracts of pyproject.toml: which package may import which."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


def test_a_heavy_package_is_imported_in_few_files() -> None:
    imports = {place(module): imported(module) for module in MODULES}
    strays = [
        f"{file} imports {name}"
        for file, names in imports.items()
        for name in names & set(HOMES)
        if not file.startswith(HOMES[name])
    ]
    assert strays == []
    assert set(HOMES) == {name for names in imports.values() for name in names & set(HOMES)}


def test_plans_and_schedules_open_and_print_nothing() -> None:
    pure = [module for module in MODULES if place(module).startswith(("plan/", "schedule/"))]
    assert len(pure) > 20
    for module in pure:
        calls = [node.func for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        assert not names & {"open", "print", "input", "exec", "eval"}, place(module)


FRESH = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    {body}
print(json.dumps([sorted(set({heavy}) & set(sys.modules)), out.getvalue()]))
"""


def fresh(body: str, folder: Path) -> str:
    """What `body` prints in a new interpreter that ends without a heavy package."""
    code = FRESH.format(body=body, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    loaded, printed = json.loads(done.stdout)
    assert loaded == []
    return str(printed)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], ("run", "plan", "init", "schema")),
        (["plan", "--help"], ("JOB.YAML", "--json")),
        (["run", "--help"], ("JOB.YAML",)),
        (["submit", "--help"], ("JOB.YAML", "--dry-run")),
        (["--version"], (launcher.__version__,)),
        (["init"], ("wrote my-job.yaml", "wrote ds_configs/zero3.json")),
        (["schema"], ("json-schema.org", "name_or_path")),
        (["status", "--output-dir", "."], ("no runs",)),
        (["logs", "--help"], ("--follow", "--since")),
        (["watch", "--help"], ("RUN",)),
        (["why", "--help"], ("RUN",)),
        (["export", "--help"], ("RUN", "--update")),
    ],
    ids=" ".join,
)
def test_a_command_that_trains_nothing_is_light(arguments: list[str], shown: tuple[str, ...], tmp_path: Path) -> None:
    body = f"sys.argv = ['launcher', *{arguments}]; from launcher.cli import main; main()"
    printed = fresh(body, tmp_path)
    assert all(words in printed for words in shown)


def test_modules_that_plan_and_watch_are_light(tmp_path: Path) -> None:
    rooms = (
        "job",
        "plan",
        "tail.py",
        "schedule",
        "ds_config",
        "watch",
        "slurm/submit",
        "prepare",
        "run_dir.py",
        "runs/planning.py",
        "token_store.py",
    )
    light = [m for m in MODULES if place(m).startswith(rooms) and m.stem not in ("__main__", "build_catalogue")]
    names = [".".join(("launcher", *m.relative_to(PACKAGE).with_suffix("").parts)) for m in light]
    assert {"launcher.plan.resolve", "launcher.schedule.curve", "launcher.tail", "launcher.run_dir"} <= set(names)
    body = f"import importlib; found = [importlib.import_module(name) for name in {names}]; print(len(found))"
    assert fresh(body, tmp_path) == f"{len(names)}\n"
