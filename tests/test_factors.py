"""Compression from factors: the places are what they say, whatever way is taken; unbiased; the same store."""
import json

import pytest
import torch
from conftest import make_pipeline, one_by_one
from torch import nn

import dmin.core.gradients
from dmin import collect, DMin, open_store
from dmin.core.compression import Compressor, random_words, standard_error
from dmin.core.factors import (
    cheaper_by_factors, compressor_of, factored_weights, FactoredCompressor, FactoredWeight)
from dmin.core.gradients import PerSampleGradients, sample_gradients
from dmin.core.registry import make_objective

LEAST = 60   # so that small networks' weights count as large, convolutions' from 480 numbers on


def by_places(gradient, v, seed, weights):   # (n, d) float64 -> (n, v)
    """Element by element, with Python's own integers."""
    row_seed, column_seed = (int(x) for x in random_words(seed, 3, 2))
    found = Compressor(v, seed)(gradient * outside(gradient.shape[1], weights))
    for w in weights:
        rows = random_words(row_seed, w.start, w.rows).tolist()
        columns = random_words(column_seed, w.start, w.places * w.columns).tolist()
        for k in range(w.end - w.start):
            (place, a), b = divmod(k // w.columns, w.rows), k % w.columns
            words = rows[a], columns[place * w.columns + b]
            to = sum((word % 2**64 >> 1) % 2**62 % v for word in words) % v
            sign = -1 if (words[0] < 0) != (words[1] < 0) else 1
            found[:, to] += sign * gradient[:, w.start + k]
    return found


def outside(d, weights):
    kept = torch.ones(d, dtype=torch.float64)
    for w in weights: kept[w.start:w.end] = 0
    return kept


WEIGHTS = [FactoredWeight(13, 1, 20, 31), FactoredWeight(700, 9, 7, 5), FactoredWeight(1015, 1, 8, 8)]


@pytest.mark.parametrize("v", [1, 64, 96, 1000])
def test_places_are_by_row_and_column(v):
    gradient = torch.randn(2, 1200, dtype=torch.float64)
    compress = FactoredCompressor(v, 3, WEIGHTS)
    assert torch.allclose(compress(gradient), by_places(gradient, v, 3, WEIGHTS))
    total, cuts = compress.zeros(2, torch.float64), [0, 10, 20, 300, 702, 750, 1014, 1020, 1200]
    for a, b in zip(cuts, cuts[1:]): compress.add_(total, gradient[:, a:b], a)
    assert torch.allclose(compress.finish(total), compress(gradient))


def test_bits_are_these_on_every_machine():
    gradient = torch.arange(600.)[None]   # whole numbers, but transforms round
    found = FactoredCompressor(8, 11, [FactoredWeight(5, 1, 20, 25)])(gradient)
    assert by_places(gradient.double(), 8, 11, [FactoredWeight(5, 1, 20, 25)]).tolist() == FIXED
    assert found.round().tolist() == FIXED and (found - found.round()).abs().max() < .1


FIXED = [[3238, -2204, 1436, -1000, 4551, -1894, 3281, -2148]]   # exact, by integers


@pytest.mark.parametrize("cosine", [0., .9])
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_unbiased_with_nearly_the_usual_variance(tokens, cosine, v=128, seeds=1500):
    """Worst with one token, whose gradients are of rank one: there the variance may double."""
    torch.manual_seed(0)
    weight = FactoredWeight(0, 1, 40, 60)
    x, grad = (torch.randn(2, tokens, m, dtype=torch.float64) for m in (60, 40))
    for y in (x, grad): y[1] = cosine ** .5 * y[0] + (1 - cosine) ** .5 * y[1]
    matrix = torch.einsum("ntr,ntc->nrc", grad, x).flatten(1)
    true, unit = float(matrix[0] @ matrix[1]), float(matrix.norm(dim=1).prod())
    products, squares = [], []
    for seed in range(seeds):
        a, b = FactoredCompressor(v, seed, [weight]).of_factors(weight, x, grad)
        products.append(a @ b)
        squares.append(a @ a)
    products, squares = torch.stack(products), torch.stack(squares)
    assert abs(products.mean() - true) < 4 * products.std() / seeds ** .5
    assert abs(squares.mean() - matrix[0] @ matrix[0]) < 4 * squares.std() / seeds ** .5
    usual = unit * standard_error(v, inner=true / unit)
    assert .8 * usual < products.std() < (1.8 if tokens == 1 else 1.3) * usual


class Between(nn.Module):
    """A weight that is used twice, and one of a plain parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.mixed = nn.Linear(30, 30), nn.Parameter(torch.randn(30, 30) / 6)

    def forward(self, x): return self.first(self.first(x).relu()) @ self.mixed


@pytest.mark.parametrize("make, shape", [
    (lambda: nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20)), (3, 6, 30)),
    (lambda: nn.Sequential(nn.Linear(30, 40)), (3, 200, 30)),   # many tokens: formed first
    (lambda: nn.Sequential(nn.Conv2d(6, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 30, 1)), (3, 6, 5, 7)),
    (lambda: nn.Sequential(nn.Conv2d(6, 20, 3, 2, dilation=2)), (3, 6, 9, 12)),
    (lambda: nn.Sequential(nn.Conv2d(6, 20, 3, groups=2), nn.Conv2d(20, 30, 1)), (3, 6, 9, 9)),
    (lambda: nn.Sequential(nn.Embedding(40, 20), nn.Linear(20, 30)), (3, 8)),
    (Between, (3, 8, 30))])
@pytest.mark.parametrize("v", [32, 500])
def test_layers(make, shape, v):
    torch.manual_seed(0)
    model = make()
    parameters = dict(model.named_parameters())
    x = torch.randint(0, 40, shape) if len(shape) == 2 else torch.randn(shape)
    def loss(i=slice(None)): return model(x[i]).square().flatten(1).mean(1)
    truth = one_by_one(parameters, lambda i: loss(slice(i, i + 1)).sum(), 3).double()
    weights = factored_weights(parameters, LEAST)
    assert weights
    compress = FactoredCompressor(v, 1, weights)
    with PerSampleGradients(model, parameters, compress) as g:
        found, norms, _ = g(loss, 3)
        g.verify(loss, 3, found, norms)
    expected = by_places(truth, v, 1, weights)
    assert (found - expected).norm() / truth.norm() < 1e-5
    assert torch.allclose(norms, compress.norms(truth), rtol=1e-4)


@pytest.mark.parametrize("layer, shape", [
    (nn.Conv2d(6, 20, 3, padding=1), (7, 6, 5, 5)), (nn.Linear(30, 40), (7, 6, 30))])
def test_some_samples_at_a_time(layer, shape, monkeypatch):
    """As where what a convolution unfolds would be too large."""
    x, parameters = torch.randn(shape), dict(layer.named_parameters())
    def loss(): return layer(x).square().flatten(1).mean(1)
    found = []
    for part in (2**20, 1000):
        monkeypatch.setattr(dmin.core.gradients, "_PART", part)
        with PerSampleGradients(layer, parameters, FactoredCompressor(64, 1, factored_weights(parameters, 60))) as g:
            found.append(g(loss, 7))
    for a, b in zip(*found): assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size, noises", [(64, 1), (3, 1), (5, 2), (2, 3)])
def test_of_a_network_in_any_batch(digits, batch_size, noises):
    objective = make_objective(make_pipeline())
    weights = factored_weights(objective.parameters, LEAST)
    d = sum(p.numel() for p in objective.parameters.values())
    compress = compressor_of(d, 256, 0, weights)
    t, some = torch.tensor([10, 500]), digits.select(range(3))
    found = sample_gradients(
        objective, some, t, compress, noises=noises, batch_size=batch_size, verify=True)
    whole = sample_gradients(objective, some, t, compressor_of(d, None), noises=noises)
    expected = compress(whole.compressed.flatten(0, 1).double()).view(3, 2, 256)
    assert (found.compressed - expected).norm() / expected.norm() < 1e-5
    assert (found.norms / whole.norms - 1).abs().max() < 5 / (2 * 256) ** .5


def test_both_ways_are_taken_in_these_tests():
    """The weights of `test_layers` by their tokens, at both v."""
    few, many, conv = FactoredWeight(0, 1, 40, 30), FactoredWeight(0, 1, 40, 30), FactoredWeight(0, 9, 20, 6)
    ways = {cheaper_by_factors(w, n, v) for w, n in ((few, 6), (many, 200), (conv, 35)) for v in (32, 500)}
    assert ways == {True, False}


def test_a_store_by_factors(pipe, digits, tmp_path):
    recipe = dict(v=256, timesteps=2, dtype="float32", progress=False)
    plain = collect(pipe, digits, tmp_path / "plain", **recipe)
    store = collect(pipe, digits, tmp_path / "factored", factored=LEAST, **recipe)
    assert plain.manifest.factored == [] and len(store.manifest.factored) > 5
    assert plain.manifest.fingerprint() != store.manifest.fingerprint()
    expected = plain.per_sample("norms")
    assert (store.per_sample("norms") / expected - 1).abs().max() < 5 / (2 * 256) ** .5
    again = open_store(tmp_path / "factored", pipe, digits)   # what is factored stands in the store
    asked = digits.select([3, 17])
    scores = DMin(again).influence(asked)
    assert scores.top(1).rows.flatten().tolist() == [3, 17]
    apart = scores.per_timestep - DMin(plain).influence(asked).per_timestep
    assert apart.std() < 2 * standard_error(256)   # two estimates of one number
    with pytest.raises(ValueError, match="weights are compressed by factors, not 0"):
        collect(pipe, digits, tmp_path / "factored", **recipe)


def test_one_goes_on_with_a_store_by_factors(pipe, digits, tmp_path):
    recipe = dict(v=64, timesteps=2, dtype="1bit", shard_size=8, factored=LEAST, progress=False)
    whole = collect(pipe, digits, tmp_path / "whole", **recipe)
    for name in ("a", "b"): collect(pipe, digits, tmp_path / name, **recipe)
    gone = sorted((tmp_path / "b").glob("shard-*"))[1]
    gone.unlink()
    again = collect(pipe, digits, tmp_path / "b", **recipe)
    assert torch.equal(again.vectors(), whole.vectors())


def test_the_fingerprint_of_a_store_without_is_as_it_was(pipe, digits, tmp_path):
    store = collect(pipe, digits.select(range(4)), tmp_path / "s", v=64, timesteps=2, progress=False)
    about = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert about["factored"] == []
    del about["factored"]
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(about))
    assert open_store(tmp_path / "s").manifest == store.manifest
    assert torch.equal(open_store(tmp_path / "s").vectors(), store.vectors())


def test_only_large_weights(pipe):
    parameters = make_objective(pipe).parameters
    assert factored_weights(parameters) == []   # of a million numbers
    found, d = factored_weights(parameters, LEAST), sum(p.numel() for p in parameters.values())
    def least(p): return LEAST if p[0, 0].numel() == 1 else 8 * LEAST
    sizes = [p.numel() for p in parameters.values() if p.ndim > 1 and p.numel() >= least(p)]
    assert [w.end - w.start for w in found] == sizes and all(w.end <= d for w in found)


def test_what_cannot_be(pipe, digits, tmp_path):
    with pytest.raises(ValueError, match="factored=False to keep whole gradients"):
        collect(pipe, digits, tmp_path / "s", v=None, timesteps=2, factored=LEAST, progress=False)
    for wrong in (0, -3, 2.5, "yes"):
        with pytest.raises(ValueError, match="factored"):
            collect(pipe, digits, tmp_path / "s", v=64, timesteps=2, factored=wrong, progress=False)
    collect(pipe, digits.select(range(2)), tmp_path / "s", v=64, timesteps=2, factored=LEAST, progress=False)
    manifest = tmp_path / "s" / "manifest.json"
    about = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(about | {"factored": [[1, 2, 3]]}))
    with pytest.raises(ValueError, match="four numbers a weight"): open_store(tmp_path / "s")
