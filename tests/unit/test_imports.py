"""The rules of the house: who may import what, and which commands answer without a heavy package."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher
from tests.patience import PATIENCE_SECONDS

PACKAGE = Path(launcher.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "ray", "peft")

MAY_IMPORT = {
    "errors": set(),
    "aftermath": {"errors"},
    "files": set(),
    "lock": {"files"},
    "manifest": {"files"},
    "run_dir": {"files", "lock", "manifest"},
    "plan_file": {"plan"},
    "saved": {"errors", "manifest", "plan", "plan_file", "run_dir"},
    "exporting": {"errors", "files", "saved"},
    "reporting": {"run_dir", "tail"},
    "token_store": {"files"},
    "secret_names": set(),
    "presets": set(),
    "job": {"errors"},
    "schedule": {"errors"},
    "ds_config": {"errors", "schedule"},
    "plan": {"errors", "job", "schedule", "ds_config"},
    "tail": {"files"},
    "watch": {"aftermath", "errors", "files", "run_dir", "schedule", "plan", "plan_file", "tail"},
    "methods": {"errors", "job"},
    "prepare": {"errors", "files", "job", "plan", "methods", "run_dir", "tail", "token_store"},
    "planning": {"errors", "job", "ds_config", "plan", "prepare", "presets", "secret_names"},
    "worker": {"errors", "exporting", "files", "methods", "plan", "plan_file", "schedule", "run_dir", "token_store"},
    "fleet": {"aftermath", "errors", "files", "plan", "prepare", "run_dir", "secret_names", "tail"},
    "submit": {"errors", "job", "plan", "run_dir", "fleet", "presets", "secret_names"},
}
"""For each room the rooms below it. cli/ stands on all of them but worker/, which runs in processes of its own."""

MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"worker"}
MAY_IMPORT["__main__"] = {"cli"}

HEAVY_PLACES = {
    "torch": (
        "worker/",
        "prepare/model.py",
        "prepare/model_sizes.py",
        "prepare/probe.py",
        "ds_config/build_catalogue.py",
    ),
    "deepspeed": ("worker/", "ds_config/build_catalogue.py"),
    "transformers": ("worker/", "prepare/model.py", "prepare/tokenise.py"),
    "datasets": ("worker/", "prepare/hub_rows.py"),
    "pyarrow": ("prepare/arrow_rows.py", "prepare/text_files.py"),
    "peft": ("methods.py", "worker/"),
    "liger_kernel": ("prepare/model.py",),
    "ray": ("fleet/", "submit/"),
    "subprocess": (
        "submit/",
        "exporting.py",
        "fleet/process.py",
        "fleet/own_ray.py",
        "prepare/__init__.py",
        "prepare/universal.py",
        "planning.py",
        "ds_config/catalogue.py",
    ),
}
"""Where a package may be imported. The catalogue's builder runs as a process of its own."""

PACKAGES = {
    "schedule": set(),
    "files": set(),
    "lock": set(),
    "manifest": set(),
    "run_dir": set(),
    "reporting": set(),
    "errors": set(),
    "aftermath": set(),
    "plan": {"pydantic"},
    "token_store": {"numpy"},
}
"""What is not of the standard library, in rooms that are kept light."""

EFFECTS = {
    *(
        "asyncio",
        "datetime",
        "fileinput",
        "glob",
        "http",
        "io",
        "multiprocessing",
        "os",
        "pathlib",
        "random",
        "secrets",
    ),
    *("select", "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time", "urllib", "uuid"),
}
"""Files, processes, clocks, networks and chance, which schedule/ and plan/ are given and do not look for."""


def imported(module: Path) -> Iterator[str]:
    """The dotted name of everything that a module imports, at its top or in a function."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def place(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def own_rooms(module: Path) -> set[str]:
    """The rooms of the package that a module imports from."""
    parts = [name.split(".") for name in imported(module) if name.split(".")[0] == "launcher"]
    return {part[1] for part in parts if (PACKAGE / part[1]).is_dir() or (PACKAGE / f"{part[1]}.py").is_file()}


def packages(module: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(module)} - {"launcher"}


@pytest.mark.parametrize("module", MODULES, ids=place)
def test_a_room_imports_only_what_stands_below_it(module: Path) -> None:
    if module == PACKAGE / "__init__.py":
        assert packages(module) == set()
        assert own_rooms(module) == {"reporting"}
        return
    assert room(module) in MAY_IMPORT, f"{place(module)} is a new room: say in MAY_IMPORT what stands below it"
    assert own_rooms(module) - {room(module)} <= MAY_IMPORT[room(module)]


@pytest.mark.parametrize("module", MODULES, ids=place)
def test_a_heavy_package_has_its_places(module: Path) -> None:
    for name in packages(module) & set(HEAVY_PLACES):
        assert place(module).startswith(HEAVY_PLACES[name]), f"{place(module)} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in PACKAGES], ids=place)
def test_a_light_room_stays_light(module: Path) -> None:
    assert packages(module) - sys.stdlib_module_names <= PACKAGES[room(module)]


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in ("schedule", "plan")], ids=place)
def test_a_pure_room_touches_nothing(module: Path) -> None:
    assert packages(module) & EFFECTS == set()
    calls = [node.func for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Call)]
    assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"open", "print", "input", "exec", "eval"}


def test_the_rules_see_the_imports_that_are_there() -> None:
    """Had the walk lost its way, every rule above would hold."""
    found = {name for module in MODULES for name in packages(module)}
    assert set(HEAVY) <= found
    assert own_rooms(PACKAGE / "plan/resolve.py") == {"errors", "job", "ds_config", "plan"}
    assert sum(room(module) == "schedule" for module in MODULES) >= 5


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
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_SECONDS
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
        "submit/slurm",
        "prepare",
        "run_dir.py",
        "planning.py",
        "token_store.py",
    )
    light = [m for m in MODULES if place(m).startswith(rooms) and m.stem not in ("__main__", "build_catalogue")]
    names = [".".join(("launcher", *m.relative_to(PACKAGE).with_suffix("").parts)) for m in light]
    assert {"launcher.plan.resolve", "launcher.schedule.curve", "launcher.tail", "launcher.run_dir"} <= set(names)
    body = f"import importlib; found = [importlib.import_module(name) for name in {names}]; print(len(found))"
    assert fresh(body, tmp_path) == f"{len(names)}\n"
