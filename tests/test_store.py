"""What a store survives: kills at any moment, full disks, damage; and what it refuses to mix.

Real files, real processes.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_pipeline, own_store, PYTHON, RECIPE

from dmin.core.store import collect, open_store
from dmin.core.shards import Manifest
from dmin.core.store import Store



def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if not p.name.startswith(".")}


@pytest.fixture
def store(pipe, digits, tmp_path, collected): return own_store(tmp_path / "store", pipe, digits, collected)


COLLECTING = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch; torch.set_num_threads(1)
from conftest import make_pipeline
from dmin.core.store import collect
from dmin.reproduction.image_sets import load_images
from dmin.core.store import Store
write = Store.write
def slowly(self, rows, *rest): write(self, rows, *rest); print(rows[0], flush=True); time.sleep(.02)
Store.write = slowly
collect(make_pipeline(), load_images("mnist_5k", size=8).select(range(0, 2000, 50)), sys.argv[1], v=64, timesteps=2, shard_size=4, progress=False)
"""


def collecting(folder):
    return subprocess.Popen(
        [PYTHON, "-c", COLLECTING, str(folder), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True)


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    whole = collecting(tmp_path / "whole")
    assert whole.wait(timeout=600) == 0, whole.stderr.read()
    wanted, draw, kills = contents(tmp_path / "whole"), random.Random(0), 0
    for _ in range(3):
        process = collecting(tmp_path / "killed")
        for _ in range(draw.randint(1, 3)): process.stdout.readline()   # some shards are there
        time.sleep(draw.random() * .03)
        process.send_signal(signal.SIGKILL)
        process.stdout.read()   # until it has ended
        kills += process.wait(timeout=600) == -signal.SIGKILL
        for name, data in contents(tmp_path / "killed").items():
            assert data == wanted[name]   # nothing half-written
    assert kills >= 2
    last = collecting(tmp_path / "killed")
    assert last.wait(timeout=600) == 0, last.stderr.read()
    assert contents(tmp_path / "killed") == wanted


def test_full_disk(store, pipe, digits, tmp_path):
    """A real file system of half a megabyte, where the machine lets us mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(OSError, match="disk full"):
            collect(pipe, digits, small / "store", **{**RECIPE, "v": 4096, "dtype": "float32"})
        part = Store(small / "store")
        assert 0 < len(part.missing()) < len(digits)   # some were stored, and they are whole
        shutil.copytree(small / "store", tmp_path / "larger")
    finally: subprocess.run(["umount", "--lazy", str(small)], check=True)   # shards are still mapped
    resumed = collect(pipe, digits, tmp_path / "larger", **{**RECIPE, "v": 4096, "dtype": "float32"})
    assert resumed.missing() == []


def test_a_file_may_not_grow(pipe, digits, tmp_path):
    """The same where mounting is not allowed: the operating system refuses files beyond a size."""
    script = COLLECTING.replace(
        "from conftest",
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\nfrom conftest",
    ).replace("v=64", "v=2048")
    run = subprocess.run(
        [PYTHON, "-c", script, str(tmp_path / "store"), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=600)
    assert run.returncode and "What was stored before is intact" in run.stderr
    assert sorted(contents(tmp_path / "store")) == ["columns.json", "manifest.json", "samples.txt"]


def test_any_damage_is_noticed(store, tmp_path):
    """A shard cut anywhere, or with any one bit changed, is refused or reads the same; it never reads
    differently.
    """
    draw, good = random.Random(1), store.vectors()
    path = store.folder / "shard-00000008.safetensors"
    whole, refused = path.read_bytes(), 0
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 2: damaged = damaged[:draw.randrange(len(whole))]
        else: damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try: found = Store(store.folder).vectors()
        except ValueError as e:
            assert "shard-00000008" in str(e)
            refused += 1
        else: assert torch.equal(found, good)
    assert refused >= 55
    path.unlink()   # what the error says to do
    assert collect(make_pipeline(), store.samples, store.folder, **RECIPE).missing() == []
    assert path.read_bytes() == whole


@pytest.mark.parametrize("dtype, allowed", [("float32", 1e-6), ("float16", 5e-4), ("int8", 2e-2), ("1bit", .8)])
def test_precision_of_what_is_stored(pipe, digits, tmp_path, dtype, allowed):
    recipe = {**RECIPE, "v": 2048}
    exact = collect(pipe, digits, tmp_path / "exact", **recipe, dtype="float32").vectors()
    found = collect(pipe, digits, tmp_path / dtype, **recipe, dtype=dtype)
    assert (found.vectors() - exact).norm() / exact.norm() < allowed
    assert found.influence(digits.select([7])).top(1).rows.item() == 7


def test_uncompressed(pipe, digits, tmp_path):
    d = sum(p.numel() for p in pipe.unet.parameters())
    store = collect(pipe, digits.select(range(4)), tmp_path, **{**RECIPE, "v": None}, dtype="float32")
    assert store.vectors().shape == (4, 2, d) and torch.allclose(
        store.vectors().norm(dim=2), torch.ones(4, 2))


def test_extreme_norms_survive_float16(pipe, digits, tmp_path):
    with torch.no_grad(): pipe.unet.conv_out.weight.mul_(1e-6)
    pipe.unet.conv_out.bias.data.fill_(3e5)
    store = collect(pipe, digits.select(range(4)), tmp_path, **RECIPE)
    assert store.per_sample("norms").min() > 65504 or store.per_sample("norms").max() > 65504
    assert store.vectors().isfinite().all()


@pytest.mark.parametrize("field, value, said", [
    ("v", 32, "v is 64, not 32"), ("timesteps", 3, "timesteps is"), ("seed", 5, "noise_seed is 0, not 5"), ("dtype", "int8", "dtype is float16, not int8"),
    ("noises", 2, "noises is 1, not 2"), ("spacing", "trailing", "timesteps is"), ("parameters", "*.weight", "parameters is")])
def test_other_recipes_are_not_mixed(store, pipe, digits, field, value, said):
    before = contents(store.folder)
    with pytest.raises(ValueError, match=said):
        collect(pipe, digits, store.folder, **{**RECIPE, field: value})
    assert contents(store.folder) == before


def test_other_models_and_data_are_not_mixed(store, digits):
    before, other = contents(store.folder), make_pipeline(seed=1)
    with pytest.raises(ValueError, match=r"model \(fingerprint"):
        collect(other, digits, store.folder, **RECIPE)
    with pytest.raises(ValueError, match="another model"): open_store(store.folder, other)
    with pytest.raises(ValueError, match="40 samples, not 39"):
        collect(make_pipeline(), digits.select(range(39)), store.folder, **RECIPE)
    with pytest.raises(ValueError, match="sample 0"):
        open_store(store.folder, samples=digits.select(range(39, -1, -1)))
    assert contents(store.folder) == before


def test_add_computes_only_the_new(pipe, digits, tmp_path, monkeypatch):
    store = collect(pipe, digits.select(range(30)), tmp_path, **RECIPE)
    before, computed = contents(tmp_path), []
    write = Store.write
    monkeypatch.setattr(
        Store, "write", lambda self, rows, *rest: (computed.extend(rows), write(self, rows, *rest)))
    store.add(digits.select(range(30, 40)), progress=False)
    assert computed == list(range(30, 40)) and len(store) == 40
    after = contents(tmp_path)
    assert all(after[name].startswith(x) for name, x in before.items() if name != "manifest.json")
    assert all(after[name] == x for name, x in before.items() if name.startswith("shard"))
    again = open_store(tmp_path, pipe, digits)   # a new process would see the same
    assert again.missing() == [] and torch.equal(again.vectors(), store.vectors())
    assert again.influence(digits.select([35])).top(1).rows.item() == 35


def test_interrupted_add_goes_on(pipe, digits, tmp_path, monkeypatch):
    store = collect(pipe, digits.select(range(30)), tmp_path, **RECIPE)
    monkeypatch.setattr(Store, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): store.add(digits.select(range(30, 40)), progress=False)
    monkeypatch.undo()
    assert collect(pipe, digits, tmp_path, **RECIPE).missing() == []


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 1, "surprise": 2}'])
def test_a_damaged_manifest(store, text):
    (store.folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="cannot be read"): Store(store.folder)


def test_a_store_is_only_text_and_safetensors(store):
    assert {p.suffix for p in store.folder.iterdir()} == {".json", ".txt", ".safetensors"}
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest.pop("samples")["number"] == len(store) and manifest["format"] == 2
    ids = (store.folder / "samples.txt").read_text().splitlines()
    assert Manifest(**manifest, sample_ids=ids) == store.manifest


def test_open_by_memory_map(tmp_path):
    """Opening a store without verifying it reads next to nothing of it."""
    n, T, v = 64, 10, 65536   # 84 MB
    store = Store.create(
        tmp_path,
        Manifest("x", "y", 10**6, list(range(T)), v, shard_size=n, sample_ids=[str(i) for i in range(n)]))
    store.write(range(n), torch.randn(n, T, v), torch.ones(n, T), torch.ones(n, T))
    script = (
        "import sys, torch\nfrom dmin.core.store import Store\ndef rss(): return next(int(l.split()[1]) /"
        " 1024 for l in open('/proc/self/status') if l.startswith('VmRSS'))\n"
        "before = rss(); s = Store(sys.argv[1], verify=False); print(rss() - before)")
    grown = float(
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        ).stdout)
    assert grown < 20 < os.path.getsize(next(tmp_path.glob("shard-*"))) / 1e6   # MB


def test_a_shard_of_another_data_set(pipe, digits, tmp_path):
    a = collect(pipe, digits.select(range(20)), tmp_path / "a", **RECIPE)
    b = collect(pipe, digits.select(range(20, 40)), tmp_path / "b", **RECIPE)
    shutil.copy(b.folder / "shard-00000004.safetensors", a.folder)
    with pytest.raises(ValueError, match="shard-00000004.*another store"): Store(a.folder)


def test_a_missing_row_is_never_read(store):
    (store.folder / "shard-00000004.safetensors").unlink()
    part = Store(store.folder)
    with pytest.raises(ValueError, match="36 of 40"): part.vectors()
    assert part.vectors([0, 39]).isfinite().all()
