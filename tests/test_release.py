"""What leaves the repository: the two wheels outside a clone, the archive, the address in every file."""
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import tomllib
import venv
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from first_cells import first_cells, FOLDERS, needs, settings, stale   # noqa: E402
from make_archive import archive, checksums            # noqa: E402
from make_wheels import make_wheels                    # noqa: E402
from set_address import files, set_address             # noqa: E402
from set_address import main as set_address_by_command   # noqa: E402

PLACEHOLDER, CAROL = "OWN" + "ER", "car" + "ol"   # so that this file does not hold them

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is released is what git tracks")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory): return make_wheels(tmp_path_factory.mktemp("dist"))


@pytest.fixture
def installed(wheels, tmp_path):
    """A folder in which both are installed, as pip would, and an empty one to run in."""
    for wheel in wheels: zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "run").mkdir()
    return tmp_path


@pytest.fixture
def served(wheels, tmp_path):
    """The address of a project whose release lies on this machine."""
    release = tmp_path / "server" / "who" / "dmin" / "releases" / "download" / f"v{settings()['version']}"
    release.mkdir(parents=True)
    for wheel in wheels: shutil.copy(wheel, release)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "server")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/who/dmin"
        server.shutdown()


@pytest.fixture
def python(tmp_path):
    """That of a new virtual environment with all packages that are installed here but dmin."""
    venv.create(tmp_path / "venv", with_pip=True)
    packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.startswith(("dmin", "__editable__")) or path.suffix == ".pth": continue
        if not (packages / path.name).exists(): (packages / path.name).symlink_to(path)
    return tmp_path / "venv" / "bin" / "python"


def test_a_notebook_that_was_downloaded_alone(served, python, tmp_path):
    """As in Colab: no clone, no dmin; the first cell brings both wheels, and it runs to its end."""
    (alone := tmp_path / "alone" / "table_7.ipynb").parent.mkdir()
    text = (ROOT / "nbs" / "paper" / "table_7.ipynb").read_text(encoding="utf-8")
    alone.write_text(text.replace(settings()["git_url"], served), encoding="utf-8")
    script = """
import nbformat
from nbclient import NotebookClient
nb = nbformat.read("table_7.ipynb", 4)
NotebookClient(nb, timeout=600, kernel_name="python3").execute()
"""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("DMIN_", "PIP_", "PYTHON", "JUPYTER"))}
    known |= {"DMIN_PRESET": "smoke", "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [python, "-c", script], cwd=alone.parent, env=known, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, env=known).stdout
    assert re.search(r"(?m)^dmin ", found) and re.search(r"(?m)^dmin.data ", found)
    assert list(alone.parent.rglob("results/smoke/table_7.json"))   # what it makes goes to where it is


def outside(folder, script, **environment):
    """What a script prints where nothing of the clone is in reach."""
    known = {k: v for k, v in os.environ.items() if not k.startswith("DMIN_")}
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder / "run",
        env=known | {"PYTHONPATH": str(folder / "site")} | environment,
        capture_output=True,
        text=True,
        timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_an_answer_without_a_clone(installed):
    """Data, model, store and results come from the package of data; what is made goes to the current folder."""
    script = """
from dmin import collect, load_mixture, load_pipeline
from dmin.core.runtime import data_folder, made_data_folder, out_folder, shown_path
from dmin.reproduction.claims import claims_summary, paper_notebooks
train = load_mixture("mini").select(range(6))
store = collect(load_pipeline("tiny-sd3-lora"), train, "store", timesteps=1, progress=False)
print(store.influence(train.select([2])).top(1).rows.item(), len(paper_notebooks()), "not run" in claims_summary())
print(data_folder(), out_folder(), made_data_folder(), shown_path(out_folder() / "x"), sep="\\n")
"""
    site, run = installed / "site", installed / "run"
    assert outside(installed, script).split("\n") == [
        "2 20 False", str(site / "dmin_data" / "data"), str(run / "out"), str(run / "out" / "data"), "out/x"]


@pytest.mark.parametrize("harm", ["missing", "of another version"])
def test_data_that_are_not_there_name_their_command(installed, harm):
    site, version = installed / "site", settings()["version"]
    about = site / f"dmin_data-{version}.dist-info"
    if harm == "missing": shutil.rmtree(site / "dmin_data")
    else:
        text = (about / "METADATA").read_text()
        (about / "METADATA").write_text(text.replace(f"Version: {version}", "Version: 0.0.0"))
    script = """
from dmin import load_pipeline
try: load_pipeline("ddpm-mnist")
except FileNotFoundError as e: print(e)
"""
    told = outside(installed, script)
    assert f"pip install {settings()['git_url']}/releases/download/v{version}/dmin_data-{version}-py3" in told
    assert harm == "missing" or "of version 0.0.0" in told


def test_the_same_commit_makes_the_same_wheels(wheels, tmp_path):
    assert checksums(make_wheels(tmp_path, ["dmin"])) == checksums(wheels[:1])


def test_the_archive_holds_what_is_committed(tmp_path):
    path = archive(tmp_path / "dmin-1.tar.gz")
    listed = subprocess.run(["git", "ls-tree", "-r", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    with tarfile.open(path) as tar:
        assert {m.name.removeprefix("dmin-1/") for m in tar if m.isfile()} == {*listed.stdout.split("\n")} - {""}
    told = checksums([path]).split()
    assert told == [hashlib.sha256(path.read_bytes()).hexdigest(), "dmin-1.tar.gz"]


@pytest.fixture
def copied(tmp_path):
    """The text files of the repository, tracked by a git of their own."""
    for path in files(ROOT):
        to = tmp_path / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    for words in (["init", "-q"], ["add", "-A"]): subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def holding(root, word): return [str(p.relative_to(root)) for p in files(root) if word in p.read_text()]


def test_one_command_sets_the_address_everywhere(copied):
    known = settings(copied)["git_url"]   # a placeholder, or where it was published
    assert {"settings.ini", "pyproject.toml", "CITATION.cff", "dmin/_modidx.py"} < {*holding(copied, known)}
    chosen = dict(
        git_url=f"https://github.com/{CAROL}/attribution", site=f"https://{CAROL}.example/docs", author="Carol",
        email=f"{CAROL}@example.com")  # fmt: skip
    set_address(copied, **chosen)
    assert holding(copied, PLACEHOLDER) == holding(copied, known) == [] and stale(copied) == {}
    quickstart = nbformat.read(copied / "nbs" / "tutorials" / "quickstart.ipynb", as_version=4)
    assert f"colab.research.google.com/github/{CAROL}/attribution/blob/main/nbs/tutorials/" in quickstart.cells[1].source
    set_address(copied, **chosen | {"git_url": "https://github.com/bob/dmin", "site": "https://bob.example"})
    set_address(copied, git_url="", site="https://bob.example/pages", author="", email="")
    for name in ("pyproject.toml", "CITATION.cff"): assert "https://bob.example/pages" in (copied / name).read_text()
    assert holding(copied, f"{CAROL}/") == holding(copied, f"{CAROL}.example/docs") == []


def test_once_it_is_published_no_placeholder_is_left():
    if PLACEHOLDER not in settings(ROOT)["git_url"]: assert holding(ROOT, PLACEHOLDER) == []


@pytest.mark.parametrize("wrong", [
    ("--git-url", "github.com/dave/dmin"), ("--git-url", "https://github.com/dave"), ("--email", "carol"),
    ("--author", 'Carol "C" Smith'), ("--author", "Carol: and others"), ("--site", "https://x.example/?a=1")])
def test_what_no_file_could_hold_is_refused(wrong, monkeypatch, capsys):
    def called(*_, **__): raise AssertionError("set before it was looked at")

    monkeypatch.setattr("set_address.set_address", called)
    monkeypatch.setattr(sys, "argv", ["set_address.py", *wrong])
    with pytest.raises(SystemExit): set_address_by_command()
    assert f"{wrong[0]} {wrong[1]!r}: expected " in capsys.readouterr().err


def test_every_notebook_says_what_it_needs():
    names = [p.relative_to(ROOT / "nbs").with_suffix("") for f in FOLDERS for p in (ROOT / "nbs" / f).glob("*.ipynb")]
    assert len(names) > 40 and not [str(name) for name in names if not needs(name.as_posix())]


def test_first_cells_install_this_version():
    about, install = first_cells("tutorials/quickstart")
    s = settings()
    assert f"{s['git_url']}/releases/download/v{s['version']}" in install
    for package in ("dmin", "dmin_data"): assert f"/{package}-{s['version']}-py3-none-any.whl" in install
    assert "dmin[kfac]@" in first_cells("paper/kfac_figure_2")[1] and "dmin@" in install
    compile(install, "first cell", "exec")   # tools/run_cells.py runs notebooks without IPython
    assert "quickstart.ipynb" in about and stale() == {}


def test_needs_are_of_notebooks_that_are_there():
    measured = json.loads((ROOT / "results" / "needs.json").read_text())["notebooks"]
    missing = [name for name in measured if not (ROOT / "nbs" / f"{name}.ipynb").exists()]
    assert missing == [] and all(x["seconds"] > 0 and x.get("memory_gb", 1) > 0 for x in measured.values())


def test_the_lock_is_of_the_tested_versions():
    """Every version that constraints.txt names and the lock has is the same."""
    def pins(path):
        lines = [line.split(" ")[0] for line in (ROOT / path).read_text().splitlines() if "==" in line]
        return {name.lower().replace("_", "-"): v for name, v in (x.split("==") for x in lines if x[0].isalpha())}

    locked, tested = pins("requirements.lock"), pins("constraints.txt")
    wrong = {n: (v, locked[n]) for n, v in tested.items() if locked.get(n, v).removesuffix("+cpu") != v}
    assert wrong == {} and {"torch", "diffusers", "hnswlib", "nbmake"} <= locked.keys()
    entries = re.split(r"(?m)^(?=\S+==)", (ROOT / "requirements.lock").read_text())[1:]
    assert len(entries) == len(locked) and all("--hash=sha256:" in x for x in entries)


def test_the_tested_versions_are_for_the_oldest_python_that_is_promised():
    """As Debian 12's own, 3.11.2: a version for 3.11.5 or newer would end `make install` there."""
    tested = re.findall(r"(?m)^([\w.-]+)==", (ROOT / "constraints.txt").read_text())
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = oldest.removeprefix(">=") + ".0"
    needed = {d.name: d.metadata.get("Requires-Python") for d in importlib.metadata.distributions()}
    needed = {re.sub(r"[-_.]+", "-", name).lower(): python for name, python in needed.items()}
    known = [n for x in tested if (n := re.sub(r"[-_.]+", "-", x).lower()) in needed]
    assert oldest == "3.11.0" and {"torch", "diffusers", "soupsieve"} <= set(known)
    assert [n for n in known if oldest not in SpecifierSet(needed[n] or "")] == []
