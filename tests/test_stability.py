"""A method repeated over seeds: what its mean, its ranks and its marks are, and what it refuses to mix."""
import shutil

import pytest
import torch
from conftest import make_pipeline

from dmin.core.scores import Attributor, averaged, Scores
from dmin.core.show import attribution_html
from dmin.core.store import collect, open_store, Store
from dmin.methods.dmin import DMin
from dmin.methods.similarity import RawPixels
from dmin.methods.stability import collect_seeds, Repeated
from dmin.methods.trak import TRAK
from dmin.methods.whitened import WhitenedDMin

RECIPE = dict(v=64, timesteps=3, progress=False)
METHODS = DMin, lambda store: TRAK(store, damping=.1), TRAK, WhitenedDMin


@pytest.fixture(scope="module")
def digits():
    from dmin.reproduction.image_sets import load_images
    return load_images("mnist_5k", size=8).select(range(0, 2000, 50))


@pytest.fixture(scope="module")
def stores(digits, tmp_path_factory):
    return collect_seeds(make_pipeline(), digits, tmp_path_factory.mktemp("seeds"), seeds=4, **RECIPE)


def first(scores, k, sign=1):
    """Rows (n_queries, k), by Python's own stable sort."""
    ranked = []
    for row in scores.values.tolist(): ranked.append(sorted(range(len(row)), key=lambda i: -sign * row[i])[:k])
    return ranked


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_is_the_method_itself(stores, digits, method):
    queries = digits.select([3, 30])
    plain, one = method(stores[1]), Repeated(stores[1:2], method)
    assert one.name == plain.name
    assert one.scores(queries).equal(plain.scores(queries))
    scores = one.influence(queries)
    assert scores.values.equal(plain.influence(queries).values) and scores.repeats == ()
    assert scores.top(5).ranks is None and scores.top(5).stable is None
    assert repr(scores.top(5)) == repr(plain.influence(queries).top(5))
    assert scores.top(5)._repr_html_() == plain.influence(queries).top(5)._repr_html_()


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_seeds_changes_nothing(stores, digits, method):
    queries, order = digits.select([3, 30]), (2, 0, 3, 1)
    a = Repeated(stores, method).influence(queries)
    b = Repeated([stores[i] for i in order], method).influence(queries)
    assert a.values.equal(b.values)
    for x, y in ((a.top(7), b.top(7)), (a.bottom(7), b.bottom(7))):
        assert x.rows.equal(y.rows) and x.stable.equal(y.stable)
        assert x.ranks[:, :, order].equal(y.ranks)
        assert repr(x) == repr(y)


@pytest.mark.parametrize("method", METHODS)
def test_marks_and_ranks_by_brute_force(stores, digits, method):
    queries, repeated = digits.select([3, 30]), Repeated(stores, method)
    scores = repeated.influence(queries)
    alone = [part.influence(queries) for part in repeated.parts]
    for k in (1, 5, 40):
        for sign, ranking in ((1, scores.top(k)), (-1, scores.bottom(k))):
            ranked, whole = [first(x, k, sign) for x in alone], [first(x, 40, sign) for x in alone]
            for q, rows in enumerate(ranking.rows.tolist()):
                stable = [all(i in x[q] for x in ranked) for i in rows]
                ranks = [[x[q].index(i) + 1 for x in whole] for i in rows]
                assert ranking.stable[q].tolist() == stable and ranking.ranks[q].tolist() == ranks


def test_the_mean_keeps_its_parts_by_timestep(stores, digits):
    scores = Repeated(stores).influence(digits.select([3]))
    parts = torch.stack([DMin(store).influence(digits.select([3])).per_timestep for store in stores])
    torch.testing.assert_close(scores.per_timestep, parts.mean(0))
    again = scores.reweight([0, 2, 0])
    torch.testing.assert_close(again.values, 2 * parts.mean(0)[..., 1])
    assert all(x.values.equal(2 * y[..., 1]) for x, y in zip(again.repeats, parts))


def test_what_no_seed_touches_is_stable(stores, digits):
    """A method that draws nothing ranks alike under all seeds."""
    ranking = Repeated(stores, lambda store: RawPixels(store.samples)).influence(digits[3]).top(10)
    assert ranking.stable.all() and (ranking.ranks == torch.arange(1, 11)[:, None]).all()
    assert "10 of 10 stable" in repr(ranking) and "rank 1 " in repr(ranking)


def test_the_same_scores_again_are_stable(stores, digits):
    one = DMin(stores[0]).influence(digits.select([3, 4]))
    ranking = averaged([one] * 5).top(10)
    assert ranking.stable.all() and ranking.rows.equal(one.top(10).rows)


def test_stable_in_text_html_and_figure(stores, digits):
    ranking = Repeated(stores).influence(digits.select([3])).top(10)
    stable = ranking.stable[0].tolist()
    n = sum(stable)
    assert 0 < n < 10   # else this shows nothing
    head, *lines = repr(ranking).split("\n")
    assert f"{n} of 10 stable (*): among the first 10 under each of 4 seeds" in head
    assert [line[0] == "*" for line in lines] == stable
    for line, ranks in zip(lines, ranking.ranks[0].tolist()):
        low, high = min(ranks), max(ranks)
        assert (f"ranks {low}–{high} " if low < high else f"rank {low} ") in line
    page = ranking._repr_html_()
    assert page.count("<b>") == n and f"{n} of 10 stable (framed)" in page
    fig = ranking.figure()
    bold = {x.get_text().split()[0] for x in fig.texts if x.get_weight() == "bold"}
    assert bold == {str(i) for i, mark in enumerate(stable, 1) if mark}
    thick = [ax.spines["left"].get_linewidth() for ax in fig.axes[1:]]   # the first is the query
    assert [width > 1 for width in thick] == stable
    assert attribution_html(ranking.strips()) in page


def test_proponents_and_opponents_each_have_marks(stores, digits):
    scores = Repeated(stores).influence(digits.select([3]))
    both = scores.top(5) + scores.bottom(5)
    assert [strip.marked for strip in both.strips()] == [x.stable[0].tolist() for x in (both, both.shown_with[0])]
    assert repr(both).count("stable (*)") == 2


def test_a_region_is_asked_about_under_every_seed(stores, digits):
    region, queries = (0, 0, 4, 8), digits.select([3])
    found = Repeated(stores).scores(queries, region)
    each = torch.stack([DMin(store).scores(queries, region) for store in stores])
    torch.testing.assert_close(found, each.mean(0))


def test_seeds_draw_noise_and_compression_anew(stores):
    seeds = [(x.manifest.noise_seed, x.manifest.compression_seed) for x in stores]
    assert seeds == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_resuming_collects_nothing_twice(digits, tmp_path, monkeypatch):
    rows, write, at_most = [], Store.write, 50
    def noted(self, some, *rest):
        if len(rows) == at_most: raise KeyboardInterrupt
        write(self, some, *rest)
        rows.extend((self.folder.name, i) for i in some)
    monkeypatch.setattr(Store, "write", noted)
    call = dict(pipe=make_pipeline(), samples=digits, folder=tmp_path / "x", shard_size=10, **RECIPE)
    with pytest.raises(KeyboardInterrupt): collect_seeds(seeds=3, **call)
    at_most = None
    collect_seeds(seeds=3, **call)
    assert sorted(rows) == [(f"seed-{seed}", i) for seed in range(3) for i in range(40)]
    rows.clear()
    found = collect_seeds(seeds=3, **call)
    assert rows == [] and [len(store.missing()) for store in found] == [0, 0, 0]
    collect_seeds(seeds=range(2, 4), **call)
    assert sorted(rows) == [("seed-3", i) for i in range(40)]


def test_stores_that_were_opened_again(stores, digits):
    pipe = make_pipeline()
    opened = [open_store(store.folder, pipe, digits) for store in stores]
    queries = digits.select([3])
    assert Repeated(opened).scores(queries).equal(Repeated(stores).scores(queries))


@pytest.mark.parametrize("seeds, words", [
    (0, "seeds=0: a whole number of at least 1"), (-1, "seeds=-1"), ([], "at least one is needed"),
    ([1, 1], "hold one twice"), ([0, -2], "a seed=-2"), (True, "seeds=True"), ("two", "seeds='two'"),
    (2.5, "seeds=2.5")])
def test_seeds_that_are_none(digits, tmp_path, seeds, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        collect_seeds(make_pipeline(), digits, tmp_path / "x", seeds, **RECIPE)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change, words", [
    (dict(timesteps=[0, 500, 900]), "timesteps is"), (dict(v=32), "v is 32, not 64"),
    (dict(noises=2), "noises is 2, not 1"), (dict(dtype="int8"), "dtype is int8, not float16")])
def test_stores_of_other_recipes(stores, digits, tmp_path, change, words):
    other = collect(make_pipeline(), digits, tmp_path / "other", seed=9, **RECIPE | change)
    with pytest.raises(ValueError, match=f"differ in more than their seeds.*{words}"):
        Repeated([*stores, other])


def test_stores_of_other_samples_or_models(stores, digits, tmp_path):
    swapped = digits.select([1, 0, *range(2, 40)])
    other = collect(make_pipeline(), swapped, tmp_path / "swapped", seed=9, **RECIPE)
    with pytest.raises(ValueError, match="sample 0 of the data set is another one"): Repeated([stores[0], other])
    other = collect(make_pipeline(), digits.select(range(9)), tmp_path / "few", seed=9, **RECIPE)
    with pytest.raises(ValueError, match="the data set has 9 samples, not 40"): Repeated([stores[0], other])
    other = collect(make_pipeline(seed=1), digits, tmp_path / "model", seed=9, **RECIPE)
    with pytest.raises(ValueError, match="model .* is"): Repeated([stores[0], other])


def test_no_stores_and_a_store_twice(stores, tmp_path):
    with pytest.raises(ValueError, match="there are no stores"): Repeated([])
    with pytest.raises(ValueError, match="the same seeds"): Repeated([stores[0], stores[1], stores[0]])
    shutil.copytree(stores[0].folder, tmp_path / "copy")
    with pytest.raises(ValueError, match="the same seeds"): Repeated([stores[0], Store(tmp_path / "copy")])


def test_files_of_another_size_are_no_other_recipe(stores, digits, tmp_path):
    other = collect(make_pipeline(), digits, tmp_path / "other", seed=9, shard_size=7, **RECIPE)
    assert len(Repeated([*stores, other]).parts) == 5


def test_one_damping_for_all(stores):
    chosen = sorted(TRAK(store).damping for store in stores)
    assert {part.damping for part in Repeated(stores, TRAK).parts} == {chosen[1]}
    given = Repeated(stores, lambda store: TRAK(store, damping=.3))
    assert {part.damping for part in given.parts} == {.3}


class Skewed(Attributor):
    """A method with an error: other weights under each seed."""
    name = "skewed"
    def __init__(self, store): self.store = store

    def influence(self, queries, region=None):
        return self.store.influence(queries, weights=[1, 2, 3 + self.store.manifest.noise_seed])


def test_scores_that_are_no_repeats(stores, digits):
    with pytest.raises(ValueError, match=r"weights are \[1.0, 2.0, 3.0\] and \[1.0, 2.0, 4.0\]"):
        Repeated(stores, Skewed).influence(digits[3])
    a, b = Scores(torch.ones(1, 4, 2), [0, 500]), Scores(torch.ones(1, 4, 2), [0, 501])
    with pytest.raises(ValueError, match=r"timesteps are \[0, 500\] and \[0, 501\]"): averaged([a, b])
    with pytest.raises(ValueError, match="no scores"): averaged([])
