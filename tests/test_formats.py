"""What a store is on the disk over its life: format 1, ids appended, shards that become one, and kills between.

Synthetic gradients, real files; every kill is one between two writes.
"""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dmin.core.shards
from dmin import collect, open_store
from dmin.core.dtypes import DTYPES
from dmin.core.gradients import Gradients
from dmin.core.shards import Manifest, read_manifest, ShardFolder
from dmin.core.store import Store

RECIPE = dict(v=64, timesteps=2, shard_size=4, progress=False)


def write(store, rows):
    """Numbers that depend on the row alone."""
    shape = len(rows), len(store.manifest.timesteps)
    c = [torch.randn(shape[1], store.manifest.width, generator=torch.Generator().manual_seed(i)) for i in rows]
    store.write(rows, torch.stack(c), torch.ones(shape), torch.ones(shape))


def synthetic(folder, n=40, **more):
    ids = [f"{i:016x}" for i in range(n)]
    store = Store.create(folder, Manifest("x", "y", 10**4, [0, 1], 16, shard_size=4, sample_ids=ids, **more))
    for i in range(0, n, 4): write(store, range(i, min(n, i + 4)))
    return store


def names(folder): return sorted(p.name for p in Path(folder).glob("shard-*"))


def as_format_1(folder):
    """The folder as dmin wrote it before there was a `samples.txt`: shards are the same files."""
    manifest = read_manifest(folder)
    text = manifest.recipe() | {"sample_ids": manifest.sample_ids, "format": 1}
    (folder / "manifest.json").write_text(json.dumps(text))
    (folder / "samples.txt").unlink()


def test_a_store_of_format_1_is_read_and_grows(pipe, digits, tmp_path):
    """Nothing is computed again, nothing is lost; what changes it writes format 2."""
    store = collect(pipe, digits.select(range(12)), tmp_path / "s", **RECIPE)
    before = {p.name: p.read_bytes() for p in store.folder.glob("shard-*")}
    good = store.influence(digits.select([3])).values
    as_format_1(store.folder)
    again = collect(pipe, digits.select(range(12)), store.folder, **RECIPE)
    assert not (store.folder / "samples.txt").exists() and again.manifest.format == 1
    assert torch.equal(again.influence(digits.select([3])).values, good)
    again.add(digits.select(range(12, 16)), progress=False)
    assert json.loads((store.folder / "manifest.json").read_text())["format"] == 2
    opened = open_store(store.folder, pipe, digits.select(range(16)))
    assert torch.equal(opened.influence(digits.select([3])).values[:, :12], good)
    assert all((store.folder / name).read_bytes() == x for name, x in before.items())


def test_ids_are_appended(tmp_path):
    store = synthetic(tmp_path / "s")
    path = store.folder / "samples.txt"
    before, inode = path.read_bytes(), path.stat().st_ino
    store.extend(["one more", "another"])
    assert path.read_bytes() == before + b"one more\nanother\n" and path.stat().st_ino == inode
    assert Store(store.folder).manifest.sample_ids[-2:] == ["one more", "another"]
    assert len((store.folder / "manifest.json").read_text()) < 600


def test_ids_of_a_process_that_was_killed_are_in_nobodys_way(tmp_path, monkeypatch):
    killed_at(monkeypatch, dmin.core.shards, "_write_recipe", 0)
    with pytest.raises(Killed): synthetic(tmp_path / "s")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["samples.txt"]
    with pytest.raises(FileExistsError, match="samples.txt.*Move the file away"): synthetic(tmp_path / "s", 8)
    assert synthetic(tmp_path / "s").missing() == [] and len(Store(tmp_path / "s")) == 40


def test_ids_cannot_hold_line_breaks():
    with pytest.raises(ValueError, match="line break"): Manifest("x", "y", 8, [0], 4, sample_ids=["a", "b\nc"])


@pytest.mark.parametrize("change, said", [
    (lambda x: x[:-3], "does not begin with the ids"), (lambda x: x.replace(b"3", b"4"), "does not begin with"),
    (lambda x: b"", "does not begin"), (lambda x: None, "is not there")])
def test_other_ids_than_the_manifests_are_noticed(tmp_path, change, said):
    store = synthetic(tmp_path / "s")
    path, changed = store.folder / "samples.txt", change((store.folder / "samples.txt").read_bytes())
    path.unlink() if changed is None else path.write_bytes(changed)
    with pytest.raises(ValueError, match=f"samples.txt.*{said}"): Store(store.folder)
    with pytest.raises(ValueError, match="samples.txt.*damaged"): store.extend(["one more"]), Store(store.folder)


@pytest.mark.parametrize("change", [{"samples": None}, {"samples": 8}, {"samples": {}}, {"samples": {"bytes": "a", "sha256": ""}}])
def test_a_manifest_that_does_not_tell_of_its_ids(tmp_path, change):
    path = synthetic(tmp_path / "s").folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="manifest.json|samples.txt"): Store(path.parent)


class Killed(BaseException): pass


def killed_at(monkeypatch, module, function, call):
    """The process dies when it is about to call a function for the n-th time."""
    real, calls = getattr(module, function), []

    def dying(*args, **options):
        calls.append(0)
        if len(calls) > call: raise Killed
        return real(*args, **options)
    monkeypatch.setattr(module, function, dying)


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize("function, call", [("_write_recipe", 0), ("_write_recipe", 1), ("_write_ids", 0)])
@pytest.mark.parametrize("change", ["extend", "discard", "replace"])
def test_killed_while_the_samples_change(tmp_path, monkeypatch, format, function, call, change):
    """Between any two writes the folder is a whole store: as it was, or of fewer of its samples."""
    store = synthetic(tmp_path / "s")
    if change == "discard": store.extend(["more"])
    if format == 1: as_format_1(store.folder)
    store = Store(store.folder)
    before = store.manifest.sample_ids
    other = replace(store.manifest, sample_ids=[*before[:36], "x", "y"])
    changes = {
        "extend": lambda s: s.extend(["one", "two"]), "discard": lambda s: s.discard_missing(),
        "replace": lambda s: s._source.put(other)}
    killed_at(monkeypatch, dmin.core.shards, function, call)
    try: changes[change](store)
    except Killed: pass
    monkeypatch.undo()
    if change == "replace":   # as `restart` does where no shard is
        for name in names(store.folder): (store.folder / name).unlink()
    found = Store(store.folder).manifest.sample_ids
    wanted = {"extend": [*before, "one", "two"], "discard": before[:40], "replace": other.sample_ids}[change]
    assert found in ((before, wanted, before[:36]) if change == "replace" else (before, wanted))
    changes[change](Store(store.folder))
    assert Store(store.folder).manifest.sample_ids[:len(wanted)] == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_become_one(tmp_path, monkeypatch, dtype):
    """To the bit what it was, in fewer files; and a second time nothing is left to do."""
    store = synthetic(tmp_path / "s", 40, dtype=dtype)
    one = Gradients(torch.randn(3, 2, 16), torch.ones(3, 2), torch.ones(3, 2))
    stored, scores, losses = store.vectors(), store.influence(one).values, store.per_sample("losses")
    monkeypatch.setattr("dmin.core.shards.FILES", 3)
    store.merge_shards()
    few = names(store.folder)
    assert len(few) <= 5
    for s in (store, Store(store.folder)):
        assert torch.equal(s.vectors(), stored) and torch.equal(s.influence(one).values, scores)
        assert torch.equal(s.per_sample("losses"), losses) and s.missing() == [] and s._files.left_over == []
    store.merge_shards()
    assert names(store.folder) == few


def test_few_shards_stay_as_they_are(tmp_path):
    store = synthetic(tmp_path / "s")
    before = names(store.folder)
    store.merge_shards()
    assert names(store.folder) == before


def test_collecting_and_adding_merge(pipe, digits, tmp_path, monkeypatch):
    monkeypatch.setattr("dmin.core.shards.FILES", 2)
    store = collect(pipe, digits.select(range(24)), tmp_path / "s", **RECIPE)
    assert len(names(store.folder)) == 2
    store.add(digits.select(range(24, 40)), progress=False)
    assert len(names(store.folder)) <= 5
    monkeypatch.undo()
    plain = collect(pipe, digits, tmp_path / "plain", **RECIPE)
    assert len(names(plain.folder)) == 10 and torch.equal(store.vectors(), plain.vectors())


@pytest.mark.parametrize("unlinked", range(4))
def test_killed_while_shards_become_one(tmp_path, monkeypatch, unlinked):
    """Rows that are twice in the folder are read once, and the next run cleans up."""
    store = synthetic(tmp_path / "s")
    one = Gradients(torch.randn(1, 2, 16), torch.ones(1, 2), torch.ones(1, 2))
    scores, best = store.influence(one).values, store.search(one, 40).rows
    monkeypatch.setattr("dmin.core.shards.FILES", 2)
    killed_at(monkeypatch, Path, "unlink", unlinked)
    with pytest.raises(Killed): Store(store.folder).merge_shards()
    monkeypatch.undo()
    again = Store(store.folder)
    assert again.missing() == [] and again._files.left_over
    assert torch.equal(again.influence(one).values, scores) and torch.equal(again.search(one, 40).rows, best)
    again.merge_shards()
    assert Store(store.folder)._files.left_over == []
    assert torch.equal(Store(store.folder).influence(one).values, scores)


def test_a_store_that_was_open_while_shards_became_one(tmp_path, monkeypatch):
    """What it has mapped stays right; where it would read another file than it knows, it says so."""
    folder = synthetic(tmp_path / "s").folder
    used, fresh = Store(folder), Store(folder)
    good = used.vectors()
    monkeypatch.setattr("dmin.core.shards.FILES", 2)
    Store(folder).merge_shards()
    assert torch.equal(used.vectors(), good)
    for ask in (fresh.vectors, lambda: fresh.per_sample("norms"), lambda: list(fresh.shards())):
        with pytest.raises(ValueError, match="is not what it was when this store was opened.*Open the store"): ask()
    assert torch.equal(Store(folder).vectors(), good)


def test_a_writer_that_comes_late_replaces_nothing(tmp_path, monkeypatch):
    """It knows a shard as missing that others have written and merged; what it writes is left over."""
    store = synthetic(tmp_path / "s")
    late = Store(store.folder)
    late._files.forget("shard-00000000.safetensors")
    monkeypatch.setattr("dmin.core.shards.FILES", 2)
    store.merge_shards()
    good, few = store.vectors(), names(store.folder)
    write(late, range(4))
    again = Store(store.folder)
    assert again._files.left_over == ["shard-00000000.safetensors"] and again.missing() == []
    assert torch.equal(again.vectors(), good) and set(few) < set(names(store.folder))


def test_two_that_write_the_same_end_with_the_bytes_of_one(tmp_path):
    """Neither is told that the other was quicker, whoever is ahead."""
    one = synthetic(tmp_path / "one", 12)
    a = Store.create(tmp_path / "two", one.manifest)
    b = Store(a.folder)
    write(a, range(4)), write(a, range(4, 8)), write(b, range(4)), write(b, range(4, 8)), write(b, range(8, 12))
    write(a, range(8, 12))
    for name in names(one.folder): assert (a.folder / name).read_bytes() == (one.folder / name).read_bytes()
    assert a.missing() == b.missing() == [] and names(a.folder) == names(one.folder)


def test_merging_looks_anew(tmp_path, monkeypatch):
    """A store that has mapped the shards of before, after another process was killed while it merged."""
    store = synthetic(tmp_path / "s")
    good = store.vectors()   # all are mapped
    monkeypatch.setattr("dmin.core.shards.FILES", 2)
    with monkeypatch.context() as m:
        killed_at(m, Path, "unlink", 1)
        with pytest.raises(Killed): Store(store.folder).merge_shards()
    store.merge_shards()
    for s in (store, Store(store.folder)):
        assert torch.equal(s.vectors(), good) and s._files.left_over == [] and len(names(s.folder)) <= 4


def test_a_store_opens_while_another_process_merges_it(tmp_path, monkeypatch):
    """A file is gone between listing the folder and reading it."""
    store = synthetic(tmp_path / "s")
    good, read = store.vectors(), dmin.core.shards.read_shard
    monkeypatch.setattr("dmin.core.shards.FILES", 2)

    def merged_meanwhile(*arguments, **options):
        monkeypatch.setattr("dmin.core.shards.read_shard", read)
        other.merge_shards()
        return read(*arguments, **options)
    other = Store(store.folder)
    monkeypatch.setattr("dmin.core.shards.read_shard", merged_meanwhile)
    assert torch.equal(Store(store.folder).vectors(), good)
    for ask in (store.nbytes, store.shard_sizes, lambda: repr(store)):
        with pytest.raises(ValueError, match="is not what it was when this store was opened"): ask()


def test_other_peoples_ids_stay(tmp_path):
    theirs = b"my own notes\n"
    (tmp_path / "new").mkdir(), (tmp_path / "new" / "samples.txt").write_bytes(theirs)
    with pytest.raises(FileExistsError, match="samples.txt.*something else"): synthetic(tmp_path / "new")
    older = synthetic(tmp_path / "older")
    as_format_1(older.folder)
    (older.folder / "samples.txt").write_bytes(theirs)
    with pytest.raises(FileExistsError, match="samples.txt.*something else"): Store(older.folder).extend(["x"])
    for name in ("new", "older"): assert (tmp_path / name / "samples.txt").read_bytes() == theirs
    assert Store(older.folder).missing() == [] and len(Store(older.folder)) == 40


def test_a_refresh_after_anothers_add_names_that(tmp_path):
    store = synthetic(tmp_path / "s")
    other = Store(store.folder)
    other.extend(["more"]), write(other, [40])
    with pytest.raises(ValueError, match="has changed since this store was opened"): store.refresh()


def test_a_store_that_became_format_2_meanwhile_keeps_its_ids(tmp_path, monkeypatch):
    """Its samples are the same again, so it may go on; its file is appended to, not begun anew."""
    store = synthetic(tmp_path / "s")
    as_format_1(store.folder)
    before, other = Store(store.folder), Store(store.folder)
    other.extend(["more"]), other.discard_missing()
    killed_at(monkeypatch, dmin.core.shards, "_write_recipe", 0)
    with pytest.raises(Killed): before.extend(["another"])
    monkeypatch.undo()
    assert len(Store(store.folder)) == 40


def test_a_complete_store_is_not_written_to(pipe, digits, tmp_path, monkeypatch):
    collect(pipe, digits.select(range(24)), tmp_path / "s", **RECIPE)
    before = names(tmp_path / "s")
    monkeypatch.setattr("dmin.core.shards.FILES", 2)
    monkeypatch.setattr("dmin.core.shards.write_tensors", lambda *_: pytest.fail("a shard was written"))
    assert collect(pipe, digits.select(range(24)), tmp_path / "s", **RECIPE).missing() == []
    assert names(tmp_path / "s") == before


def test_a_merge_that_cannot_be_now_is_said(pipe, digits, tmp_path, monkeypatch):
    monkeypatch.setattr("dmin.core.shards.FILES", 2)
    monkeypatch.setattr("dmin.core.shards._merge", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.warns(UserWarning, match="is complete, with as many shards as before.*No space left"):
        store = collect(pipe, digits.select(range(24)), tmp_path / "s", **RECIPE)
    assert store.missing() == [] and len(store.vectors()) == 24


def test_a_row_in_two_shards_is_refused(tmp_path):
    a, b = synthetic(tmp_path / "a", 12), Store.create(tmp_path / "b", synthetic(tmp_path / "c", 12).manifest)
    write(b, [3, 5])
    (a.folder / "shard-00000004.safetensors").unlink()
    shutil.copy(b.folder / "shard-00000003.safetensors", a.folder)
    with pytest.raises(ValueError, match="shard-00000003.*row 3 is in another shard too"): Store(a.folder)


def flip_a_bit(path):
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.write_bytes(whole)


def test_a_shard_is_verified_when_it_is_first_read_and_once(tmp_path, monkeypatch):
    store = synthetic(tmp_path / "s")
    good = store.vectors()
    flip_a_bit(store.folder / "shard-00000008.safetensors")
    opened = ShardFolder(store.folder)
    opened.vectors([0, 20])
    for ask in (opened.verify, opened.vectors, lambda: opened.vectors([9]), lambda: opened.per_sample("norms")):
        with pytest.raises(ValueError, match="shard-00000008.*checksum is wrong"): ask()
    unverified = ShardFolder(store.folder, verify=False)
    assert not torch.equal(unverified.vectors(), good)
    read, verified = dmin.core.shards.read_shard, []
    monkeypatch.setattr(
        "dmin.core.shards.read_shard", lambda source, name, v: (verified.append(v), read(source, name, v))[1])
    monkeypatch.setattr("dmin.core.shards.OPEN_SHARDS", 1)   # so that each is opened again and again
    others = [i for i in range(40) if not 8 <= i < 12]
    for _ in range(3): opened.vectors(others)
    assert verified.count(True) == 9 - 3 and len(verified) > 20


def test_damage_gets_no_checksum_of_its_own(tmp_path, monkeypatch):
    """What is written anew is verified before, even in a store that was opened unverified."""
    whole = synthetic(tmp_path / "whole")
    torn = Store.create(tmp_path / "torn", replace(whole.manifest, sample_ids=whole.manifest.sample_ids[:12]))
    for rows in (range(4), range(4, 8), [8, 10, 11]): write(torn, rows)   # 9 is missing: 10 and 11 go
    monkeypatch.setattr("dmin.core.shards.FILES", 2)
    for store, change in ((whole, Store.merge_shards), (torn, Store.discard_missing)):
        flip_a_bit(store.folder / "shard-00000008.safetensors")
        damaged = (store.folder / "shard-00000008.safetensors").read_bytes()
        with pytest.raises(ValueError, match="shard-00000008.*checksum is wrong"):
            change(Store(store.folder, verify=False))
        assert (store.folder / "shard-00000008.safetensors").read_bytes() == damaged
