"""Converts checkpoints for another world size with DeepSpeed's converter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import IO

from launcher.errors import FailureCode, LauncherError
from launcher.files import last_lines
from launcher.manifest import MANIFEST, read_manifest, write_manifest
from launcher.token_store import publish_folder


def make_universal(checkpoint: Path, target: Path, log: IO[bytes]) -> None:
    """Converts a checkpoint to DeepSpeed's universal format in `target`, created atomically with a manifest.

    Raises LauncherError.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise LauncherError(f"{checkpoint} has no valid {MANIFEST}", code=FailureCode.CHECKPOINT_DAMAGED)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    command = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal"]
    folders = ["--input_folder", str(checkpoint), "--output_folder", str(temporary)]
    # The conversion runs on the CPU, wherever the ranks run.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    try:
        status = subprocess.run([*command, *folders, "--inject_missing_state"], stdout=log, stderr=log, env=environment)
        if status.returncode != 0:
            tail = "\n".join(last_lines(Path(log.name), 10))
            raise LauncherError(f"{checkpoint} could not be converted for another number of ranks:\n{tail}")
        write_manifest(
            temporary,
            world_size=manifest["world_size"],
            update=manifest["update"],
            samples=manifest["samples"],
            plan_sha256=manifest["plan_sha256"],
        )
        publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
