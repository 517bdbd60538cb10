"""A report says what its scores say, and refuses what a filed page may not be made of."""
import re

import pytest
from conftest import make_pipeline

from dmin import collect, DMin, open_store, report
from dmin.methods.similarity import RawPixels
from dmin.methods.stability import collect_seeds, Repeated

RECIPE = dict(v=64, timesteps=2, progress=False)


@pytest.fixture(scope="module")
def store(digits, tmp_path_factory):
    return collect(make_pipeline(), digits, tmp_path_factory.mktemp("report") / "s", **RECIPE)


def rows_of(text): return [int(x) for x in re.findall(r">row (\d+)<", text)]


def test_what_is_in_it(store, digits, tmp_path):
    asked = digits.select([3, 17])
    methods = [DMin(store), RawPixels(digits)]
    path = report(store, asked, methods, tmp_path / "new" / "r.html", k=4, by=["label"])
    text = path.read_text(encoding="utf-8")
    rankings, groups = text.split("<h2>By label")
    expected = []
    for q in range(2):   # each query by each method
        for m in methods: expected += m.influence(asked).top(4).rows[q].tolist()
    assert rows_of(rankings) == expected
    assert all(name in rankings for name in ("DMin", "Raw pixels", "Agreement", "Of DMin (v=64) one ranking was made"))
    best = DMin(store).influence(asked).by("label", 4).to_pandas().iloc[0]
    assert f"{best['label']}: excess" in groups
    for said in (store.manifest.model, store.manifest.fingerprint(), "noise 0, compression 0", "torch"):
        assert said in groups
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_alone_it_is_dmin_and_text(store, digits):
    text = report(store, digits[5]["image"], k=3)
    plain = report(store, digits[5]["image"], [RawPixels(digits)], k=3)
    assert "one ranking" not in plain and "No method reads a store" in plain
    assert rows_of(text)[0] == 5 and "Agreement" not in text and "By " not in text


def test_what_is_stable_is_marked(digits, tmp_path):
    stores = collect_seeds(make_pipeline(), digits, tmp_path / "s", 2, **RECIPE)
    text = report(stores[0], digits.select([5]), [Repeated(stores)], k=3)
    for store in stores: assert str(store.folder) in text and store.manifest.fingerprint() in text
    assert "stable (framed): among the first 3 under each of 2 seeds" in text
    stable = Repeated(stores).influence(digits.select([5])).top(3).stable.sum()
    assert f">2</td><td>{stable:.1f}</td>" in re.sub(r' style="[^"]*"', "", text) and "one ranking" not in text


def test_a_damaged_file_is_not_filed(digits, tmp_path):
    store = collect(make_pipeline(), digits.select(range(4)), tmp_path / "s", **RECIPE)
    shard = next(store.folder.glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    for verify in (True, False):
        again = open_store(tmp_path / "s", make_pipeline(), digits.select(range(4)), verify=verify)
        with pytest.raises(ValueError, match="checksum"):
            report(again, digits.select([0]), path=tmp_path / "r.html")
    with pytest.raises(ValueError, match="checksum"): report(store, digits.select([0]))   # which knew it before
    assert not (tmp_path / "r.html").exists()


def test_where_it_cannot_be_written(store, digits, tmp_path):
    class Slow(DMin):
        def influence(self, *_, **__): raise AssertionError("asked before the place was looked at")

    with pytest.raises(IsADirectoryError, match="is a folder"):
        report(store, digits.select([0]), [Slow(store)], path=tmp_path)


def test_what_cannot_be(store, digits):
    with pytest.raises(ValueError, match="two methods have one name"):
        report(store, digits.select([0]), [DMin(store), DMin(store)])
    class Slow(DMin):
        def influence(self, *_, **__): raise AssertionError("asked before all was checked")

    backwards = digits.select(range(len(digits) - 1, -1, -1))
    for others in (digits.select(range(12)), backwards):   # their rows are other pictures
        with pytest.raises(ValueError, match="Raw pixels ranks .* other training samples than those of"):
            report(store, digits.select([0]), [DMin(store), RawPixels(others)], k=3)
    for wrong, said in ((dict(by=["artist"]), "no such column"), (dict(k=41), "k=41"), (dict(by="label"), "a list")):
        with pytest.raises(ValueError, match=said): report(store, digits.select([0]), [Slow(store)], **wrong)


def test_a_store_without_its_pipeline_is_told_before_anything_is_asked(store, digits):
    class Slow(RawPixels):
        def scores(self, queries, region=None): raise AssertionError("asked")
    alone = open_store(store.folder, None, digits)
    with pytest.raises(ValueError, match="does not know its pipeline"): report(alone, digits.select([5]), [Slow(digits)])
