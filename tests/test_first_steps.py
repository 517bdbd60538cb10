"""What a new user meets first: the Makefile, where results go, what the README promises."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture
def bare(tmp_path):
    """A folder with the Makefile, and an old Python that knows its version and nothing else."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests").mkdir(), shutil.copy(ROOT / "tests" / "peers.txt", tmp_path / "tests")
    old = tmp_path / "python3.9"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *version_info*) echo 3.9; exit 1;; *) echo "it was used: $*"; touch used;'
        ' exit 1;; esac\n'
    )
    old.chmod(0o755)
    return tmp_path


def make(folder, *arguments):
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"MAKEFLAGS": ""})


def test_an_old_python_is_told_before_pip_starts(bare):
    run = make(bare, "PYTHON=./python3.9", "quickstart")
    assert (
        run.returncode
        and "is Python 3.9, and 3.11 or newer is needed: make PYTHON=python3.11 quickstart" in run.stderr)
    assert not (bare / ".venv").exists() and not (bare / "used").exists()


def test_an_environment_of_an_old_python_is_told(bare):
    (bare / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(bare / "python3.9", bare / ".venv" / "bin" / "python")
    run = make(bare, "install")
    assert (
        run.returncode
        and "rm -r .venv and then make PYTHON=python3.11" in run.stderr
        and not (bare / "used").exists())


def test_summaries_go_where_the_notebook_says(tmp_path):
    from run_paper import places
    assert places("smoke", None) == (ROOT / "out" / "paper" / "smoke", ROOT / "out" / "smoke")
    assert places("mini", None) == (ROOT / "out" / "paper" / "mini", ROOT / "out")
    assert places("smoke", str(tmp_path)) == (tmp_path / "paper" / "smoke", tmp_path)
    assert (
        "out/paper/smoke/summary.md" in (ROOT / "nbs" / "tutorials" / "artifact_evaluation.ipynb").read_text()
    )


def test_bars_of_a_notebook_end_as_one_would_keep_them():
    from run_notebook import ended
    bar = "train:   0%|          | 0/3 [00:00<?, ?it/s]\rtrain:  67%|###  | 2/3 [00:00<00:00]\rtrain: 100%|#####| 3/3 [00:01<00:00]\n"
    assert ended("before\n" + bar + "after\n") == "before\ntrain: 100%|#####| 3/3 [00:01<00:00]\nafter\n"
    assert ended("train:   0%|          | 0/3 [00:00<?, ?it/s]\nafter\n") == "after\n"
    assert ended("0%| of them\n") == "0%| of them\n"


def test_the_readme_promises_what_there_is():
    from dmin.core.registry import FAMILIES
    text = (ROOT / "README.md").read_text()
    assert "any diffusers pipeline" not in text and all(name in text for name in FAMILIES)
