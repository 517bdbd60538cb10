"""What a store, its index and its folder survive: other processes, other folders, flipped bits, forged files.

Real files.
"""
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pipeline, own_store, PYTHON, RECIPE
from datasets import ClassLabel, Dataset, Features
from PIL import Image

import dmin.core.store
from dmin import build_index, collect, make_objective, open_index, open_store, sample_gradients
from dmin.core.compression import Compressor
from dmin.core.files import checksum, write_atomically, write_tensors
from dmin.core.gradients import Gradients
from dmin.families.ddpm import DDPMObjective
from dmin.core.shards import differences, Manifest
from dmin.core.store import Store



def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if not p.name.startswith(".")}


@pytest.fixture
def store(pipe, digits, tmp_path, collected):
    return own_store(tmp_path / "store", pipe, digits.select(range(12)), collected)


def synthetic(folder, n=8, shard_size=4, v=16, **more):
    """A store of random numbers, of `n` samples at two timesteps."""
    store = Store.create(
        folder,
        Manifest(
            "x",
            "y",
            10**4,
            [0, 1],
            v,
            shard_size=shard_size,
            sample_ids=[f"{i:016x}" for i in range(n)],
            **more))
    draw = torch.Generator().manual_seed(0)
    for i in range(0, n, shard_size):
        rows = range(i, min(n, i + shard_size))
        store.write(
            rows,
            torch.randn(len(rows), 2, v, generator=draw),
            torch.ones(len(rows), 2),
            torch.ones(len(rows), 2))
    return store


# folders

def test_a_relative_folder_stays_where_it_was(pipe, digits, tmp_path, monkeypatch):
    """Another store of the same name, in another directory, is not touched."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    collect(pipe, digits.select(range(20, 32)), "store", **RECIPE)
    before = contents("store")
    monkeypatch.chdir(tmp_path / "a")
    store = collect(pipe, digits.select(range(12)), "store", **RECIPE)
    monkeypatch.chdir(tmp_path / "b")
    store.add(digits.select([13, 14]), progress=False)
    assert contents(tmp_path / "b" / "store") == before
    assert len(Store(tmp_path / "a" / "store")) == 14 and store.folder == tmp_path / "a" / "store"


def test_a_folder_that_was_replaced_is_not_written_to(store, pipe, digits, tmp_path):
    shutil.move(store.folder, tmp_path / "moved")
    other = collect(pipe, digits.select(range(20, 32)), store.folder, **RECIPE)
    before = contents(other.folder)
    with pytest.raises(ValueError, match="has changed since this store was opened.*open it again"):
        store.add(digits.select([13]), progress=False)
    (store.folder / "manifest.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError)): store.add(digits.select([13]), progress=False)
    assert {k: x for k, x in before.items() if k != "manifest.json"} == contents(other.folder)


def test_two_adds_from_stores_that_were_opened_before(store, pipe, digits):
    """The second is refused by name and overwrites nothing; opened again, it adds."""
    a, b = (open_store(store.folder, pipe, digits.select(range(12))) for _ in range(2))
    a.add(digits.select([12, 13]), progress=False)
    before = contents(store.folder)
    with pytest.raises(ValueError, match="has changed since.*12 samples|has changed since.*14 samples"):
        b.add(digits.select([20]), progress=False)
    assert contents(store.folder) == before
    again = open_store(store.folder, pipe, digits.select(range(14)))
    assert again.add(digits.select([20]), progress=False).missing() == [] and len(Store(store.folder)) == 15


ADD = """
import sys
sys.path.insert(0, sys.argv[2])
import torch; torch.set_num_threads(1)
from conftest import make_pipeline
from dmin import load_images, open_store
digits = load_images("mnist_5k", size=8).select(range(0, 2000, 50))
store = open_store(sys.argv[1], make_pipeline(), digits.select(range(12)))
print("ready", flush=True); sys.stdin.readline()
try: store.add(digits.select(range(*map(int, sys.argv[3:5]))), progress=False)
except ValueError as e: sys.exit(str(e))
"""


def test_two_adds_of_two_processes_lose_nothing(store, pipe, digits):
    """One adds, the other is told; the store opens, and holds the one's samples whole."""
    ranges = (("12", "18"), ("20", "26"))
    both = [
        subprocess.Popen(
            [PYTHON, "-c", ADD, str(store.folder), str(Path(__file__).parent), *r],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        for r in ranges]
    for p in both: assert p.stdout.readline() == "ready\n", p.stderr.read()
    for p in both: p.stdin.write("go\n"), p.stdin.flush()
    said = [p.communicate(timeout=600)[1] for p in both]
    codes = [p.returncode for p in both]
    assert sorted(codes) == [0, 1], said
    assert "has changed since this store was opened" in said[codes.index(1)]
    won = range(*map(int, ranges[codes.index(0)]))
    again = open_store(store.folder, pipe, digits.select([*range(12), *won]))
    assert again.missing() == []


def test_plain_collects_of_one_folder_at_once(pipe, digits, tmp_path):
    """As before: both succeed, with the bytes of one."""
    script = (
        ADD.split("store = open_store")[0]
        + "from dmin import collect\ncollect(make_pipeline(), digits.select(range(12)), sys.argv[1], v=64,"
          " timesteps=2, shard_size=2, progress=False).check_complete()"
    )
    both = [
        subprocess.Popen(
            [PYTHON, "-c", script, str(tmp_path / "two"), str(Path(__file__).parent)],
            stderr=subprocess.PIPE,
            text=True)
        for _ in range(2)]
    assert [(p.communicate(timeout=600)[1], p.returncode)[1] for p in both] == [0, 0]
    one = subprocess.run(
        [PYTHON, "-c", script, str(tmp_path / "one"), str(Path(__file__).parent)], capture_output=True, timeout=600
    )
    assert one.returncode == 0 and contents(tmp_path / "one") == contents(tmp_path / "two")


def test_files_get_the_umasks_permissions(pipe, digits, tmp_path):
    before = os.umask(0o022)
    try: store = collect(pipe, digits.select(range(4)), tmp_path / "s", **RECIPE)
    finally: os.umask(before)
    build_index(store, progress=False)
    assert {oct(p.stat().st_mode & 0o777) for p in store.folder.glob("shard*")} == {"0o644"}


class as_nobody:
    """Reads as another user while open: root may read everything."""
    def __enter__(self):
        if os.geteuid() == 0: os.seteuid(65534)
    def __exit__(self, *_):
        if os.getuid() == 0: os.seteuid(0)


def let_others_in(folder):
    """Other users may read what pytest made for root."""
    if os.getuid(): return
    for path in (folder, *folder.parents):
        if path.stat().st_mode & 0o777 == 0o700: path.chmod(0o755)


def test_a_missing_permission_is_no_damage(store, tmp_path):
    build_index(store, progress=False)
    let_others_in(store.folder)
    for path, opened in (
        (store.folder / "shard-00000004.safetensors", Store),
        (next(store.folder.glob("index-*.hnsw")), lambda f: open_index(Store(f))),
    ):
        path.chmod(0o000)
        with as_nobody(), pytest.raises(PermissionError, match="may not be read by this user"):
            opened(store.folder)
        path.chmod(0o644)


def test_a_folder_that_may_not_be_written(pipe, digits, tmp_path):
    let_others_in(tmp_path)
    ids = digits.select(range(4))
    (tmp_path / "locked").mkdir(), (tmp_path / "locked").chmod(0o555)
    with as_nobody(), pytest.raises(PermissionError, match="could not write.*You may not write there"):
        collect(pipe, ids, tmp_path / "locked" / "store", **RECIPE)
    assert list((tmp_path / "locked").iterdir()) == []


# the index

@pytest.fixture
def indexed(tmp_path):
    store = synthetic(tmp_path / "store", 40, 10, 32)
    build_index(store, threads=1, progress=False)
    return store


def test_any_flipped_bit_of_an_index_is_refused(indexed):
    """Before hnswlib reads it: some would crash the interpreter."""
    draw = random.Random(0)
    for path in (next(indexed.folder.glob("index-*.hnsw")), indexed.folder / "index.json"):
        whole = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="build_index"): open_index(indexed)
        for cut in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(ValueError, match="build_index"): open_index(indexed)
        path.write_bytes(whole)
    open_index(indexed)


@pytest.mark.parametrize("change", [{"dimension": 32}, {"samples": 39}, {"file": "../graph.hnsw"}, {"M": None}, {"store": "0" * 16}])
def test_a_changed_description_of_an_index(indexed, change):
    path = indexed.folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="build_index"): open_index(indexed)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"store": 3}', ""])
def test_a_description_that_is_none(indexed, text):
    (indexed.folder / "index.json").write_text(text)
    with pytest.raises(ValueError, match="build_index"): open_index(indexed)


def test_an_index_of_another_store_of_the_same_recipe(indexed, tmp_path):
    other = Store.create(
        tmp_path / "other",
        Manifest("x", "y", 10**4, [0, 1], 32, shard_size=10, sample_ids=[f"other {i}" for i in range(40)]))
    for i in range(0, 40, 10):
        other.write(range(i, i + 10), torch.randn(10, 2, 32), torch.ones(10, 2), torch.ones(10, 2))
    for path in indexed.folder.glob("index*"): shutil.copy(path, other.folder)
    with pytest.raises(ValueError, match="another store's"): open_index(other)


def test_an_index_and_its_description_are_one_unit(indexed, monkeypatch):
    """Killed between the graph and the description, the old index still stands; the next build removes what
    was left.
    """
    queries = Gradients(torch.randn(2, 2, 32), torch.ones(2, 2), torch.ones(2, 2))
    before, write = open_index(indexed).search(queries, 5).rows, write_atomically
    monkeypatch.setattr(
        "dmin.core.index.write_atomically",
        lambda path, f: (
            write(path, f) if path.suffix == ".hnsw" else (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt): build_index(indexed, M=4, progress=False)
    monkeypatch.undo()
    assert len(list(indexed.folder.glob("index-*.hnsw"))) == 2
    assert torch.equal(open_index(indexed).search(queries, 5).rows, before)
    build_index(indexed, progress=False)
    assert len(list(indexed.folder.glob("index*.hnsw"))) == 1


def test_full_disk_while_indexing(indexed, monkeypatch):
    before = contents(indexed.folder)
    monkeypatch.setattr(
        "hnswlib.Index.save_index", lambda self, path: Path(path).write_bytes(b"half"), raising=False)
    monkeypatch.setattr("dmin.core.index._checksum", lambda path: pytest.fail("a half graph was kept"))
    try:
        with pytest.raises(OSError, match="not written whole.*Is the disk full"):
            build_index(indexed, progress=False)
    except TypeError: pytest.skip("hnswlib's class cannot be patched")
    assert contents(indexed.folder) == before


# manifests and shards

@pytest.mark.parametrize("change, said", [
    ({"sample_ids": [None] * 8}, "sample_ids"), ({"sample_ids": list(range(8))}, "sample_ids"), ({"sample_ids": None}, "sample_ids"), ({"timesteps": ["a"]}, "timesteps"),
    ({"v": "64"}, "v="), ({"parameters": None}, "parameters"), ({"model": 3}, "model"), ({"timesteps": None}, "timesteps"), ({"surprise": 1}, "surprise")])
def test_a_manifest_that_cannot_be(tmp_path, change, said):
    store = synthetic(tmp_path / "s")
    path = store.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"manifest.json.*{said}"): Store(store.folder)


def test_a_manifest_that_is_a_folder(tmp_path):
    store = synthetic(tmp_path / "s")
    (store.folder / "manifest.json").unlink(), (store.folder / "manifest.json").mkdir()
    with pytest.raises(ValueError, match="manifest.json.*is a folder"): Store(store.folder)


@pytest.mark.parametrize("name, value", [("gradients", float("nan")), ("norms", float("inf")), ("losses", float("nan")), ("norms", 0.)])
def test_forged_numbers_with_a_right_checksum(tmp_path, name, value):
    store = synthetic(tmp_path / "s")
    path = store.folder / "shard-00000004.safetensors"
    tensors, about = dmin.core.files.read_tensors(path, "")
    tensors = {k: x.clone() for k, x in tensors.items()}
    tensors[name].view(-1)[5] = value
    write_tensors(path, tensors, {k: about[k] for k in ("store", "samples")})
    with pytest.raises(ValueError, match="shard-00000004.*not (finite|positive)"): Store(store.folder).verify()


@pytest.mark.parametrize("forge", [lambda t: t | {"gradients": t["gradients"][..., :8].contiguous()}, lambda t: t | {"rows": t["rows"].clone().fill_(4)},
                                   lambda t: t | {"norms": t["norms"][:2].contiguous()}, lambda t: t | {"gradients": t["gradients"].float()}])
def test_shards_of_other_shapes(tmp_path, forge):
    store = synthetic(tmp_path / "s")
    path = store.folder / "shard-00000004.safetensors"
    tensors, about = dmin.core.files.read_tensors(path, "")
    tensors = forge({k: x.clone() for k, x in tensors.items()})
    ids = dmin.core.shards.ids_digest([store.manifest.sample_ids[i] for i in tensors["rows"]])
    write_tensors(path, tensors, {"store": about["store"], "samples": ids})
    for verify in (True, False):
        with pytest.raises(ValueError, match="shard-00000004.*damaged"): Store(store.folder, verify)


def test_what_is_written_is_checked(tmp_path):
    store = Store.create(tmp_path / "s", Manifest("x", "y", 10**4, [0, 1], 16, sample_ids=["a", "b", "c"]))
    c, one = torch.randn(2, 2, 16), torch.ones(2, 2)
    bad = c.clone(); bad[1, 0, 3] = float("nan")
    for args, said in [
        (([0, 1], c[..., :8], one, one), r"compressed of shape \(2, 2, 8\): expected \(2, 2, 16\)"),
        (([0, 0], c, one, one), r"rows \[0, 0\]: distinct"),
        (([0, 3], c, one, one), "0 to 2"),
        (([-1, 0], c, one, one), "0 to 2"),
        (([0, 1], bad, one, one), "compressed of row 1"),
        (([], c[:0], one[:0], one[:0]), "distinct"),
        (([0, 1], c, one * 0, one), "norm of row 0"),
        (([0, 1], c, one, one[:, :1]), "losses of shape"),
        (([0, 1], c, one, one / 0), "losses of row 0"),
    ]:
        with pytest.raises(ValueError, match=said): store.write(*args)
    assert sorted(contents(store.folder)) == ["manifest.json", "samples.txt"]
    store.write([0, 1], c, one, one)
    with pytest.raises(ValueError, match="row 1 is stored already"): store.write([1, 2], c, one, one)


class Untouched(list):
    """Ids that may be kept and not copied, counted through or joined."""
    def __iter__(self): raise AssertionError("the ids were gone through")
    __deepcopy__ = __copy__ = __iter__


def test_a_recipes_fingerprint_does_not_read_the_ids():
    """A shard is written for every few samples: what it takes must not grow with all of them."""
    manifest = Manifest("x", "y", 10**4, [0, 1], 16, sample_ids=["a", "b"])
    fingerprint, manifest.sample_ids = manifest.fingerprint(), Untouched(["a", "b"])
    assert manifest.fingerprint() == fingerprint
    same = Manifest("x", "y", 10**4, [0, 1], 16)
    same.sample_ids = manifest.sample_ids
    assert differences(manifest, same) == []


def test_writing_a_shard_does_not_read_the_manifest(tmp_path, monkeypatch):
    store = Store.create(
        tmp_path / "s", Manifest("x", "y", 10**4, [0, 1], 16, sample_ids=[f"{i}" for i in range(8)]))
    monkeypatch.setattr("dmin.core.shards.read_manifest", lambda folder: pytest.fail("the manifest was read"))
    for i in range(0, 8, 2):
        store.write([i, i + 1], torch.randn(2, 2, 16), torch.ones(2, 2), torch.ones(2, 2))
    assert store.missing() == []


def test_more_shards_than_may_be_mapped(tmp_path, monkeypatch):
    """Only so many stay open, and everything reads the same."""
    store = synthetic(tmp_path / "s", 60, 1)
    everything, one = store.vectors(), Gradients(torch.randn(1, 2, 16), torch.ones(1, 2), torch.ones(1, 2))
    scores = store.influence(one).values
    monkeypatch.setattr("dmin.core.shards.OPEN_SHARDS", 7)
    few = Store(store.folder)
    for _ in range(2):
        assert (
            torch.equal(few.vectors(), everything)
            and torch.equal(few.influence(one).values, scores)
            and len(few._files.mapped) <= 7)
    del store
    if Path("/proc/self/maps").exists():
        import gc
        gc.collect()
        assert (
            len(
                {
                    line.split()[-1]
                    for line in Path("/proc/self/maps").read_text().splitlines()
                    if str(few.folder) in line})
            <= 8)


def test_opening_and_closing_does_not_grow(tmp_path):
    folder = synthetic(tmp_path / "s", 100, 1).folder
    script = (
        "import gc, os, sys\nfrom dmin.core.store import Store\n"
        "def size(): gc.collect(); return len(os.listdir('/proc/self/fd')),"
        " len(open('/proc/self/maps').readlines())\n"
        "for i in range(6):\n    Store(sys.argv[1])\n    if i == 2: first = size()\nprint(*first, *size())")
    if not Path("/proc/self/fd").exists(): pytest.skip("needs /proc")
    run = subprocess.run([PYTHON, "-c", script, str(folder)], capture_output=True, text=True, timeout=600)
    files, maps, files_then, maps_then = map(int, run.stdout.split())
    assert files_then <= files and maps_then <= maps + 20   # of 100 shards a round


# leftovers

def test_leftovers_and_other_peoples_files(pipe, digits, tmp_path):
    collect(pipe, digits.select(range(8)), tmp_path / "s", **RECIPE)
    names = [
        ".~lock.shard.tmp",
        ".nfs0001.tmp",
        ".shard.tmp",
        ".x.y.z.tmp",
        "shard-notes.tmp",
        ".shard-00000000.safetensors.0011.tmp"]
    for name in names:
        (
            (tmp_path / "s" / name).write_bytes(b"theirs"),
            os.utime(tmp_path / "s" / name, (0, 0)) if name[-8:] != "0011.tmp" else None)
    for name in (
        ".shard-00000000.safetensors.00112233aabbccdd.tmp",
        ".index-00112233aabbccdd.hnsw.00112233aabbccdd.tmp",
        ".manifest.json.4711.tmp",
        ".tmpA1b2C3",
    ):
        (tmp_path / "s" / name).write_bytes(b"ours"), os.utime(tmp_path / "s" / name, (0, 0))
    store = collect(pipe, digits.select(range(8)), tmp_path / "s", **RECIPE)
    assert sorted(
        p.name for p in store.folder.iterdir() if p.name.startswith(".") or p.suffix == ".tmp"
    ) == sorted([*names])


KILLED = """
import os, signal, sys
from pathlib import Path
from dmin.core.files import write_atomically
write_atomically(Path(sys.argv[1]), lambda p: (p.write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL)))
"""


def test_what_a_kill_left_is_removed_and_what_is_being_written_stays(store, pipe, digits):
    subprocess.run([PYTHON, "-c", KILLED, str(store.folder / "shard-00000099.safetensors")], timeout=600)
    [left] = store.folder.glob(".shard*.tmp")
    os.utime(left, (time.time() - 60,) * 2)

    def meanwhile(path):   # another process collects while this one writes
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 60,) * 2)
        collect(pipe, digits.select(range(12)), store.folder, **RECIPE)
        assert path.exists() and not left.exists()
    write_atomically(store.folder / "notes.txt", meanwhile)


def test_temporary_names_are_nobody_elses(tmp_path):
    """Of two writers of one file with equal process ids, as in two containers, both succeed."""
    seen = []
    def outer(path):
        seen.append(path)
        write_atomically(tmp_path / "x", lambda p: (seen.append(p), p.write_text("inner")))
        path.write_text("outer")
    write_atomically(tmp_path / "x", outer)
    assert len({*seen}) == 2 and (tmp_path / "x").read_text() == "outer"


# stores without a sample, interrupted and repeated additions

def test_a_store_without_a_sample_makes_room(pipe, digits, tmp_path, monkeypatch):
    """Out of memory at the first batch, then fewer timesteps."""
    monkeypatch.setattr(
        sys.modules["dmin.core.store"], "compute", lambda *a, **k: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError): collect(pipe, digits.select(range(4)), tmp_path / "s", **RECIPE)
    monkeypatch.undo()
    assert Store(tmp_path / "s").missing() == [0, 1, 2, 3]
    store = collect(pipe, digits.select(range(4)), tmp_path / "s", **RECIPE | {"timesteps": 1})
    assert store.missing() == [] and len(store.manifest.timesteps) == 1
    with pytest.raises(ValueError, match="another recipe"):
        collect(pipe, digits.select(range(4)), tmp_path / "s", **RECIPE)


def test_discarding_an_interrupted_add(store, digits, monkeypatch):
    """Killed after one shard of three: the old samples answer again, with what was added whole."""
    query, scores = digits.select([3]), store.influence(digits.select([3])).values
    write, done = Store.write, []
    def stops(self, rows, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(rows), write(self, rows, *rest)
    monkeypatch.setattr(Store, "write", stops)
    with pytest.raises(KeyboardInterrupt): store.add(digits.select(range(12, 22)), progress=False)
    monkeypatch.undo()
    again = open_store(store.folder, store.objective)
    with pytest.raises(
        ValueError, match=r"16 of 22 samples.*row 16.*discard_missing\(\), which keeps the first 16"
    ):
        again.influence(query)
    assert again.discard_missing() is again and len(again) == len(Store(store.folder)) == 16
    assert torch.equal(again.influence(query).values[:, :12], scores)
    whole = open_store(store.folder, store.objective, digits.select(range(16)))
    assert len(whole.add(digits.select(range(16, 18)), progress=False)) == 18 and len(whole.samples) == 18


def test_discarding_leaves_whole_what_was_before(tmp_path):
    """Also where a shard holds rows on both sides of the first missing one, and where nothing would be left.

    """
    store = Store.create(
        tmp_path / "s",
        Manifest("x", "y", 10**4, [0, 1], 16, dtype="int8", sample_ids=[f"{i}" for i in range(9)]))
    draw = torch.randn(9, 2, 16)
    for rows in ([0, 5], [1, 2], [7, 8]): store.write(rows, draw[rows], torch.ones(2, 2), torch.ones(2, 2))
    before = store.vectors([0, 1, 2])
    store.discard_missing()
    assert len(store) == len(Store(store.folder)) == 3 and torch.equal(Store(store.folder).vectors(), before)
    assert sorted(p.name for p in store.folder.glob("shard*")) == [
        "shard-00000000.safetensors",
        "shard-00000001.safetensors"]
    none = Store.create(tmp_path / "none", Manifest("x", "y", 10**4, [0, 1], 16, sample_ids=["a"]))
    with pytest.raises(ValueError, match="none of its first samples"): none.discard_missing()


def test_samples_that_are_there_already(store, digits):
    with pytest.warns(
        UserWarning,
        match="1 of 2 new samples, such as new sample 1, are in the store already.*duplicates='skip'",
    ):
        store.add(digits.select([12, 3]), progress=False)
    assert len(store) == 14
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(store.add(digits.select([13, 3, 12]), progress=False, duplicates="skip")) == 15
        assert len(store.add(digits.select([3, 12]), progress=False, duplicates="skip")) == 15
    assert len(store.samples) == 15 and store.missing() == []
    with pytest.raises(ValueError, match="duplicates='drop'"):
        store.add(digits.select([1]), duplicates="drop")


def test_classes_of_new_samples(store, digits):
    image = digits[20]["image"]
    for bad in (10, -2, "ten"):
        with pytest.raises(ValueError, match=f"label={bad!r} of new sample 0 is no class.*choose 0 to 9"):
            store.add([{"image": image, "label": bad}], progress=False)
    other = Dataset.from_dict(
        {"image": [image], "label": [0]},
        Features({"image": digits.features["image"], "label": ClassLabel(names=["9", "8"])}))
    store.add(other, progress=False)
    assert store.samples[-1]["label"] == 9   # class 0 there is called 9
    with pytest.raises(ValueError, match="label='x'"):
        store.add(other.cast_column("label", ClassLabel(names=["x", "y"])), progress=False)


def test_labels_that_changed_are_noticed(store, pipe, digits):
    same = digits.select(range(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_store(store.folder, pipe, same)
        store.add(digits.select([12]), progress=False)
        open_store(store.folder, pipe, digits.select(range(13)))
    labels = [(x + 1) % 10 for x in digits["label"][:13]]
    renamed = (
        digits.select(range(13))
        .remove_columns("label")
        .add_column("label", labels)
        .cast_column("label", digits.features["label"]))
    with pytest.warns(UserWarning, match="label of the samples are not what they were"):
        open_store(store.folder, pipe, renamed)
    other = digits.select(range(13)).cast_column("label", ClassLabel(names=list("abcdefghij")))
    with pytest.warns(UserWarning, match="label of the samples"): collect(pipe, other, store.folder, **RECIPE)


# noise, encoding, broken models

def test_noises_are_split_over_passes(pipe, digits):
    """No pass has more rows than `batch_size`, no more noise is drawn at a time, and the gradient is that of
    all at once.
    """
    objective, rows = make_objective(pipe), digits.select(range(2))
    draw, loss, drawn, passes = objective.draw_noise, objective.loss, [], []
    objective.draw_noise = lambda t, seed=0, noises=1: (
        drawn.append(len(noises) * len(t)),
        draw(t, seed, noises),
    )[1]
    objective.loss = lambda encoded, t, eps: (passes.append(len(t)), loss(encoded, t, eps))[1]
    found = sample_gradients(
        objective, rows, torch.tensor([10, 500]), Compressor(64), noises=11, batch_size=4, verify=True)
    assert max(drawn) <= 4 and max(passes) <= 4
    at_once = sample_gradients(
        make_objective(pipe), rows, torch.tensor([10, 500]), Compressor(64), noises=11, batch_size=64)
    for a, b in zip(found[:3], at_once[:3]): assert (a - b).norm() / b.norm() < 1e-5


def test_an_encoder_without_no_grad(pipe, digits, tmp_path):
    """A user's objective whose encoding is differentiable, through a network of its own."""
    scale = torch.nn.Parameter(torch.ones(()))

    class Scaled(DDPMObjective):
        def encode(self, samples, names=None): return {"z0": super().encode(samples, names)["z0"] * scale}
    store = collect(Scaled(pipe), digits.select(range(6)), tmp_path, **RECIPE)
    plain = collect(pipe, digits.select(range(6)), tmp_path / "plain", **RECIPE)
    assert torch.equal(store.vectors(), plain.vectors())


def test_weights_that_are_not_a_number(digits, tmp_path):
    pipe = make_pipeline()
    with torch.no_grad(): pipe.unet.conv_in.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss of sample 0 at timestep 0 is nan"):
        collect(pipe, digits.select(range(2)), tmp_path / "s", **RECIPE)


def test_a_cached_query_is_kept_for_the_same_images_only(store, digits):
    first = store.gradients(digits.select([2]))
    assert store.gradients(digits.select([2])) is first
    assert not torch.equal(store.gradients(digits.select([3])).compressed, first.compressed)


def test_checksums_tell_names_shapes_and_types_apart():
    x = torch.arange(6, dtype=torch.int32)
    found = [
        checksum(t)
        for t in ({"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.view(torch.float32)}, {"a": x + 1})]
    assert len({*found}) == 5


def test_html_is_escaped(store, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    rows = Dataset.from_dict(
        {
            "image": [Image.fromarray(np.full((8, 8), i, dtype=np.uint8)) for i in range(4)],
            "prompt": [evil] * 4,
            "subset": [evil] * 4})
    s = collect(make_pipeline(), rows, tmp_path / "evil", **RECIPE)
    scores = s.influence(rows.select([0]))
    for page in (
        scores._repr_html_(),
        (scores.top(2) + scores.bottom(2))._repr_html_(),
        Store(s.folder).influence(s.gradients(rows.select([0]))).top(2)._repr_html_(),
    ):
        assert "<script" not in page and "<img src=x" not in page


def test_a_store_that_may_only_be_read_opens(store, pipe, digits):
    """One of an older version, too, which has no note of its labels."""
    (store.folder / "columns.json").unlink()
    let_others_in(store.folder)
    store.folder.chmod(0o555)
    try:
        with as_nobody(): assert open_store(store.folder, pipe, digits.select(range(12))).missing() == []
    finally: store.folder.chmod(0o755)
    collect(pipe, digits.select(range(12)), store.folder, **RECIPE)
    assert (store.folder / "columns.json").exists()
