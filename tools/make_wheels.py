"""Builds the two packages of a release into dist/: dmin, the code, and dmin_data, the shipped data and results.

python tools/make_wheels.py [folder]      # dist by default

The data are what git tracks in data/ and results/. Both wheels carry the date of the last commit, so that the same
commit gives the same files.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from first_cells import ROOT, settings

PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "dmin-data"
version = "{version}"
description = "Images, small models and results that come with dmin"
readme = "README.md"
requires-python = ">=3.11"

[tool.setuptools]
packages = ["dmin_data"]

[tool.setuptools.package-data]
dmin_data = ["**/*"]
"""


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def data_project(folder: Path) -> Path:
    """The data as a project that pip can build. README.md tells each part's licence."""
    (folder / "dmin_data").mkdir(parents=True)
    for name in filter(None, git("ls-files", "-z", "data", "results").split("\0")):
        (folder / "dmin_data" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "dmin_data" / name)
    (folder / "dmin_data" / "__init__.py").write_text('"""The folders data and results of dmin."""\n')
    (folder / "pyproject.toml").write_text(PROJECT.format(version=settings()["version"]))
    shutil.copy(ROOT / "data" / "README.md", folder)
    return folder


def code_project(folder: Path) -> Path:
    """The package alone: building it in place would take up what an earlier build left."""
    names = ("pyproject.toml", "README.md", "LICENSE")
    for name in filter(None, git("ls-files", "-z", "dmin", *names).split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def new_setuptools() -> bool:
    try: return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError: return False


def make_wheels(dist: Path, packages: Sequence[str] = ("dmin", "dmin_data")) -> list[Path]:
    dist.mkdir(parents=True, exist_ok=True)
    environment = {"SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct").strip(), **os.environ}
    with tempfile.TemporaryDirectory() as scratch:
        make = {"dmin": code_project, "dmin_data": data_project}
        projects = [make[name](Path(scratch) / name) for name in packages]
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(dist.resolve())]
        if new_setuptools(): command.append("--no-build-isolation")   # nothing is fetched
        subprocess.run([*command, *map(str, projects)], check=True, env=environment)
    return [dist / f"{name}-{settings()['version']}-py3-none-any.whl" for name in packages]


if __name__ == "__main__":
    for wheel in make_wheels(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist")):
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")
