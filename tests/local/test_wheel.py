"""The built wheel, installed in a new environment and used in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import launcher

pytestmark = pytest.mark.local

REPOSITORY = Path(launcher.__file__).parent.parent
SHIPPED = ("ds_configs", "slurm", "cluster")


def succeed(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    succeed(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, REPOSITORY, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel; a .pth file adds the locked packages."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    python = folder / "bin/python"
    site = Path(
        succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=wheel.parent).strip()
    )
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    succeed(*pip, cwd=wheel.parent)
    # These come last on the path, and Python reads no .pth files in them.
    installed = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (site / "locked.pth").write_text("\n".join([*installed, ""]))
    return folder / "bin"


@pytest.mark.parametrize("folder", SHIPPED)
def test_the_wheel_carries_what_users_copy(wheel: Path, folder: str) -> None:
    prefix = f"launcher/data/{folder}/"
    with zipfile.ZipFile(wheel) as archive:
        carried = {
            name.removeprefix(prefix): archive.read(name) for name in archive.namelist() if name.startswith(prefix)
        }
    here = REPOSITORY / folder
    assert carried, f"{folder}/ holds nothing"
    assert carried == {str(file.relative_to(here)): file.read_bytes() for file in here.rglob("*") if file.is_file()}


def test_the_wheel_carries_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "launcher").rglob("*.py")}
    assert modules <= names
    assert {"launcher/schedule/recipes.csv", "launcher/schedule/lora_sweep.csv"} <= names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"launcher", "ray_deepspeed_launcher"}


def test_init_and_plan_in_an_empty_folder(programs: Path, tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    program = programs / "launcher"
    where = succeed(programs / "python", "-c", "import launcher; print(launcher.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(programs.parent)
    assert succeed(program, "--version", cwd=tmp_path).strip() == f"launcher {launcher.__version__}"

    written = succeed(program, "init", "--name", "mine", "--model", tiny_model, "--data", chats, cwd=tmp_path)
    presets = sorted(path.name for path in (REPOSITORY / "ds_configs").glob("*.json"))
    assert sorted(path.name for path in (tmp_path / "ds_configs").glob("*.json")) == presets
    assert all(f"wrote ds_configs/{name}" in written for name in presets)
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["model"]["name_or_path"] == str(tiny_model)

    small = ("data.max_length=64", "data.eval=0.2", "train.train_batch_size=8")
    shown = succeed(program, "plan", "mine.yaml", *small, cwd=tmp_path)
    assert "llama" in shown
    assert "DeepSpeed JSON" in shown
    preset = succeed(program, "plan", "mine.yaml", *small, "deepspeed=zero3", cwd=tmp_path)
    assert "ZeRO-3" in preset


def test_a_second_init_overwrites_nothing(programs: Path, tmp_path: Path) -> None:
    succeed(programs / "launcher", "init", cwd=tmp_path)
    (tmp_path / "ds_configs/zero2.json").write_text("{}  # mine")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = subprocess.run([str(programs / "launcher"), "init"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2
    assert "are not overwritten" in again.stderr
    assert "zero2.json" in again.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
