"""The rehearsal of the paper preset: its stand-in answers the Hub's own clients, and has what they ask for.
"""
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from conftest import PYTHON
from dmin.pipelines import PIPELINES
from dmin.reproduction.image_sets import IMAGE_SETS
from dmin.reproduction.mixture import SUBSETS
from dmin.reproduction.presets import BENCHMARKS, PRESETS

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from hub_stand_in import make_repositories, REPOSITORIES, serving
from rehearse import begin, environment, is_name, SMALLER, smaller_preset

SET, ADAPTERS = SUBSETS["paper"]["lego_sets"], PIPELINES["sd3-medium-lora"].lora

ASK = """
import json, sys
from datasets import load_dataset
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

def missing(*asked, **more):
    try: return hf_hub_download(*asked, **more)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as e: return type(e).__name__

adapters, rows = sys.argv[1:]
path, loaded = "pytorch_lora_weights.safetensors", load_dataset(rows, split="train")
print(json.dumps({
    "file": hf_hub_download(adapters, path),
    "folder": snapshot_download(adapters),
    "rows": len(loaded),
    "columns": loaded.column_names,
    "side": max(loaded[0]["image"].size),
    "missing": [missing("nobody/nothing", path), missing(adapters, "config.json"),
                missing(adapters, path, revision="v2")]}))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the Hub's clients get, in a process that asks nobody else."""
    folder = tmp_path_factory.mktemp("rehearsal")
    make_repositories(folder / "hub", [ADAPTERS, SET.where])
    with serving(folder / "hub") as address:
        command = [sys.executable, "-c", ASK, ADAPTERS, SET.where]
        env = environment(folder, address)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


def test_the_hubs_clients_get_a_model(answers):
    found, folder = answers
    path = Path(found["file"])
    assert path.read_bytes() == (folder / "hub/models" / ADAPTERS / path.name).read_bytes()
    assert path.is_relative_to(folder / "home") and Path(found["folder"]) == path.parent


def test_they_get_a_data_set_as_it_is_published(answers):
    found = answers[0]
    assert found["rows"] == SET.rows and found["side"] < 64
    assert {SET.image, SET.caption} <= {*found["columns"]}


def test_they_are_told_what_is_missing(answers):
    names = answers[0]["missing"]
    assert names[0].startswith("Repository") and "Entry" in names[1] and names[2].startswith("Revision")


@pytest.mark.parametrize("asked, part", [
    ("2-5", slice(2, 6)), ("2-", slice(2, None)), ("-3", slice(-3, None))])
def test_a_part_of_a_file(answers, asked, part):
    hub = answers[1] / "hub"
    with serving(hub) as address:
        url = f"{address}/{ADAPTERS}/resolve/main/pytorch_lora_weights.safetensors"
        with urlopen(Request(url, headers={"Range": f"bytes={asked}"}), timeout=10) as got:
            assert got.status == 206 and got.headers["X-Repo-Commit"]
            whole = (hub / "models" / ADAPTERS / "pytorch_lora_weights.safetensors").read_bytes()
            assert got.read() == whole[part]


def test_every_repository_of_the_paper_preset_has_a_stand_in():
    sources = PIPELINES.values()
    models = {s.hub for s in sources if s.hub} | {s.lora for s in sources if s.hub and s.lora}
    assert models | {PRESETS["paper"]["clip"]} == {*REPOSITORIES["models"]}
    sets = {s.where for s in SUBSETS["paper"].values()} | {s.hub for s in IMAGE_SETS.values() if s.hub}
    assert sets == {*REPOSITORIES["datasets"]}


def test_names_stay_and_numbers_are_as_many():
    paper, small = PRESETS["paper"], smaller_preset()
    assert paper.keys() == small.keys()
    for field, value in paper.items():
        if is_name(value): assert small[field] == value, field
        if field in BENCHMARKS: continue   # which nbs/paper does not ask for by their number
        if isinstance(value, (tuple, dict)): assert len(small[field]) == len(value), field
    assert small["recipes"]["digits"]["dataset"] == paper["recipes"]["digits"]["dataset"]


def test_a_kernel_begins_with_the_small_numbers(tmp_path):
    begin(tmp_path / "out")
    first = next(tmp_path.rglob("profile_default/startup/*.py"))
    script = first.read_text() + """
from dmin import preset
from dmin.pipelines import PIPELINES
print(preset("paper").n_train, PIPELINES["sd14-lora"].recipe.size)"""
    done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, timeout=60)
    numbers = str(SMALLER["fields"]["n_train"]), str(SMALLER["pixels"])
    assert done.stdout.split() == [*numbers], done.stderr
    (kept := tmp_path / "out" / "kept").touch()
    begin(tmp_path / "out")
    assert kept.exists()
    (tmp_path / "out" / "made_by.txt").write_text("other sizes")
    begin(tmp_path / "out")
    assert not kept.exists()


def test_the_users_own_caches_and_tokens_are_out_of_reach(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    env = environment(tmp_path, "http://127.0.0.1:1")
    hub = {name: x for name, x in env.items() if name.startswith(("HF_", "TRANSFORMERS_"))}
    assert hub.keys() == {"HF_ENDPOINT", "HF_HOME", "HF_UPDATE_DOWNLOAD_COUNTS"}
    assert hub["HF_HOME"] == str(tmp_path / "home") and os.environ["HF_TOKEN"] == "1"
