"""Fewer bits a number: what one bit keeps, what it refuses, and that its scores do not depend on how they are computed.
"""
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import make_pipeline

import dmin.core.scores
from dmin import build_index, collect, make_objective, open_index, open_store
from dmin.core.compression import Compressor, random_signs
from dmin.core.dtypes import columns, DTYPES, pack, products, rotate, stored_error, unpack
from dmin.core.gradients import Gradients
from dmin.core.shards import Manifest
from dmin.core.store import Store
from dmin.methods.dmin import DMin
from dmin.methods.first_order import Gradient
from dmin.methods.second_order import LiSSA
from dmin.methods.squared import Removal, SquaredKernels
from dmin.methods.trak import TRAK
from dmin.methods.whitened import WhitenedDMin

RECIPE = dict(v=256, timesteps=2, shard_size=7, progress=False)


def synthetic(folder, n=500, T=3, v=64, dtype="1bit", shard_size=64, seed=0):
    """A store of random unit vectors, and ten queries."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n, T, v, generator=draw), dim=2)
    norms = 1 + torch.rand(n, T, generator=draw)
    store = Store.create(folder, Manifest(
        "x", "y", 10**5, list(range(T)), v, dtype=dtype, shard_size=shard_size,
        sample_ids=[f"{seed}-{i}" for i in range(n)]))
    for rows in torch.randperm(n, generator=draw).split(shard_size):   # in no order
        store.write(rows, x[rows] * norms[rows][..., None], norms[rows], norms[rows])
    q = torch.randn(10, T, v, generator=draw)
    return store, Gradients(q, q.norm(dim=2), q.norm(dim=2))


@pytest.mark.parametrize("v", [256, 1024])
def test_one_bit_is_unbiased_and_errs_as_predicted(v):
    """Over 400 seeds: also where the query is the row itself, and for products far from zero."""
    draw = torch.Generator().manual_seed(1)
    a, b = torch.nn.functional.normalize(torch.randn(2, 8192, generator=draw, dtype=torch.float64))
    b = b - a * (a @ b)
    for inner in (0., .5, 1.):
        other = inner * a + math.sqrt(1 - inner**2) * b / b.norm()
        found = []
        for seed in range(400):
            query, row = Compressor(v, seed)(torch.stack([a, other]).float())
            stored = pack(row[None, None], "1bit")
            found.append(float(products(stored["gradients"], stored["scales"], columns(query[None, None], "1bit"))))
        found, expected = np.array(found), stored_error(v, "1bit", d=8192, inner=inner)
        # one bit is unbiased up to a relative 1 / v; four standard errors of the mean, and of the deviation
        assert abs(found.mean() - inner) < 4 * max(expected, .02) / 20 + 1.5 * inner / v
        if inner < 1: assert abs(found.std() / expected - 1) < 4 / math.sqrt(800) + .03


def test_signs_are_those_of_the_numbers():
    turned = torch.tensor([[[3., -1, 0, -2, 5, -6, -7, 8]]])
    packed = pack(rotate(turned, back=True), "1bit")
    assert packed["gradients"][0, 0, 0] | 4 == 0b10010101   # the first number is the lowest bit; the third is about 0
    assert packed["scales"].item() == pytest.approx(float(turned.square().sum() / turned.abs().sum()))
    again = rotate(unpack(*packed.values()))
    assert torch.equal(again.sign()[0, 0, [0, 1, 3, 4, 5, 6, 7]],
                       turned.sign()[0, 0, [0, 1, 3, 4, 5, 6, 7]])


@pytest.mark.parametrize("v", [8, 64, 4096])
def test_rotating_keeps_lengths_and_angles(v):
    """Against the matrix that it is, made by scipy."""
    from scipy.linalg import hadamard
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, v, generator=draw)
    matrix = torch.from_numpy(hadamard(v)).double() / math.sqrt(v)
    wanted = (x.double() * random_signs(0x1b17, 0, v)) @ matrix
    assert torch.allclose(rotate(x).double(), wanted, atol=1e-5)
    assert torch.allclose(rotate(rotate(x), back=True), x, atol=1e-5)
    assert torch.equal(rotate(x)[1:2, 2:], rotate(x[1:2, 2:]))   # whatever is turned beside it


def test_a_gradient_with_few_large_entries_is_no_exception():
    """Where v is as large as the gradient, compression mixes nothing: the rotation alone does."""
    draw, v = torch.Generator().manual_seed(2), 1024
    heavy = torch.randn(400, 1, v, generator=draw) ** 9
    rows = torch.nn.functional.normalize(heavy, dim=2)
    queries = torch.nn.functional.normalize(heavy.flip(0) + 2 * heavy, dim=2)
    stored = pack(rows, "1bit")
    found = torch.stack([
        products(stored["gradients"][i:i + 1], stored["scales"][i:i + 1], columns(queries[i:i + 1], "1bit"))[0, 0, 0]
        for i in range(400)])
    plain = (rows.sign() * queries).sum(2) * rows.square().sum(2) / rows.abs().sum(2)   # signs of what was not turned
    exact = (rows * queries).sum(2)[:, 0]
    predicted = (1 - exact.square()).clamp(min=1e-6).sqrt() * math.sqrt((math.pi / 2 - 1) / v)
    errors, unturned = (found - exact) / predicted, (plain[:, 0] - exact) / predicted
    assert abs(float(errors.mean())) < .2 and float(errors.std()) < 1.15   # four standard errors of each
    assert float(unturned.std()) > 2


def test_the_same_score_to_the_bit_in_any_batch_and_with_any_threads(tmp_path, monkeypatch):
    store, g = synthetic(tmp_path / "a")
    together = store.influence(g).per_timestep
    for q in range(10):
        alone = store.influence(Gradients(*(x[q:q + 1] for x in g))).per_timestep
        assert torch.equal(alone[0], together[q])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(store.influence(g).per_timestep, together)
    finally: torch.set_num_threads(threads)
    other, _ = synthetic(tmp_path / "b", shard_size=11)
    assert torch.equal(other.influence(g).per_timestep, together)
    for numbers in (1, 7 * 3 * 64, 100 * 3 * 64):   # a part is a row; seven; a hundred, of several shards
        monkeypatch.setattr(dmin.core.scores, "_SIGNS", numbers)
        assert torch.equal(other.influence(g).per_timestep, together)
        assert torch.equal(store.influence(g).per_timestep, together)


@pytest.mark.parametrize("numbers", [1, 7 * 3 * 64, 10**7])
def test_parts_of_a_shard_are_all_of_it(tmp_path, monkeypatch, numbers):
    store, g = synthetic(tmp_path, dtype="float32")
    wanted = torch.einsum("qtv,ntv->qnt", (g.compressed / g.norms[..., None]).double(), store.vectors().double())
    monkeypatch.setattr(dmin.core.scores, "_PART", numbers)
    assert torch.allclose(store.influence(g).per_timestep.double(), wanted, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_and_no_queries(tmp_path, dtype):
    store, g = synthetic(tmp_path, n=20, dtype=dtype)
    assert store.vectors([]).shape == (0, 3, 64)
    none = Gradients(*(x[:0] for x in g))
    assert store.influence(none).per_timestep.shape == (0, 20, 3) and store.search(none, 4).rows.shape == (0, 4)


@pytest.mark.parametrize("width", [None, 64])
def test_an_index_of_one_bit(tmp_path, width):
    store, g = synthetic(tmp_path, n=300)
    index = build_index(store, width=width, threads=1, progress=False)
    exact = store.search(g, 5)
    found = index.search(g, 5, ef=300, rerank=300)
    assert torch.equal(found.rows, exact.rows) and torch.allclose(found.scores, exact.scores, rtol=1e-5)


def test_an_index_does_not_rank_by_what_is_missing(tmp_path):
    store, g = synthetic(tmp_path, n=300)
    build_index(store, progress=False, width=64)
    next(store.folder.glob("shard-*")).unlink()
    with pytest.raises(ValueError, match="is the first that is missing"): open_index(Store(store.folder)).search(g, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalise", [True, False])
def test_search_finds_what_influence_ranks_first(tmp_path, dtype, normalise, monkeypatch):
    store, g = synthetic(tmp_path, dtype=dtype)
    weights = [1, -.5, 2]
    wanted = store.influence(g, normalise=normalise, weights=weights).top(20)
    for held in (1, 100, 10**6):
        monkeypatch.setattr(dmin.core.scores, "_MERGED", held)
        found = store.search(g, 20, normalise=normalise, weights=weights)
        assert torch.equal(found.rows, wanted.rows) and torch.allclose(found.scores, wanted.scores, rtol=1e-5)


def test_search_keeps_the_samples_order_where_scores_are_equal(tmp_path, monkeypatch):
    store = Store.create(tmp_path, Manifest("x", "y", 10**5, [0], 8, sample_ids=list(map(str, range(40)))))
    for rows in torch.arange(40).flip(0).split(3):
        store.write(rows, torch.ones(len(rows), 1, 8), torch.ones(len(rows), 1), torch.ones(len(rows), 1))
    g = Gradients(torch.ones(1, 1, 8), torch.ones(1, 1), torch.ones(1, 1))
    monkeypatch.setattr(dmin.core.scores, "_MERGED", 5)
    assert store.search(g, 40).rows.tolist() == [list(range(40))] == store.influence(g).top(40).rows.tolist()


@pytest.mark.parametrize("k", [0, 501, "3", True])
def test_search_refuses_k(tmp_path, k):
    store, g = synthetic(tmp_path)
    with pytest.raises(ValueError, match="k="): store.search(g, k)


def test_a_copy_of_fewer_bits_is_what_collecting_makes(digits, tmp_path):
    pipe, some = make_pipeline(), digits.select(range(12))
    for dtype in DTYPES:
        collected = collect(pipe, some, tmp_path / f"own-{dtype}", dtype=dtype, **RECIPE)
        exact = collect(pipe, some, tmp_path / "exact", dtype="float32", **RECIPE)
        copy = exact.copy_as(tmp_path / f"copy-{dtype}", dtype)
        contents = [{p.name: p.read_bytes() for p in s.folder.iterdir() if not p.name.startswith(".")}
                    for s in (collected, copy)]
        assert contents[0] == contents[1]
        assert torch.equal(copy.influence(some).values, collected.influence(some).values)   # it knows the pipeline
    again = open_store(tmp_path / "copy-1bit", pipe, some)
    assert again.manifest.dtype == "1bit" and again.missing() == []


def test_a_copy_that_is_interrupted_is_not_in_the_way(tmp_path, monkeypatch):
    store, g = synthetic(tmp_path / "a", dtype="float16")
    (store.folder / "columns.json").write_text("as it was noted")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".notes").write_text("of the user")
    written = []

    def interrupted(*arguments):   # at the third shard
        written.append(arguments)
        if len(written) == 3: raise KeyboardInterrupt
        return pack(*arguments)
    with monkeypatch.context() as m:
        m.setattr(dmin.core.shards, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt): store.copy_as(tmp_path / "b", "1bit")
    assert [p.name for p in (tmp_path / "b").iterdir() if p.suffix != ".lock"] == [".notes"]
    copy = store.copy_as(tmp_path / "b", "1bit")
    assert (copy.folder / "columns.json").read_text() == "as it was noted"


def test_a_copy_keeps_what_was_there(tmp_path, digits):
    store, g = synthetic(tmp_path / "a", dtype="float16")
    with pytest.raises(ValueError, match="stored in float16 can become float16, int8, 1bit"):
        store.copy_as(tmp_path / "b", "float32")
    with pytest.raises(ValueError, match="dtype='2bit'"): store.copy_as(tmp_path / "b", "2bit")
    assert not (tmp_path / "b").exists()
    with pytest.raises(FileExistsError, match="choose a new folder"): store.copy_as(store.folder, "1bit")
    (store.folder / "shard-00000000.safetensors").unlink(missing_ok=True)
    [first, *_] = sorted(store.folder.glob("shard-*"))
    first.unlink()
    with pytest.raises(ValueError, match="first that is missing"): Store(store.folder).copy_as(tmp_path / "b", "1bit")


@pytest.mark.parametrize("v, words", [(None, "choose v, such as 4096"), (100, "v=100.*a power of two.*such as 128"), (4, "such as 8")])
def test_what_one_bit_cannot_hold(digits, tmp_path, v, words):
    with pytest.raises(ValueError, match=words):
        collect(make_pipeline(), digits, tmp_path / "s", dtype="1bit", **RECIPE | dict(v=v))
    assert not (tmp_path / "s").exists()


def test_bytes(tmp_path):
    """A number takes a bit; beside it stand a scale, a norm, a loss and a row number."""
    store, _ = synthetic(tmp_path, n=256, T=10, v=4096, shard_size=256)
    assert store.nbytes() / 256 < 10 * (4096 / 8 + 12) + 8 + 10


def test_methods_with_a_kernel_warn_and_dmin_does_not(digits, tmp_path):
    """Their numbers are computed all the same."""
    pipe, some = make_pipeline(), digits.select(range(12))
    loss = collect(pipe, some, tmp_path / "loss", dtype="1bit", **RECIPE)
    average = collect(make_objective(pipe, output="average"), some, tmp_path / "average", dtype="1bit", **RECIPE)
    for make in (TRAK, WhitenedDMin, LiSSA, lambda s: Removal(s, average), lambda s: SquaredKernels(average)):
        with pytest.warns(UserWarning, match="one bit a number.*0.098, not 0.062"): method = make(loss)
        assert method.scores(some.select([0])).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DMin(loss).scores(some).argmax(1).tolist() == list(range(12))
        assert Gradient(loss).scores(some).isfinite().all()
