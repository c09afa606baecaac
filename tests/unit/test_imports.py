"""Import rules between packages, for commands, and for heavy packages."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main

import launcher
from launcher import cli
from tests.time_limit import TIME_LIMIT_SECONDS

PACKAGE = Path(launcher.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
CLI = PACKAGE / "cli"
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "ray", "peft")

HOMES = {
    "torch": (
        "worker/",
        "chunked_loss.py",
        "document_attention.py",
        "prepare/model_flops.py",
        "prepare/packing_probe.py",
        "prepare/model_facts.py",
        "prepare/model_sizes.py",
        "prepare/small_model_probe.py",
        "ds_config/build_catalogue.py",
    ),
    "deepspeed": ("worker/", "ds_config/build_catalogue.py"),
    "transformers": (
        "worker/",
        "document_attention.py",
        "prepare/model_facts.py",
        "prepare/packing_probe.py",
        "prepare/tokenise.py",
    ),
    "datasets": ("worker/", "prepare/hub_rows.py"),
    "pyarrow": ("prepare/arrow_rows.py", "prepare/text_files.py"),
    "peft": ("trainable.py", "worker/"),
    "liger_kernel": ("prepare/model_facts.py",),
    "ray": ("fleet/", "ray_jobs.py"),
    "fsspec": ("runs/remote.py",),
    "subprocess": (
        "slurm/",
        "runs/detach.py",
        "runs/export.py",
        "runs/planning.py",
        "fleet/forks.py",
        "prepare/part_processes.py",
        "fleet/process.py",
        "prepare/__init__.py",
        "prepare/universal.py",
        "ds_config/catalogue.py",
    ),
}
"""The files that may import a heavy package, or the package that starts processes."""


def imported(module: Path) -> set[str]:
    """The packages that a module imports, at the top or in a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
            found.add(str(node.module).split(".")[0])
    return found


def imported_modules(module: Path) -> set[str]:
    """The full names that a module imports; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def place(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def test_the_import_contracts_are_kept() -> None:
    """The contracts of pyproject.toml: which package may import which."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


def test_heavy_packages_are_imported_only_in_their_files() -> None:
    imports = {place(module): imported(module) for module in MODULES}
    strays = [
        f"{file} imports {name}"
        for file, names in imports.items()
        for name in names & set(HOMES)
        if not file.startswith(HOMES[name])
    ]
    assert strays == []
    assert set(HOMES) == {name for names in imports.values() for name in names & set(HOMES)}


def test_command_files_are_short() -> None:
    lengths = {module.name: len(module.read_text().splitlines()) for module in CLI.glob("*.py")}
    assert len(lengths) > 20
    assert {name: length for name, length in lengths.items() if length >= 100} == {}


def test_no_command_imports_another_command() -> None:
    commands = {command.callback.__module__ for command in typer.main.get_command(cli.app).commands.values()}
    assert {"launcher.cli.run", "launcher.cli.exec", "launcher.cli.lr"} <= commands
    assert commands <= {f"launcher.cli.{module.stem}" for module in CLI.glob("*.py")}
    imports = {name: imported_modules(CLI / f"{name.rpartition('.')[2]}.py") & commands for name in commands}
    assert {name: found for name, found in imports.items() if found} == {}


def test_imports_of_modules_are_found(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("import launcher.cli.run\n\ndef f():\n    from launcher.cli import lr\n")
    found = imported_modules(tmp_path / "module.py")
    assert {"launcher.cli.run", "launcher.cli.lr"} <= found
    assert "launcher.cli.plan" not in found


def test_plans_and_schedules_do_no_input_or_output() -> None:
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
    """The output of `body` in a new interpreter; fails if that imports a heavy package."""
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
def test_commands_that_do_not_train_import_no_heavy_package(
    arguments: list[str], shown: tuple[str, ...], tmp_path: Path
) -> None:
    body = f"sys.argv = ['launcher', *{arguments}]; from launcher.cli import main; main()"
    printed = fresh(body, tmp_path)
    assert all(words in printed for words in shown)


def test_modules_that_plan_and_watch_import_no_heavy_package(tmp_path: Path) -> None:
    paths = (
        "job",
        "plan",
        "files.py",
        "schedule",
        "ds_config",
        "watch",
        "slurm/submit",
        "prepare",
        "run_dir.py",
        "runs/planning.py",
        "token_store.py",
    )
    light = [m for m in MODULES if place(m).startswith(paths) and m.stem not in ("__main__", "build_catalogue")]
    names = [".".join(("launcher", *m.relative_to(PACKAGE).with_suffix("").parts)) for m in light]
    assert {"launcher.plan.resolve", "launcher.schedule.curve", "launcher.files", "launcher.run_dir"} <= set(names)
    body = f"import importlib; found = [importlib.import_module(name) for name in {names}]; print(len(found))"
    assert fresh(body, tmp_path) == f"{len(names)}\n"


def test_the_picture_in_contributing_is_that_of_the_contracts() -> None:
    """Each layer of the contract is one line of the picture, in the same order, and every package is in it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    picture = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1].splitlines()
    known = {module.stem if module.suffix else module.name for module in PACKAGE.iterdir()}
    drawn = [words for line in picture if (words := names_in(line, known))]
    assert drawn == [re.split(r"\W+", layer) for layer in layers if layer != "__main__"]


def names_in(line: str, known: set[str]) -> list[str]:
    """The packages and modules at the beginning of a line of the picture."""
    found = re.match(r"\w+(?:  \w+)*(?=   |$)", line)
    words = found[0].split() if found else []
    return words if set(words) <= known else []


def test_a_class_name_means_one_thing_in_the_package() -> None:
    names: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name.lstrip("_"), []).append(place(module))
    assert {name: places for name, places in names.items() if len(places) > 1} == {}
