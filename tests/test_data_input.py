"""Images, data sets and mixtures that are not what they should be are refused by name, with the way out; what
is shown is escaped.
"""
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from dmin import load_images, select_timesteps
from dmin.core.images import (
    height_and_width,
    as_samples,
    column_digests,
    images_to_tensor,
    sample_ids,
    to_rgb)
from dmin.reproduction.image_sets import _draw
from dmin.reproduction.claims import Comparison
from dmin.measures.costs import Cost, CostTable
from dmin.measures.detection import detection_table
from dmin.measures.lds import LDSTable
from dmin.measures.noised import noise_table
from dmin.measures.intervals import Interval
from dmin.measures.tables import Table
from dmin.reproduction.mixture import add_noise, build_mixture, load_mixture, plan_mixture, Subset
from dmin.core.show import attribution_html, Strip


def said(f, *args, error=ValueError, **options):
    """The error's words."""
    with pytest.raises(error) as e: f(*args, **options)
    return str(e.value)


def encoded(image, form="png", **options):
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def photo(seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 10, 3), np.uint8))
def files(*contents):
    return Dataset.from_dict({"image": [None if c is None else {"bytes": c, "path": None} for c in contents]},
                             features=Features({"image": ImageFeature()}))


# data sets

def test_a_transform_is_refused(digits):
    """Its images are others than those that are stored."""
    black = digits.with_transform(
        lambda rows: {k: [Image.new("L", (8, 8))] * len(rows["image"]) for k in ("image",)})
    for f in (as_samples, sample_ids):
        words = said(f, black)
        assert "transform" in words and "ds.map" in words and "reset_format" in words
    black.reset_format()
    assert sample_ids(black) == sample_ids(digits)


def test_other_formats_stay(digits):
    for form in ("numpy", "torch"): assert sample_ids(digits.with_format(form)) == sample_ids(digits)


def test_an_iterable_data_set_is_refused_before_it_is_read(digits):
    from datasets import IterableDataset

    def rows():
        raise AssertionError("it was read")
        yield
    for x in (IterableDataset.from_generator(rows), digits.to_iterable_dataset()):
        words = said(as_samples, x, error=TypeError)
        assert "IterableDataset" in words and "from_list(list(x.take(1000)))" in words


# turned photographs

def test_a_turned_photograph_is_one_sample_however_it_comes(tmp_path):
    (exif := Image.Exif())[ExifTags.Base.Orientation] = 6   # a quarter to the right
    path = tmp_path / "photo.jpg"
    photo().save(path, exif=exif, quality=95)
    ways = {
        "picture": Image.open(path),
        "row": {"image": Image.open(path)},
        "bytes": {"image": path.read_bytes()},
        "path": {"image": str(path)},
        "Path": {"image": path},
        "data set": files(path.read_bytes()),
        "paths": Dataset.from_dict({"image": [str(path)]}).cast_column("image", ImageFeature())}
    ids = {way: sample_ids(as_samples(x)) for way, x in ways.items()}
    assert len({tuple(x) for x in ids.values()}) == 1, ids
    tensors = [images_to_tensor(as_samples(x)["image"], (10, 6), 3) for x in ways.values()]
    for x in (
        *tensors,
        images_to_tensor([Image.open(path)], (10, 6), 3),
        images_to_tensor([to_rgb(Image.open(path))], (10, 6), 3),
    ):
        assert torch.equal(x, tensors[0])


def test_a_tiff_is_turned_once(tmp_path):
    (exif := Image.Exif())[ExifTags.Base.Orientation] = 6
    photo().save(path := tmp_path / "photo.tif", exif=exif)
    opened, read = as_samples(Image.open(path)), as_samples(files(path.read_bytes()))
    assert sample_ids(opened) == sample_ids(read) and opened[0]["image"].size == (6, 10)


# files that are no images

BROKEN = {
    "cut short": encoded(photo(), "jpeg")[:-60],
    "garbage": b"no image at all",
    "empty": b"",
    "a broken png": encoded(photo())[:80]}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(broken, tmp_path):
    good = encoded(photo())
    (path := tmp_path / "broken.png").write_bytes(broken)
    data_set = Dataset.from_list(
        [{"image": {"bytes": c, "path": None}} for c in (good, good, good)]
        + [{"image": {"bytes": None, "path": str(path)}}])
    data_set = data_set.cast_column("image", ImageFeature())
    rows = [{"image": c} for c in (good, good, good, broken)]
    for words in (
        said(sample_ids, data_set),
        said(as_samples, rows),
        said(sample_ids, files(good, good, good, broken)),
    ):
        assert (
            words.startswith("sample 3 cannot be read as an image")
            and "leave it out" in words
            and "select" in words)
    assert said(sample_ids, data_set, name="query").startswith("query 3 cannot")
    assert f"mend {path}, or leave it out, samples.select(" in said(sample_ids, data_set)


def test_a_missing_file_is_named(tmp_path):
    (path := tmp_path / "there.png").write_bytes(encoded(photo()))
    paths = [str(path), str(tmp_path / "missing.png")]
    data_set = Dataset.from_dict({"image": paths}).cast_column("image", ImageFeature())
    for words in (said(sample_ids, data_set), said(as_samples, [{"image": p} for p in paths])):
        assert words.startswith("sample 1 cannot be read") and "missing.png" in words


def test_a_picture_whose_file_is_cut_short_is_named():
    opened = [Image.open(io.BytesIO(encoded(photo()))), Image.open(io.BytesIO(BROKEN["cut short"]))]
    assert said(as_samples, opened).startswith("sample 1 cannot be read as an image")
    opened[1] = Image.open(io.BytesIO(BROKEN["cut short"]))
    assert said(images_to_tensor, opened, (6, 10), 3).startswith("image 1 cannot be read as an image")


def test_a_missing_image_is_named():
    assert said(sample_ids, files(encoded(photo()), None)).startswith(
        "sample 1 has no image (None): drop such rows")


@pytest.mark.parametrize("empty", [Image.new("RGB", (0, 5)), np.zeros((5, 0, 3), np.uint8), np.zeros((5, 0)), torch.zeros(5, 0, 3, dtype=torch.uint8)])
def test_images_without_pixels(empty):
    for words in (
        said(as_samples, [{"image": photo()}, {"image": empty}]),
        said(images_to_tensor, [photo(), empty], (6, 10), 3),
    ):
        assert "1 has 5×0 pixels" in words and "leave it out" in words


# values

@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "F"])
def test_values_that_are_not_eight_bit_are_not_cut_off(mode):
    words = said(to_rgb, Image.new(mode, (8, 8)), "sample 3")
    assert words.startswith(f"sample 3 has mode {mode}") and "255" in words


def test_eight_bit_modes_still_become_rgb():
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"):
        assert to_rgb(Image.new(mode, (8, 8))).mode == "RGB"


def test_sixteen_bits_and_truth_values_are_told_apart():
    assert "largest value" in said(images_to_tensor, [Image.new("I;16", (8, 8))], 8, 1)
    assert "convert('L')" in said(images_to_tensor, [Image.new("1", (8, 8))], 8, 1)


@pytest.mark.parametrize("array", [np.arange(64, dtype=np.uint8).reshape(8, 8), np.arange(192, dtype=np.uint8).reshape(8, 8, 3),
                                   np.arange(64, dtype=np.uint8).reshape(8, 8, 1), np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)])
def test_arrays_stay_what_they_are(array):
    channels = 1 if array.ndim == 2 else array.shape[2]
    for given in (array, torch.from_numpy(array)):
        kept = as_samples([{"image": given}])[0]["image"]
        assert np.array_equal(np.asarray(kept), array.squeeze())
        assert torch.equal(images_to_tensor([kept], 8, channels), images_to_tensor([array], 8, channels))


@pytest.mark.parametrize("array, words", [
    (np.full((8, 8, 3), .5), "float64 and shape (8, 8, 3)"), (np.full((8, 8), np.nan), "64 values that are NaN"), (np.full((8, 8), 255.), "from 255 to 255"),
    (np.full((8, 8), -.5), "from -0.5"), (np.full((8, 8), 40000, np.uint16), "uint16"), (np.full((8, 8, 3), 40000, np.uint16), "uint16"),
    (np.ones((8, 8), np.int64), "int64"), (np.ones((8, 8), bool), "bool"), (np.ones((2, 8, 8, 3), np.uint8), "shape (2, 8, 8, 3)"), (np.uint8(3), None)])
def test_arrays_that_a_data_set_would_ruin(array, words):
    if words is None: array, words = np.array(array), "shape ()"
    told = said(as_samples, [{"image": photo()}, {"image": array}])
    assert told.startswith("sample 1") and words in told


# sizes and classes

@pytest.mark.parametrize("size", [(8,), (8, 8, 8), 0, -1, 2.5, "64", (8, 0), True, np.float32(8)])
def test_sizes(size):
    for f in (
        lambda: height_and_width(size),
        lambda: load_images("mnist_5k", size=size),
        lambda: images_to_tensor([photo()], size, 3),
        lambda: load_mixture("mini", size=size),
        lambda: load_mixture("authors", size=size),
    ):
        words = said(f)
        assert f"size={size!r}" in words and "at least 1 pixel" in words and "(height, width)" in words


def test_sizes_of_numpy():
    assert height_and_width(np.int64(8)) == height_and_width((np.int32(8), 8)) == (8, 8)


def test_a_class_that_is_not_there():
    data_set = Dataset.from_dict(
        {"image": [photo()], "label": [0]},
        features=Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])}))
    words = said(_draw, data_set, ("cat", "horse"), 1)
    assert "no class 'horse'" in words and "cat, dog" in words


def test_labels_of_another_kind(tmp_path):
    Dataset.from_dict(
        {"image": [photo()], "label": ["seven"]},
        features=Features({"image": ImageFeature(), "label": Value("string")}),
    ).to_parquet(tmp_path / "train.parquet")
    words = said(load_images, "mnist", source=tmp_path)
    assert "labels" in words and "0, 1, 2" in words and "seven" in words


# digests of columns

def test_column_digests_follow_names_and_not_images(digits):
    columns = {"label": digits["label"], "subset": [f"set {i % 3}" for i in range(len(digits))]}
    plain = (
        digits.select_columns("image")
        .add_column("label", [str(x) for x in columns["label"]])
        .add_column("subset", columns["subset"]))
    classes = digits.select_columns(["image", "label"]).add_column("subset", columns["subset"])
    found = column_digests(plain)
    assert (
        found == column_digests(classes)
        and set(found) == {"label", "subset"}
        and all(len(x) == 16 for x in found.values()))
    other = (
        digits.select_columns("image")
        .add_column("label", ["7", *[str(x) for x in columns["label"]][1:]])
        .add_column("subset", columns["subset"]))
    changed = column_digests(other)
    assert changed["label"] != found["label"] and changed["subset"] == found["subset"]
    assert column_digests(other, 1) == column_digests(other.select([0])) and column_digests(
        other.select(range(1, 40))
    ) == column_digests(plain.select(range(1, 40)))
    assert column_digests(digits.select_columns("image")) == {}
    assert "n=41" in said(column_digests, digits, 41)


def test_column_digests_read_no_image_and_know_missing_labels():
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    rows = [{"bytes": b"no image", "path": None}] * 3
    kinds = [
        Dataset.from_dict({"image": rows, "label": labels}, features=features)
        for labels in ([0, 1, None], [0, 1, -1], [0, 1, 1])]
    assert len({column_digests(x)["label"] for x in kinds}) == 3


# mixtures

def test_mini_has_no_source(tmp_path):
    for source in ("/nope", tmp_path):
        words = said(load_mixture, "mini", source=source)
        assert "no source to replace" in words and "build_mixture" in words


@pytest.mark.parametrize("bad, words", [(dict(seed=-1), "seed=-1"), (dict(seed=2.5), "seed=2.5"), (dict(seed="0"), "seed='0'"), (dict(seed=2**64), "choose 0 to"),
                                        (dict(noise=float("nan")), "noise=nan"), (dict(noise="x"), "noise='x'"), (dict(noise_strength=float("nan")), "strength=nan")])
def test_a_mixtures_numbers_are_checked_before_anything_is_read(bad, words, monkeypatch):
    def read(*args): raise AssertionError("it was read")
    monkeypatch.setattr("dmin.reproduction.mixture._read", read)
    assert words in said(build_mixture, {"roses": Subset("a/b", "text", 1)}, **bad)


def test_plans_and_noise_check_their_numbers():
    for bad in (
        dict(seed=-1),
        dict(seed=1.0),
        dict(train=float("nan")),
        dict(train=1),
        dict(train="x"),
        dict(rows=2.5),
    ):
        assert f"{next(iter(bad))}=" in said(plan_mixture, **{"rows": 10} | bad)
    for seed in (-1, 1.5, (0, -1), "a"): assert "seed=" in said(add_noise, photo(), seed=seed)
    same = [add_noise(photo(), seed=s).tobytes() for s in (3, np.int64(3))]
    assert (
        same[0] == same[1]
        and (plan_mixture(10, seed=np.int64(3)).train == plan_mixture(10, seed=3).train).all())


def test_a_mixture_does_not_cut_off_values(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    Dataset.from_dict(
        {"image": [photo(), Image.new("I;16", (4, 4), 40000)], "text": ["x", "y"]},
        features=Features({"image": ImageFeature(), "text": Value("string")}),
    ).to_parquet(folder / "train.parquet")
    assert "row 1 of deep has mode I;16" in said(
        build_mixture, {"deep": Subset("a/b", "text", 2)}, "test", source=tmp_path)   # where row 1 is


# timesteps

@pytest.mark.parametrize("n", [2.5, 3., "3", None, True, 0, 1001])
def test_a_number_of_timesteps(pipe, n):
    words = said(select_timesteps, pipe.scheduler, n)
    assert f"n={n}" in words and "choose 1 to 1000, whole" in words


def test_numbers_of_numpy_and_torch(pipe):
    for n in (np.int64(4), torch.tensor(4)):
        assert select_timesteps(pipe.scheduler, n).tolist() == [0, 250, 500, 750]


# HTML

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Tags(HTMLParser):
    """The tags of a page, and whether one of them has an attribute that runs something."""

    def __init__(self, page):
        super().__init__()
        self.found, self.runs = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.runs += [name for name, _ in attributes if name.startswith("on")]


def table(*names):
    return detection_table({name: np.eye(3) for name in names}, [EVIL, "b", "c"], [EVIL, "b", "c"], k=(1,))


PAGES = {
    "strips": lambda: attribution_html([Strip(photo(), EVIL, [photo()], [f"{EVIL}\n{EVIL}"], EVIL)]),
    "table": lambda: Table([EVIL, EVIL], [[EVIL, EVIL]], EVIL, groups=[(EVIL, 2)], lead=EVIL)._repr_html_(),
    "detection": lambda: table(EVIL)._repr_html_(),
    "LDS": lambda: LDSTable({EVIL: {EVIL: Interval(1.0, 0.0, 2.0)}}, 3, 4)._repr_html_(),
    "comparison": lambda: Comparison({EVIL: {EVIL: 1.0}}, {EVIL: {EVIL: 2.0}}, EVIL, EVIL)._repr_html_(),
    "costs": lambda: CostTable({EVIL: Cost(1.0, 1.0, 1.0, 1, 1)})._repr_html_(),
    "noise": lambda: noise_table({EVIL: np.arange(4)}, [True, False, True, False], draws=3)._repr_html_()}


@pytest.mark.parametrize("name", PAGES)
def test_text_in_pages_is_escaped(name):
    page = PAGES[name]()
    tags = Tags(page)
    assert "script" not in tags.found and not tags.runs and "alert(1)" in page
    assert tags.found.count("img") == (2 if name == "strips" else 0)
