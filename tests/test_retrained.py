"""Outputs of retrained models: damage is noticed, nothing is lost, and what a kill left does not stay."""
import os
import random
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmin.measures.lds import random_subsets
from dmin.measures.retrained import Retrained
from dmin.reproduction.retraining_benchmark import RetrainingBenchmark, SHIPPED, UnconditionalRecipe

MASKS = random_subsets(20, 4)


def retrain(rows, seed):
    return {
        "losses": torch.randn(3, 2, generator=torch.Generator().manual_seed(int(rows.sum()) + seed)),
        "images": torch.zeros(3, 4, 4, dtype=torch.uint8)}


@pytest.fixture
def built(tmp_path):
    return Retrained(tmp_path / "outputs", {"recipe": 1}).build(MASKS, retrain, progress=False)


def again(built): return Retrained(built.folder, {"recipe": 1})


@pytest.mark.parametrize("packed", [False, True], ids=["single files", "packed"])
def test_any_flipped_bit_is_refused_or_reads_the_same(built, packed):
    if packed: built.pack()
    good, draw = again(built).outputs(MASKS), random.Random(0)
    path = sorted(built.folder.glob("*.safetensors"))[0]
    whole, refused = path.read_bytes(), 0
    for _ in range(80):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings(record=True): found = again(built).outputs(MASKS)
        except ValueError as e:
            refused += 1
            assert (
                path.name in str(e)
                and "trained again" in str(e)
                or "no output" in str(e)
                or "are not in" in str(e))
        else: assert torch.equal(found, good)   # the bit was one of those that say nothing
    assert refused >= 60
    path.write_bytes(whole)
    assert torch.equal(again(built).outputs(MASKS), good)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_description_that_was_cut_short(built, text):
    (built.folder / "about.json").write_text(text)
    with pytest.raises(ValueError, match="about.json.*(cannot be read|holds a).*restore it"): again(built)


def test_outputs_of_an_older_version_are_read_and_get_a_checksum(built):
    good = again(built).outputs(MASKS)
    for path in built.folder.glob("*.safetensors"): save_file(load_file(path), path)
    with pytest.warns(UserWarning, match=r"has no checksum.*pack\(\) adds one"):
        old = again(built).outputs(MASKS)
    assert torch.equal(old, good)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again(built).pack()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = again(built).outputs(MASKS)
    assert (packed - good).abs().max() <= 2**-11 * (good - good.mean((0, 1))).abs().max() * 1.001
    assert [p.name for p in built.folder.glob("*.safetensors")] == ["models.safetensors"]


def packed(name): return (RetrainingBenchmark(name).folder / "halves" / "models.safetensors").exists()


@pytest.mark.parametrize("name", ["digits", *(name for name in SHIPPED if name != "digits" and packed(name))])
def test_the_shipped_outputs_are_complete_and_have_a_checksum(name):
    from dmin.core.files import read_tensors
    bench, shipped = RetrainingBenchmark(name), SHIPPED[name]
    tensors, about = read_tensors(bench.folder / "halves" / "models.safetensors", "")
    assert about["sha256"] and len(tensors) >= shipped.halves * shipped.seeds + shipped.other_halves
    assert not bench.retrained.missing(bench.halves, bench.seeds)
    assert bench.measured(bench.halves)["loss"].shape == (shipped.halves, shipped.seeds, len(bench.queries))


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    retrained = Retrained("outputs", {})
    monkeypatch.chdir(tmp_path / "b")
    retrained.build(MASKS[:1], retrain, progress=False)
    assert len(list((tmp_path / "a" / "outputs").glob("model-*"))) == 1 and not list(
        (tmp_path / "b").iterdir())


def test_what_a_kill_left_is_removed(built):
    left = built.folder / ".model-0011-0.safetensors.00112233aabbccdd.tmp"
    left.write_bytes(b"half"), os.utime(left, (time.time() - 60,) * 2)
    theirs = built.folder / ".~lock.model.tmp"
    theirs.write_bytes(b"theirs"), os.utime(theirs, (0, 0))
    built.build(MASKS, retrain, progress=False)
    assert not left.exists() and theirs.exists()


def test_a_benchmarks_models_appear_whole(tmp_path, monkeypatch):
    """A disk that fills while a model is saved leaves no half of one."""
    recipe = UnconditionalRecipe(
        samples=12, steps=3, batch_size=4, queries=2, sampler_steps=2, timesteps=2, noises=1)
    benchmark = RetrainingBenchmark(
        "digits", tmp_path / "b", recipe, halves=1, other_halves=1, seeds=1)
    (tmp_path / "b").mkdir()
    def full(self, folder, **_):
        (folder / "config.json").write_text("half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("diffusers.DDPMPipeline.save_pretrained", full)
    with pytest.raises(OSError, match="seed-0-early.*Is the disk full"): benchmark.build(progress=False)
    assert list((tmp_path / "b").iterdir()) == []


def test_packing_again_keeps_what_is_there_and_what_came_later(built):
    """Differences in float16 are rounded once: a second pack with other models moves them by no more."""
    good = again(built).outputs(MASKS)
    built.pack()
    later = random_subsets(20, 3, seed=5)
    more = again(built).build(later, retrain, progress=False)
    new = more.outputs(later)
    more.pack()
    bound = 2**-10 * torch.cat([good, new]).abs().max()   # two roundings of differences of twice the size
    assert (again(built).outputs(MASKS) - good).abs().max() <= bound
    assert (again(built).outputs(later) - new).abs().max() <= bound


def test_packing_what_is_packed_changes_nothing(built):
    path = built.pack()
    before = path.read_bytes()
    assert again(built).pack() == path and path.read_bytes() == before


def test_outputs_that_differ_too_much_for_half_precision_stay_whole(tmp_path):
    def far_apart(rows, seed): return {"losses": torch.tensor([float(rows.sum()) * 1e6])}
    built = Retrained(tmp_path / "x", {}).build(MASKS, far_apart, progress=False)
    good = built.outputs(MASKS)
    built.pack()
    assert torch.equal(built.outputs(MASKS), good)


def test_nothing_is_packed_into_nothing(tmp_path):
    Retrained(tmp_path / "x", {}).pack()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["about.json"]


def test_models_of_early_training_do_not_say_where_their_base_was(tmp_path):
    """A model that is tuned from a base carries the base's folder in its configuration."""
    recipe = UnconditionalRecipe(dataset="clipart_10", samples=8, size=16, in_channels=3, base="ddpm-drawings", steps=3,
                                 batch_size=4, queries=2, sampler_steps=2, timesteps=2, noises=1)
    RetrainingBenchmark("clipart", tmp_path / "b", recipe, halves=2, seeds=1).build(progress=False)
    written = list((tmp_path / "b").rglob("*.json"))
    assert any("early" in str(path) for path in written)
    assert not [path for path in written if "_name_or_path" in path.read_text()]
