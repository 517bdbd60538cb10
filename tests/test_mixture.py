"""The mixture: the paper's arithmetic on repositories of the Hub's shape, noise, and what changed upstream.

"""
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from dmin.reproduction.mixture import (
    add_noise, AUTHORS, build_mixture, load_mixture, NOISES, plan_mixture, Subset, SUBSETS)

PUBLISHED = {"flowers": (162, 34), "lego_sets": (40, 21), "magic_cards": (1541, 375)}   # DMin, Table 1


def repository(folder, rows, caption, extra=(), image="image"):
    folder.mkdir(parents=True)
    pictures = [Image.new("RGB", (3, 2), (i % 256, i // 256, 7)) for i in range(rows)]
    columns = {
        image: pictures,
        caption: [f"{folder.name} {i}" for i in range(rows)],
        **{c: ["x"] * rows for c in extra}}
    features = {image: ImageFeature(), caption: Value("string"), **{c: Value("string") for c in extra}}
    Dataset.from_dict(columns, Features(features)).to_parquet(folder / "train-00000-of-00001.parquet")


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """The six data sets with their columns and numbers of rows, of tiny images."""
    folder = tmp_path_factory.mktemp("hub")
    for name, s in SUBSETS["paper"].items():
        repository(folder / s.where, s.rows, s.caption, extra=("jp_text",) if name == "pokemon" else ())
    return folder


@pytest.fixture(scope="session")
def paper(hub):
    return {split: load_mixture("paper", split, size=4, source=hub) for split in ("train", "test")}


def test_the_papers_arithmetic(paper):
    train, test = paper["train"], paper["test"]
    assert (len(train), len(test)) == (9288, 2323)
    assert sum(train["noised"]) + sum(test["noised"]) == 552
    for split, where in ((train, 0), (test, 1)):
        counts = Counter(split["subset"])
        # the paper's draw is not published: near, in deviations of a random draw
        for name, published in PUBLISHED.items():
            rows = SUBSETS["paper"][name].rows * 1.05
            assert abs(counts[name] - published[where]) < 4 * (rows * 0.8 * 0.2) ** 0.5 + 0.06 * rows, (
                name,
                counts[name])


def test_every_row_once_and_copies_of_rows_that_exist(paper):
    rows = [r for split in paper.values() for r in split.remove_columns("image")]
    clean, noised = [r for r in rows if not r["noised"]], [r for r in rows if r["noised"]]
    assert (
        sorted(r["origin"] for r in clean) == list(range(11_059))
        and len({r["origin"] for r in noised}) == 552)
    of = {r["origin"]: r for r in clean}
    assert all(
        (of[r["origin"]]["prompt"], of[r["origin"]]["subset"], of[r["origin"]]["source"])
        == (r["prompt"], r["subset"], r["source"])
        for r in noised)
    assert (
        of[0]["source"] == "clint-greene/magic-card-captions/0" and of[0]["prompt"] == "magic-card-captions 0"
    )


def test_resized_without_a_crop(paper):
    assert paper["test"][0]["image"].size == (4, 4)
    noised = next(r for r in paper["train"] if r["noised"])
    original = next(
        r
        for split in paper.values()
        for r in split.select(np.flatnonzero(np.asarray(split["origin"]) == noised["origin"]))
        if not r["noised"])
    assert np.abs(np.asarray(noised["image"], int) - np.asarray(original["image"], int)).max() > 0


def test_other_seeds_are_other_mixtures():
    a, b, c = plan_mixture(500), plan_mixture(500), plan_mixture(500, seed=1)
    assert (
        np.array_equal(a.train, b.train)
        and not np.array_equal(a.train, c.train)
        and set(a.origin[500:]) != set(c.origin[500:]))


def test_mini_is_the_same_every_time():
    a, b = load_mixture("mini"), load_mixture("mini")
    assert a["prompt"][:] == b["prompt"][:] and all(
        x.tobytes() == y.tobytes() for x, y in zip(a["image"][:50], b["image"][:50]))
    assert len({s.split(":")[0] for s in a["source"]}) > 1 and all(a["source"])


def test_no_noise_at_all():
    assert len(load_mixture("mini", noise=0)) == int(0.8 * 1160) and not any(
        load_mixture("mini", noise=0)["noised"])


@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_of_the_strength_asked_for(kind):
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    change = (np.asarray(add_noise(grey, kind, .1), float) - 128) / 255
    expected = {"gaussian": .1, "uniform": .1 / 3 ** .5, "salt_and_pepper": (.1 * .25) ** .5}[kind]
    assert abs(change.mean()) < .01 and abs(change.std() - expected) < .1 * expected


def test_the_authors_release(tmp_path):
    folder = tmp_path / AUTHORS / "data"
    folder.mkdir(parents=True)
    for split, rows in (("train", 5), ("test", 2)):
        data = Dataset.from_dict(
            {"image": [Image.new("RGB", (3, 2))] * rows, "text": ["a"] * rows},
            Features({"image": ImageFeature(), "text": Value("string")}))
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    train = load_mixture("authors", size=8, source=tmp_path)
    assert (
        len(train) == 5
        and len(load_mixture("authors", "test", size=8, source=tmp_path)) == 2
        and train[0]["image"].size == (8, 8)
        and not any(train["noised"]))


@pytest.mark.parametrize("arguments, said", [
    (dict(name="maxi"), "choose one of mini, paper, authors"), (dict(split="val"), "choose train or test"), (dict(noise=2.), "choose 0 to 1"),
    (dict(noise_kind="pink"), "choose one of gaussian"), (dict(noise_strength=0), "more than 0"), (dict(size=0), "at least 1 pixel")])
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError) as e: load_mixture(**arguments)
    assert said in str(e.value)


def test_a_missing_copy(tmp_path):
    with pytest.raises(FileNotFoundError, match="magic-card-captions is not a folder"):
        load_mixture("paper", source=tmp_path)


@pytest.mark.parametrize("rows, caption, said", [(1915, "text", "has 1915 rows, expected 1916"), (1916, "caption", "no column 'text'; its columns are image, caption")])
def test_a_changed_upstream(tmp_path, rows, caption, said):
    repository(tmp_path / SUBSETS["paper"]["magic_cards"].where, rows, caption)
    with pytest.raises(ValueError) as e: load_mixture("paper", source=tmp_path)
    assert said in str(e.value) and "revision" in str(e.value)


def test_a_split_without_rows_is_empty(tmp_path):
    """Of one row, four fifths are none; it is in the other split."""
    repository(tmp_path / "a" / "b", 1, "text")
    mixture = {"one": Subset("a/b", "text", 1)}
    train, test = (build_mixture(mixture, split, source=tmp_path) for split in ("train", "test"))
    assert (len(train), len(test)) == (0, 1) and train.features == test.features
