"""Groups of training samples: sums against loops, intervals against repetition, duplicates against brute force."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_pipeline
from datasets import ClassLabel, concatenate_datasets, Dataset, Features, Image, Value
from scipy.stats import t as student

from dmin import collect, Scores
from dmin.core.groups import by_group, group_names, NONE
from dmin.measures.duplicates import near_duplicates


@pytest.fixture(scope="module")
def values(): return torch.randn(3, 60, generator=torch.Generator().manual_seed(0))


LABELS = ["a"] * 10 + ["b"] * 25 + ["c"] * 24 + ["d"]


def test_sums_against_loops(values):
    found = by_group(values, LABELS, k=7)
    assert found.names == ["a", "b", "c", "d"] and found.sizes.tolist() == [10, 25, 24, 1]
    for q in range(3):
        first = set(values[q].argsort(descending=True)[:7].tolist())
        for g, name in enumerate(found.names):
            own = values[q, [i for i, x in enumerate(LABELS) if x == name]].double()
            assert math.isclose(found.sums[q, g], own.sum(), abs_tol=1e-9)
            excess = own.sum() - len(own) * values[q].double().mean()
            assert math.isclose(found.excess[q, g], excess, abs_tol=1e-9)
            assert found.found[q, g] == sum(LABELS[i] == name for i in first)
            positive = values[q].double().clamp(min=0)
            assert math.isclose(found.share[q, g], own.clamp(min=0).sum() / positive.sum(), abs_tol=1e-9)
            if len(own) >= 5:
                drawn = math.sqrt(len(own) * (1 - len(own) / len(LABELS)))   # without replacement
                margin = student.ppf(.975, len(own) - 1) * drawn * own.std()
                assert math.isclose(found.margin[q, g], margin, rel_tol=1e-9)
            else: assert math.isnan(found.margin[q, g])
    assert (found.share.sum(1) - 1).abs().max() < 1e-9
    assert found.excess.sum(1).abs().max() < 1e-9   # what one group has above the average others lack


@pytest.mark.parametrize("m", [5, 40, 1000, 1800])
def test_the_interval_covers(m):
    """A group drawn from among many: its excess is that of its members' distribution, 95 times in 100."""
    scores = torch.randn(1000, 2000, generator=torch.Generator().manual_seed(1))
    scores[:, :m] += .5
    found, true = by_group(scores, ["ours"] * m + ["others"] * (2000 - m)), m * .5 * (1 - m / 2000)
    inside = ((found.excess[:, 0] - true).abs() < found.margin[:, 0]).double().mean()
    assert .93 < inside < .97   # 3 standard errors


def test_a_group_of_all_has_no_excess(values):
    found = by_group(values, ["all"] * 60)
    assert found.excess.abs().max() < 1e-9 and found.margin.abs().max() < 1e-9


def test_no_positive_score_has_no_shares(values):
    found = by_group(-values.abs(), LABELS)
    assert found.share.isnan().all() and "positive" not in repr(found) and "nan" not in repr(found)


def test_missing_values_of_any_kind_are_one_group(values):
    missing = [None, float("nan"), pd.NA, "", pd.NaT]
    assert by_group(values, [*missing, *["x"] * 55]).names == [NONE, "x"]


def test_columns_of_our_names(values):
    samples = Dataset.from_dict({"samples": ["x", "y"] * 30, "query 0": [1] * 60, "score": [2] * 60})
    scores = Scores(values[..., None], samples=samples)
    assert set(scores.by("samples").to_pandas()["sample_samples"]) == {"x", "y"}
    assert "x: excess" in repr(scores.by("samples"))
    assert np.allclose(scores.to_pandas()["query 0"], values[0])
    assert set(scores.to_pandas()["sample_query 0"]) == {1}


def test_no_queries_and_many_groups():
    none = by_group(torch.zeros(0, 8), ["a"] * 8)
    assert len(none) == 0 and none.found.shape == (0, 1) and len(none.to_pandas()) == 0
    many = by_group(torch.randn(2, 50_000), [str(i) for i in range(50_000)])
    assert len(many.to_pandas()) == 100_000


def test_the_order_and_the_table(values):
    found = by_group(values, LABELS, k=7)
    table = found.to_pandas()
    assert len(table) == 12 and table["rank"].tolist() == [1, 2, 3, 4] * 3
    for q in range(3):
        part = table[table["query"] == q]
        assert part["excess"].is_monotonic_decreasing and part["of the first 7"].sum() == 7
        chance = part["of the first 7"] / (7 * part["samples"] / 60)
        assert np.allclose(part["times chance"], chance)
    assert len(found) == 3 and torch.equal(found[1].values, values[1:2])
    assert "nan" not in repr(found)


def test_columns_of_the_data_set(values):
    kinds = Features({"image": Image(), "label": ClassLabel(names=["x", "y"]), "artist": Value("string")})
    rows = {"image": [np.zeros((8, 8), np.uint8)] * 60, "label": [0, 1] * 30,
            "artist": ["<i>Ann</i> $1$", None, ""] * 20}
    samples = Dataset.from_dict(rows, features=kinds)
    scores = Scores(values[:, :, None], queries=samples.select([0, 1, 2]), samples=samples)
    assert scores.by("label").names == ["x", "y"]
    artists = scores.by("artist")
    assert artists.names == ["<i>Ann</i> $1$", NONE]
    page = artists.to_html()
    assert "&lt;i&gt;Ann" in page and "<i>Ann" not in page and page.count("<img") == 3 * (1 + 2 * 5)
    assert artists.figure().axes[0].get_yticklabels()[0].get_text()
    with pytest.raises(ValueError, match="no such column.*only label, artist"): scores.by("painter")
    with pytest.raises(ValueError, match="no such column"): scores.by("image")
    with pytest.raises(ValueError, match="5 groups for 60"): scores.by([1] * 5)
    with pytest.raises(ValueError, match="k=61"): scores.by("label", k=61)
    with pytest.raises(ValueError, match="training images are not known"): Scores(values[..., None]).by("label")
    assert group_names(torch.tensor([3, 1]), None, 2) == ["3", "1"]


@pytest.fixture(scope="module")
def repeated(digits, tmp_path_factory):
    """Twenty digits, of which two come again and one twice."""
    samples = concatenate_datasets([digits.select(range(20)), digits.select([4, 7, 4])])
    recipe = dict(v=512, timesteps=4, shard_size=6, progress=False)
    return collect(make_pipeline(), samples, tmp_path_factory.mktemp("d") / "s", **recipe)


def test_near_duplicates(repeated):
    found = near_duplicates(repeated, .99)
    assert [i for i, x in enumerate(found) if x == "cluster 0"] == [4, 20, 22]
    assert [i for i, x in enumerate(found) if x == "cluster 1"] == [7, 21]
    assert found[0] == "single 0" and len(set(found)) == 20


@pytest.mark.parametrize("least", [.3, .6, .9])
def test_clusters_against_brute_force(repeated, least):
    unit = torch.nn.functional.normalize(repeated.vectors(), dim=2)
    near = torch.einsum("itv,jtv->ij", unit, unit) / 4 >= least
    joined = near | torch.eye(len(near), dtype=torch.bool)
    for _ in range(6): joined = (joined.float() @ joined.float()) > 0   # chains of up to 64 pairs
    found = near_duplicates(repeated, least)
    same = torch.tensor([[a == b for b in found] for a in found])
    assert torch.equal(same, joined)


def test_duplicates_and_scores(repeated, digits):
    """Copies share what one would have had; their cluster is ahead."""
    scores = repeated.influence(digits.select([4]))
    groups = scores.by(near_duplicates(repeated, .99))
    assert groups.names[groups.order(0)[0]] == "cluster 0" and groups.sizes[groups.order(0)[0]] == 3


def test_exact_copies_have_a_cosine_of_one(repeated, tmp_path):
    for dtype in ("float16", "int8"):
        store = repeated if dtype == "float16" else repeated.copy_as(tmp_path / dtype, dtype)
        assert near_duplicates(store, 1)[4] == "cluster 0"


def test_what_cannot_be(repeated, tmp_path):
    for wrong in (0, 1.5, -1):
        with pytest.raises(ValueError, match="least="): near_duplicates(repeated, wrong)
    with pytest.raises(ValueError, match="one bit a number"):
        near_duplicates(repeated.copy_as(tmp_path / "b", "1bit"))
