"""Finds the folders that users copy and edit (ds_configs, slurm, cluster), in a checkout or an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped_folder(name: str) -> Path:
    """The folder `name`: beside the package in a checkout, inside it in a wheel."""
    inside = _PACKAGE / "data" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def preset_names() -> list[str]:
    """The names of the DeepSpeed presets, which a job file may give instead of a path."""
    return sorted(path.stem for path in shipped_folder("ds_configs").glob("*.json"))
