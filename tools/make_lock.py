"""Writes requirements.lock: every package that a run needs, with the hashes of its files, for Linux on x86-64 and
Python 3.11, without a GPU. It follows constraints.txt; `pip install uv` brings what resolves it.

python tools/make_lock.py

To install what it says:
pip install --no-deps --require-hashes -r requirements.lock --extra-index-url https://download.pytorch.org/whl/cpu
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from torch_index import CPU_INDEX

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = ("--python-version", "3.11.0", "--python-platform", "x86_64-manylinux_2_28")
ABOUT = f"""\
# Made by tools/make_lock.py; do not edit. For Linux on x86-64, Python 3.11, no GPU:
# {__doc__.strip().splitlines()[-1]}
"""


def compiled(source: Path, *options: str) -> str:
    """Packages with their hashes, one below the other."""
    command = [sys.executable, "-m", "uv", "pip", "compile", str(source), *PLATFORM, "--generate-hashes", "--quiet"]
    command += ["--no-header", "--no-annotate", *options]
    if "UV_FIND_LINKS" not in os.environ:   # a folder that has PyTorch's build
        command += ["--extra-index-url", CPU_INDEX, "--index-strategy", "unsafe-best-match"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def make_lock() -> str:
    constraints = (ROOT / "constraints.txt").read_text()
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"   # of the two builds with one version, that without CUDA
        pins.write_text(re.sub(r"(?m)^(torch==[\d.]+)$", r"\1+cpu", constraints))
        locked = compiled(ROOT / "pyproject.toml", "--extra", "dev", "-c", str(pins))
    return ABOUT + locked + compiled(ROOT / "tests" / "peers.txt", "--no-deps")


if __name__ == "__main__":
    try: text = make_lock()
    except subprocess.CalledProcessError as e: sys.exit(e.stderr)
    (ROOT / "requirements.lock").write_text(text)
    packages = re.findall(r"(?m)^\S+==", text)
    print(f"requirements.lock: {len(packages)} packages")
