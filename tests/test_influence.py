"""Scores against brute force, what they must not depend on, and rankings that show themselves."""
import json

import numpy as np
import pytest
import torch

from dmin.methods.similarity import Random, RawPixels
from dmin.core.store import collect, open_store
from dmin.core.gradients import Gradients
from dmin.core.index import build_index, open_index
from dmin.methods.dmin import DMin
from dmin.core.shards import Manifest
from dmin.core.store import Store


@pytest.fixture(scope="module")
def store(digits, tmp_path_factory):
    from conftest import make_pipeline
    return collect(
        make_pipeline(),
        digits,
        tmp_path_factory.mktemp("influence") / "store",
        v=512,
        timesteps=3,
        shard_size=7,
        progress=False)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "1bit"])
@pytest.mark.parametrize("normalise", [True, False])
def test_exact_against_brute_force(pipe, digits, tmp_path, dtype, normalise):
    store = collect(pipe, digits, tmp_path, v=512, timesteps=3, shard_size=7, dtype=dtype, progress=False)
    queries = digits.select([0, 9, 33])
    g = store.gradients(queries)
    stored, norms = store.vectors().double().numpy(), store.per_sample("norms").double().numpy()
    wanted = np.zeros((3, 40))
    for q in range(3):
        for i in range(40):
            for t in range(3):
                c = (g.compressed[q, t].double() / g.norms[q, t].double()).numpy() @ stored[i, t]
                wanted[q, i] += c if normalise else c * norms[i, t] * g.norms[q, t].item()
    assert np.allclose(
        store.influence(queries, normalise=normalise, scale=2.0).values.numpy(),
        2 * wanted,
        rtol=1e-4,
        atol=1e-4 * np.abs(wanted).max())


def test_compressed_scores_estimate_the_uncompressed(pipe, digits, tmp_path):
    """Without compression the scores are cosines; with it they are those, give or take the predicted error.

    """
    from dmin.core.compression import standard_error
    queries = digits.select([1, 2])
    exact = (
        collect(pipe, digits, tmp_path / "exact", v=None, timesteps=3, dtype="float32", progress=False)
        .influence(queries)
        .per_timestep)
    d = sum(p.numel() for p in pipe.unet.parameters())
    noise = (
        collect(pipe, digits, tmp_path / "c", v=512, timesteps=3, dtype="float32", progress=False)
        .influence(queries)
        .per_timestep
        - exact)
    assert exact.abs().max() <= 1 + 1e-5
    assert noise.std() < 2 * standard_error(512, d, inner=1.)


def test_one_query_or_many_any_order(store, digits):
    queries = digits.select([3, 14, 15, 9, 26])
    together = store.influence(queries).values
    assert torch.allclose(
        together, torch.cat([store.influence(queries.select([i])).values for i in range(5)]), atol=1e-4)
    assert torch.allclose(
        together.flip(0), store.influence(queries.select(range(4, -1, -1))).values, atol=1e-4)


def test_all_kinds_of_queries(store, digits):
    image = digits[3]["image"]
    scores = [
        store.influence(q).values
        for q in (
            image,
            [image],
            [{"image": image}],
            {"image": image},
            digits.select([3]),
            store.gradients(image))]
    assert all(torch.allclose(s, scores[0]) for s in scores)


def test_reopened_store_scores_the_same(store, pipe, digits):
    again = open_store(store.folder, pipe, digits)
    assert torch.equal(again.influence(digits.select([5])).values, store.influence(digits.select([5])).values)


def test_rankings(store, digits):
    scores = store.influence(digits.select([3, 12]))
    top, bottom = scores.top(40), scores.bottom(40)
    assert top.rows[:, 0].tolist() == [3, 12] and torch.equal(top.scores.flip(1), bottom.scores)
    assert all(sorted(r.tolist()) == list(range(40)) for r in top.rows)
    text = repr(scores.top(2) + scores.bottom(2))
    assert text.count("the most influential") == text.count("the lowest scores") == 2 and "label" in text


def test_rankings_draw_themselves(store, digits, tmp_path):
    ranking = store.influence(digits.select([3, 12])).top(4) + store.influence(digits.select([3, 12])).bottom(
        4)
    page = ranking._repr_html_()
    assert page.count("<img") == 2 + 4 * 4 and "label" in page
    assert ranking.save(tmp_path / "deep" / "r.png").stat().st_size > 1000
    unknown = Store(store.folder).influence(store.gradients(digits.select([3]))).top(2)
    assert "sample     3" in unknown._repr_html_()
    with pytest.raises(ValueError, match="images are not known"): unknown.figure()


def test_equal_scores_keep_the_order_of_the_samples(store):
    from dmin.core.scores import Scores
    scores = Scores(torch.zeros(1, 6, 3), [0, 1, 2])
    assert scores.top(6).rows.tolist() == scores.bottom(6).rows.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_attributors_answer_one_call(store, digits):
    queries = digits.select([0, 1, 2])
    for method in (
        DMin(store),
        DMin(store, normalise=False),
        DMin(store, weights=[1, 0, 0]),
        RawPixels(digits),
        Random(40),
    ):
        assert method.scores(queries).shape == (3, 40) and method.name
    assert torch.equal(Random(40, seed=1).scores(queries), Random(40, seed=1).scores(queries))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """600 vectors in 20 clusters, and queries near them."""
    torch.manual_seed(0)
    centres = torch.randn(20, 1, 2, 64)
    x = torch.nn.functional.normalize((centres + .7 * torch.randn(20, 30, 2, 64)).flatten(0, 1), dim=2)
    store = Store.create(
        tmp_path_factory.mktemp("index") / "store",
        Manifest("x", "y", 10**5, [0, 1], 64, sample_ids=[str(i) for i in range(600)]))
    for i in range(0, 600, 64):
        store.write(
            range(i, min(600, i + 64)),
            x[i : i + 64],
            torch.ones(len(x[i : i + 64]), 2),
            torch.ones(len(x[i : i + 64]), 2))
    q = torch.nn.functional.normalize((centres + .7 * torch.randn(20, 1, 2, 64)).flatten(0, 1), dim=2)
    return store, Gradients(q, torch.ones(20, 2), torch.ones(20, 2))


@pytest.mark.parametrize("width", [None, 48])
def test_index_finds_the_exact_top_k(large, width):
    store, queries = large
    index = build_index(store, width=width, M=16, ef_construction=200, threads=1, progress=False)
    assert index.recall(queries, k=10) > .98
    assert index.recall(queries, k=10, ef=10) <= index.recall(queries, k=10, ef=300)
    exact = store.influence(queries).top(10)
    found = index.search(queries, k=10, ef=600, rerank=600)
    assert torch.equal(found.rows, exact.rows) and torch.allclose(found.scores, exact.scores, atol=1e-5)


def test_an_index_is_as_large_as_what_it_holds(large):
    store, queries = large
    sizes = {}
    for width in (None, 16, 10**6):
        index = build_index(store, width=width, progress=False)
        [graph] = store.folder.glob("index-*.hnsw")
        sizes[width] = graph.stat().st_size
    assert sizes[None] - sizes[16] == 600 * 4 * (2 * 64 - 16) and sizes[10**6] == sizes[None]
    assert index.about["width"] is None   # as wide as the gradients: they are kept as they are


def test_an_index_of_before_it_had_a_width(large):
    from dmin.core.index import _own_checksum
    store, queries = large
    wanted = build_index(store, width=None, threads=1, progress=False).search(queries, 5)
    path = store.folder / "index.json"
    about = json.loads(path.read_text())
    del about["width"], about["checksum"]
    path.write_text(json.dumps(about | {"checksum": _own_checksum(about)}))
    assert torch.equal(open_index(store).search(queries, 5).rows, wanted.rows)


def test_index_is_saved_and_the_same_with_one_thread(large):
    store, queries = large
    first = build_index(store, M=8, ef_construction=100, threads=1, seed=3, progress=False).search(
        queries, k=5, ef=20)
    assert torch.equal(open_index(store).search(queries, k=5, ef=20).rows, first.rows)
    assert torch.equal(
        build_index(store, M=8, ef_construction=100, threads=1, seed=3, progress=False)
        .search(queries, k=5, ef=20)
        .rows,
        first.rows)
