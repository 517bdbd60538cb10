"""What every attributor must have in common, and the measures against brute force."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PYTHON
from scipy.stats import spearmanr

from dmin import DMin, collect, generate, load_images
from dmin.core.scores import Attributor
from dmin.methods.first_order import Gradient, TracInCP
from dmin.methods.kfac import KFAC, StoreKFAC
from dmin.methods.retraining import Datamodel, EmpiricalInfluence, largest_penalty, lasso
from dmin.methods.second_order import DataInf, LiSSA
from dmin.methods.similarity import CLIP, Random, RawPixels, SSIM
from dmin.methods.trak import Ensemble, JourneyTRAK, TRAK
from dmin.methods.whitened import WhitenedDMin
from dmin.measures.detection import detection_table
from dmin.measures.lds import (
    another_seed_intervals, another_seed_per_query, attributable, ceiling, exact_retraining, lds_differences,
    lds_intervals, lds_per_query, lds_table, random_subsets, seed_correlation_per_query,
    smallest_visible_difference)
from dmin.measures.retrained import Retrained
from dmin.measures.intervals import interval
from dmin.families.ddpm import tiny_ddpm

ATTRIBUTORS = {
    "pixels": lambda s: RawPixels(s.samples),
    "pixels, dot": lambda s: RawPixels(s.samples, cosine=False),
    "SSIM": lambda s: SSIM(s.samples, progress=False),
    "CLIP": lambda s: CLIP(s.samples),
    "Gradient": Gradient,
    "cosine": lambda s: Gradient(s, cosine=True),
    "TracInCP": lambda s: TracInCP([s]),
    "GAS": lambda s: TracInCP([s], cosine=True),
    "TRAK": lambda s: TRAK(s, .1),
    "relative": lambda s: TRAK(s, .1, "relative"),
    "renormalised": lambda s: TRAK(s, .1, "renormalised"),
    "ensemble": lambda s: Ensemble([TRAK(s, .1), TRAK(s, 1.)]),
    "Journey-TRAK": lambda s: JourneyTRAK(s, .1, steps=4),
    "LiSSA": LiSSA,
    "DataInf": DataInf,
    "identity": lambda s: DataInf(s, identity=True),
    "K-FAC": lambda s: KFAC(s.objective, s.samples, draws=4, query_bits=None),   # rounding tips over
    "EK-FAC": lambda s: KFAC(s.objective, s.samples, draws=4, query_bits=None, corrected=True),
    "K-FAC, store": StoreKFAC,
    "DMin": DMin,
    "w/o Norm.": lambda s: DMin(s, normalise=False),
    "whitened": lambda s: WhitenedDMin(s, .1),
}
WHOLE_IMAGES = ("pixels", "pixels, dot", "SSIM", "CLIP", "Journey-TRAK", "Random", "empirical", "datamodel")


def measured(kind, store, queries):
    """A retraining baseline of forty made-up outputs."""
    draw = torch.Generator().manual_seed(0)
    masks = torch.rand(40, len(store), generator=draw) < .5
    return kind(masks, torch.randn(40, len(queries), generator=draw), queries, samples=store.samples)


OTHERS = {   # what is made of more than a store, or says nothing of a query
    "Random": lambda s, queries: Random(s.samples),
    "empirical": lambda s, queries: measured(EmpiricalInfluence, s, queries),
    "datamodel": lambda s, queries: measured(Datamodel, s, queries),
}


@pytest.fixture(scope="module")
def pipe(): return tiny_ddpm(8, channels=(16,))


@pytest.fixture(scope="module")
def store(pipe, tmp_path_factory):
    digits = load_images("mnist_5k", size=8).select(range(0, 4000, 200))
    return collect(
        pipe, digits, tmp_path_factory.mktemp("store"), v=512, timesteps=3, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def queries(pipe): return generate(pipe, 4, steps=4, progress=False)


@pytest.mark.parametrize("name", ATTRIBUTORS)
def test_one_call_for_all(name, store, queries):
    """Scores have one row a query; a query's row depends neither on the other queries nor on their order, and
    asking twice gives the same.
    """
    method = ATTRIBUTORS[name](store)
    scores = method.scores(queries)
    assert (
        scores.shape == (4, 20) and scores.dtype == torch.float32 and scores.isfinite().all() and method.name)
    scale = scores.abs().max()
    assert torch.equal(method.scores(queries), scores)
    assert torch.allclose(method.scores(queries.select([3, 1])), scores[[3, 1]], atol=2e-4 * scale)
    assert torch.allclose(method.scores(queries.select([2])), scores[[2]], atol=2e-4 * scale)


@pytest.mark.parametrize("name", [*ATTRIBUTORS, *OTHERS])
def test_every_method_ranks_and_draws_itself(name, store, queries):
    """`influence` has the numbers of `scores` and shows both kinds of images; a region changes the scores, or
    is refused by name.
    """
    method = ATTRIBUTORS[name](store) if name in ATTRIBUTORS else OTHERS[name](store, queries)
    assert isinstance(method, Attributor)
    scores, top = method.scores(queries), method.influence(queries).top(3)
    tolerance = dict(rtol=1e-4, atol=1e-6 * scores.abs().max().item())
    assert torch.allclose(scores.gather(1, top.rows), top.scores, **tolerance)
    assert torch.allclose(scores.topk(3).values, top.scores, **tolerance)
    assert top._repr_html_().count("<img") == 4 * (1 + 3)   # each query with its three
    half, whole = (0, 0, 4, 8), (0, 0, 8, 8)
    if name in WHOLE_IMAGES:
        with pytest.raises(ValueError, match=re.escape(f"{method.name} looks at whole images")):
            method.influence(queries, region=half)
        return
    found = method.influence(queries, region=half)
    assert not torch.allclose(found.values, scores, rtol=1e-2, atol=1e-3 * scores.abs().max().item())
    assert torch.allclose(found.values, method.scores(queries, half), **tolerance)
    each = method.scores(queries, [half, whole, whole, half])   # a region a query
    assert torch.allclose(
        each[[0, 3]], found.values[[0, 3]], rtol=1e-2, atol=1e-3 * scores.abs().max().item())


def test_a_method_of_numbers_alone_ranks_without_images(queries):
    assert "sample" in repr(Random(9).influence(queries).top(3))


# the first draw targets in the samples' order
@pytest.mark.parametrize("name", [n for n in ATTRIBUTORS if n not in ("K-FAC", "EK-FAC", "K-FAC, store", "LiSSA")])
def test_the_order_of_samples_does_not_matter(name, store, queries, pipe, tmp_path):
    turned = collect(
        pipe,
        store.samples.select(range(19, -1, -1)),
        tmp_path,
        v=512,
        timesteps=3,
        dtype="float32",
        progress=False)
    scores = ATTRIBUTORS[name](store).scores(queries)
    assert torch.allclose(
        ATTRIBUTORS[name](turned).scores(queries).flip(1), scores, atol=1e-3 * scores.abs().max())


@pytest.mark.parametrize("name", ["cosine", "TRAK", "DMin", "whitened"])
def test_a_training_sample_finds_itself(name, store):
    assert ATTRIBUTORS[name](store).scores(store.samples.select([4, 9])).argmax(1).tolist() == [4, 9]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_fewer_bits_on_disk_keep_the_order(dtype, store, queries, pipe, tmp_path):
    small = collect(pipe, store.samples, tmp_path, v=512, timesteps=3, dtype=dtype, progress=False)
    for name in ("Gradient", "TRAK", "whitened"):
        a, b = (ATTRIBUTORS[name](s).scores(queries) for s in (store, small))
        assert min(spearmanr(x, y).statistic for x, y in zip(a, b)) > (
            0.999 if dtype == "float16" else 0.97
        ), name


def test_stores_without_their_pipeline_say_so(store, queries):
    from dmin.core.store import Store
    bare = Store(store.folder)
    for make in (
        lambda: Gradient(bare).scores(queries),
        lambda: TRAK(bare),
        lambda: StoreKFAC(bare),
        lambda: WhitenedDMin(bare),
    ):
        with pytest.raises(ValueError, match="open_store"): make()


def test_images_of_another_size_are_refused(store):
    large = load_images("mnist_5k", size=16).select([0])
    for name in ("pixels", "SSIM"):
        with pytest.raises(ValueError, match="16"): ATTRIBUTORS[name](store).scores(large)


def planted(samples=200, subsets=120, queries=4, sparse=6):
    """A sparse truth (queries, samples), masks, and outputs that are its sums with a little noise."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.zeros(queries, samples)
    for row in truth: row[torch.randperm(samples, generator=draw)[:sparse]] = 1
    masks = random_subsets(samples, subsets)
    return truth, masks, masks.float() @ truth.T + .3 * torch.randn(subsets, queries, generator=draw)


def test_datamodels_find_a_planted_sparse_truth(queries):
    truth, masks, measured = planted()
    found = Datamodel(masks, measured, queries).scores(queries)
    assert torch.equal(found.topk(6).indices.sort().values, truth.nonzero()[:, 1].view(4, 6))
    # the penalty shrinks, by less than half here; what has no effect has none, or little
    assert found[truth == 1].min() > .5 and found[truth == 0].abs().max() < .2
    assert (found == 0).float().mean() > .5


def test_datamodels_are_optimal():
    """The conditions of Karush, Kuhn and Tucker, in float64, for penalties large and small."""
    _, masks, measured = planted()
    x, y = masks.double(), measured.double()
    x, y = x - x.mean(0), y - y.mean(0)
    largest = largest_penalty(x, y)
    for share in (.99, .3, .05, .001):
        penalty = share * largest
        beta = lasso(x, y, penalty, torch.zeros(200, 4).double(), tolerance=1e-8)
        slope, used = x.T @ (y - x @ beta) / len(x), beta != 0
        assert used.any() and (slope.abs() <= penalty + 1e-7 * largest).all()
        assert (slope - penalty * beta.sign())[used].abs().max() <= 1e-7 * largest.max()


def test_datamodel_scores_follow_the_samples_and_the_unit(queries):
    """Samples in another order, outputs in another unit or with something added: the same datamodel."""
    _, masks, measured = planted()
    found, order = Datamodel(masks, measured, queries).scores(queries), torch.arange(199, -1, -1)
    turned = Datamodel(masks[:, order], measured, queries).scores(queries)
    scaled = Datamodel(masks, 8 * measured - 3, queries).scores(queries)
    assert torch.allclose(turned, found[:, order], atol=1e-4) and torch.allclose(scaled, 8 * found, atol=1e-3)


def test_datamodels_of_what_never_changes_are_nought(queries):
    _, masks, measured = planted()
    masks[:, 0], masks[:, 1] = True, False
    found = Datamodel(masks, measured.index_fill(1, torch.tensor([2]), .7), queries).scores(queries)
    assert not found[2].any() and not found[:, :2].any() and found[0].any()
    assert not Datamodel(masks[:2], measured[:2], queries).scores(queries).isnan().any()


# measures

def test_lds_is_spearmans(rng=np.random.default_rng(0)):
    masks, scores, measured = (
        random_subsets(30, 20),
        torch.tensor(rng.random((4, 30))),
        torch.tensor(rng.random((20, 4))))
    found = lds_per_query(scores, masks, measured)
    expected = [
        spearmanr([scores[q][mask].sum().item() for mask in masks], measured[:, q]).statistic
        for q in range(4)]
    assert (
        np.allclose(found, expected)
        and np.allclose(lds_per_query(3 * scores, masks, measured), found)
        and np.allclose(lds_per_query(-scores, masks, measured), -found))


def test_lds_of_scores_that_say_nothing_is_zero():
    masks = random_subsets(30, 20)
    assert (lds_per_query(torch.ones(2, 30), masks, torch.rand(20, 2)) == 0).all()


def test_seeds_agree_without_noise_and_hardly_with_nothing_else():
    signal, noise = (
        torch.randn(200, 1, 5, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1),
        torch.randn(200, 3, 5, generator=torch.Generator().manual_seed(1)))
    for between in (another_seed_per_query, seed_correlation_per_query):
        assert np.allclose(between(signal), 1) and abs(between(noise).mean()) < .1


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_what_can_be_reached_is_what_a_simulation_reaches(seeds):
    """Signals and one more model as methods, against the rows that are estimated without knowing either. A
    subset with one sample makes any numbers a method's predictions.
    """
    draw, n, shared = torch.Generator().manual_seed(seeds), 400, .43
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.double)
    signal = normal(n, 1, n)   # as many queries as subsets
    models = shared**.5 * signal + (1 - shared)**.5 * normal(n, 1 + seeds, n)
    methods = {"signal": signal[:, 0].T, "one more model": models[:, 0].T}
    one_each = torch.eye(n, dtype=torch.bool)
    table = lds_table(methods, one_each, {"loss": models[:, 1:]}, draws=2).scores["loss"]
    # A correlation of n² pairs has a standard error of (1 - r²) / n. Of an error in r, which is .41, the
    # ceiling takes over at most .7, exact retraining 1.2.
    apart = {"signal": ("ceiling, estimated", .7), "one more model": ("exact retraining, estimated", 1.2)}
    for method, (row, slope) in apart.items():
        truth, error = table[method].mean, ((1 - .41**2) * slope + 1 - (table[method].mean / 100)**2) / n
        assert abs(table[row].mean - truth) < 4 * 100 * error, (method, table[row].mean, truth)
    among = np.atleast_2d(spearmanr(models[:, 1:, 0]).statistic)   # a number for two, a matrix for more
    pairs = among[np.triu_indices(seeds, 1)] if seeds > 2 else among
    assert np.isclose(seed_correlation_per_query(models[:, 1:, :1])[0], np.mean(pairs))
    assert exact_retraining(.41, 1) == pytest.approx(.41) and ceiling(0., seeds) == 0


def test_bootstrap_of_counts_is_that_of_drawn_rows(rng=np.random.default_rng(0)):
    """Intervals against a loop that draws rows and ranks them anew, ties and all."""
    masks, scores = random_subsets(12, 16), torch.tensor(rng.integers(3, size=(3, 12)))
    measured = torch.tensor(rng.integers(8, size=(16, 3)))
    found, draws = lds_table({"a": scores}, masks, {"loss": measured[:, None].double()}, 50), []
    predicted, again = masks.double() @ scores.double().T, np.random.default_rng(0)
    for _ in range(50):
        rows, columns = again.integers(16, size=16), again.integers(3, size=3)
        draws.append([100 * spearmanr(predicted[rows, q], measured[rows, q]).statistic for q in columns])
    low, high = np.percentile(np.mean(draws, 1), (2.5, 97.5))
    cell = found.scores["loss"]["a"]
    assert np.allclose([cell.low, cell.high], [low, high])
    assert np.isclose(cell.mean, 100 * lds_per_query(scores, masks, measured).mean())


def test_intervals_of_single_queries_cover_their_correlation():
    """64 subsets and a known correlation of .6: 95 of 100 intervals should have it, some 93 do."""
    draw, n = torch.Generator().manual_seed(0), 64
    signal, noise = torch.randn(2, n, 200, generator=draw, dtype=torch.double)
    measured, known = .6 * signal + .8 * noise, 6 / np.pi * np.arcsin(.3)
    intervals = lds_intervals(signal.T, torch.eye(n, dtype=torch.bool), measured, 400)
    covered = np.mean([x.low < known < x.high for x in intervals])
    assert .86 < covered < .99   # five standard errors of 200 intervals, around .93
    by_seed = torch.stack([measured, .6 * signal + .8 * torch.randn(n, 200, generator=draw)], 1)
    assert attributable(by_seed, 400).sum() == sum(x.low > 0 for x in another_seed_intervals(by_seed, 400))


def test_differences_are_paired():
    """What is hard for both methods falls out: nearly equal ones have a difference with a narrow interval."""
    draw = torch.Generator().manual_seed(0)
    masks, effects = random_subsets(100, 48), torch.rand(20, 100, generator=draw)
    measured = {"loss": (masks.float() @ effects.T + 4 * torch.randn(48, 20, generator=draw))[:, None]}
    nearly, none = effects + .1 * torch.rand(20, 100, generator=draw), torch.rand(20, 100, generator=draw)
    methods = {"a": effects, "b": nearly, "none": none}
    table, apart = lds_table(methods, masks, measured), lds_differences(methods, "a", masks, measured)
    alone, paired = table.scores["loss"]["b"], apart.scores["loss"]["b"]
    assert set(apart.scores["loss"]) == {"b", "none"} and apart.scores["loss"]["none"].high < 0
    assert paired.high - paired.low < (alone.high - alone.low) / 2
    assert np.isclose(paired.mean, alone.mean - table.scores["loss"]["a"].mean)
    half = (paired.high - paired.low) / 2
    assert smallest_visible_difference(paired, .5) == pytest.approx(half)
    # 1.96 standard errors to leave out 0, and .84 more to do so in four of five samples
    assert smallest_visible_difference(paired) == pytest.approx(2.8016 / 1.95996 * half, 1e-4)
    assert "less that of a" in repr(apart)


def test_an_interval_of_equal_values_has_no_width():
    found = interval(np.full((3, 10), .25))
    assert found.mean == found.low == found.high == .25


def test_seeds_are_averaged():
    scores = [torch.eye(4), torch.eye(4).flip(1)]   # the second is wrong everywhere
    table = detection_table({"m": scores}, range(4), range(4), k=(1,))
    assert table.rates["m"] == (.5,) and table.seeds == {"m": 2}


RETRAIN = """
import sys, torch
from dmin.measures.lds import random_subsets
from dmin.measures.retrained import Retrained
def retrain(rows, seed):
    print("trained", flush=True)
    return {"losses": torch.full((2, 3), float(rows.sum()) + seed)}
Retrained(sys.argv[1], {"recipe": 1}).build(random_subsets(30, 7), retrain, (0, 1), progress=False)
"""


def test_processes_share_the_retraining(tmp_path):
    (tmp_path / "work.py").write_text(RETRAIN)
    done = subprocess.run(
        [
            PYTHON,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(tmp_path / "work.py"),
            str(tmp_path / "outputs")],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained") == 14   # each model once
    masks = random_subsets(30, 7)
    found = Retrained(tmp_path / "outputs", {"recipe": 1}).outputs(masks, (0, 1))
    assert found.shape == (7, 2, 2, 3) and found[3, 1, 0, 0] == masks[3].nonzero().sum() + 1


def test_a_failed_retraining_keeps_what_was_done(tmp_path):
    masks, done = random_subsets(30, 4), []

    def retrain(rows, seed):
        if len(done) == 2:
            raise RuntimeError("power cut")
        done.append(seed)
        return {"losses": torch.zeros(1, 1)}
    with pytest.raises(RuntimeError): Retrained(tmp_path, {}).build(masks, retrain, progress=False)
    assert len(Retrained(tmp_path, {}).missing(masks)) == 2


def test_a_damaged_output_is_named(tmp_path):
    masks = random_subsets(30, 2)
    Retrained(tmp_path, {}).build(masks, lambda rows, seed: {"losses": torch.zeros(1, 1)}, progress=False)
    path = next(tmp_path.glob("model-*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="trained again"): Retrained(tmp_path, {}).missing(masks)


def test_random_scores_are_the_same_every_time(queries):
    assert torch.equal(Random(9).scores(queries), Random(9).scores(queries)) and not torch.equal(
        Random(9).scores(queries), Random(9, seed=1).scores(queries))
