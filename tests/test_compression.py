"""Compression: the same bits everywhere, linear, unbiased, with the variance that theory predicts."""
import subprocess
import sys

import pytest
import torch

from dmin.core.compression import (
    Compressor, make_compressor, NoCompression, random_signs, random_words, ReferenceCompressor,
    standard_error)


def test_bits_are_these_on_every_machine():
    assert [int(w) for w in random_words(0, 0, 3)] == [
        -2152535657050944081,
        7960286522194355700,
        487617019471545679]
    # whole numbers are added without rounding, so the compressed gradient itself is fixed
    assert Compressor(5, seed=3)(torch.arange(23.)[None])[0].tolist() == [25, 12, 36, 31, -17]
    assert Compressor(64, seed=11)(torch.arange(100_000, dtype=torch.float64)[None])[0, :4].tolist() == [
        796495,
        3237868,
        3541863,
        -3230338]


@pytest.mark.parametrize("v", [1, 3, 64, 100, 4096])
@pytest.mark.parametrize("n", [1, 5, 40])
def test_pieces_give_what_the_whole_gives(v, n):
    d = 4 * max(1, min(64, 2**18 // v)) * v + 37 if v < 100 else 20_000
    g, compressor = torch.randn(n, d, dtype=torch.float64), Compressor(v, seed=v)
    total, cuts = compressor.zeros(n, torch.float64), sorted({0, d, *torch.randint(0, d, (6,)).tolist()})
    for a, b in zip(cuts[::-1][1:], cuts[::-1]): compressor.add_(total, g[:, a:b], a)
    assert torch.allclose(compressor.finish(total), compressor(g))
    assert torch.allclose(compressor(g), torch.cat([Compressor(v, seed=v)(row[None]) for row in g]))


def test_few_and_many_gradients_take_different_ways_to_the_same_place():
    v = 64   # one gradient of many blocks is added as a matrix, many gradients block by block
    g = torch.randn(1, 3 * 64 * v + 999, dtype=torch.float64)
    assert torch.allclose(Compressor(v)(g).expand(2000, -1), Compressor(v)(g.expand(2000, -1)))


def test_linear():
    a, b = torch.randn(2, 1, 5000, dtype=torch.float64)
    c = Compressor(128, 1)
    assert torch.allclose(c(2 * a - 3 * b), 2 * c(a) - 3 * c(b))


@pytest.mark.parametrize("make", [Compressor, lambda v, seed: ReferenceCompressor(777, v, seed)])
@pytest.mark.parametrize("v", [777, 1000])
def test_exact_when_nothing_is_lost(make, v):
    g = torch.randn(6, 777, dtype=torch.float64)
    c = make(v, 5)(g)
    assert torch.allclose(c @ c.T, g @ g.T)


def gradients(kind, d):
    """Pairs of vectors: without structure; large where they are neighbours; of rank one, as the gradient of a
    layer is.
    """
    torch.manual_seed(1)
    if kind == "white": a, b = torch.randn(2, d)
    if kind == "clustered": a, b = torch.randn(2, d) * torch.exp(-torch.linspace(-6, 6, d) ** 2)
    if kind == "rank one":
        side = int(d ** .5)
        a, b = (torch.outer(torch.randn(side), torch.randn(side) + 1).flatten() for _ in range(2))
    a = torch.nn.functional.normalize(a.double(), dim=0)
    b = torch.nn.functional.normalize(b.double() + .5 * a * b.norm(), dim=0)
    return a, b


@pytest.mark.parametrize("kind", ["white", "clustered", "rank one"])
@pytest.mark.parametrize("v", [64, 200])
def test_unbiased_with_the_predicted_variance(kind, v, seeds=1500):
    a, b = gradients(kind, d := 4096)
    both = torch.stack([a, b])
    found = torch.stack([c[0] @ c[1] for c in (Compressor(v, s)(both) for s in range(seeds))])
    blocks = [torch.nn.functional.pad(x, (0, -d % v)).view(-1, v) for x in (a, b)]
    same = (blocks[0].square().sum(1) * blocks[1].square().sum(1) + (blocks[0] * blocks[1]).sum(1) ** 2).sum()
    # pairs in different blocks meet with probability 1/v, others never
    expected = ((1 + (a @ b) ** 2 - same) / v).sqrt()
    assert abs(found.mean() - a @ b) < 4 * expected / seeds ** .5
    assert abs(found.std() / expected - 1) < .1
    # never worse than the permutation
    assert found.std() < 1.1 * standard_error(v, d, (a @ b).item(), 1, (a**2 @ b**2).item())


def test_signs_are_fair_and_independent():
    s = torch.stack([random_signs(seed, 10**9, 4096) for seed in range(400)])
    assert abs(s.mean()) < 4 / s.numel() ** .5
    # the largest of 8 million correlations
    assert (s.T @ s / 400).fill_diagonal_(0).abs().max() < 6.5 / 400 ** .5
    assert (s @ s.T / 4096).fill_diagonal_(0).abs().max() < 6 / 4096 ** .5


def test_standard_error_shrinks_to_nothing():
    assert (
        standard_error(4096) == 1 / 64
        and standard_error(100, d=100) == 0
        and standard_error(50, d=100) < standard_error(50))


def test_uncompressed_is_the_gradient():
    g = torch.randn(2, 50)
    assert torch.equal(make_compressor(50, None)(g), g) and isinstance(
        make_compressor(50, None), NoCompression)


@pytest.mark.parametrize("v, said", [(0, "positive"), (-4, "positive"), (1.5, "positive"), (True, "positive"), (101, "larger than the gradient")])
def test_v_that_makes_no_sense(v, said):
    with pytest.raises(ValueError, match=said): make_compressor(100, v)


def test_memory_does_not_grow_with_the_gradient():
    script = """
import torch
from dmin.core.compression import Compressor
def peak(): return next(int(l.split()[1]) / 1024 for l in open('/proc/self/status') if l.startswith('VmHWM'))
c, piece = Compressor(4096), torch.ones(1, 2**20)
total = c.zeros(1)
c.add_(total, piece, 0); before = peak()
for i in range(1, 200): c.add_(total, piece, i * 2**20)
print(peak() - before)
"""
    grown = float(
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=600
        ).stdout)
    assert grown < 100   # MB, while 800 MB of gradient passed through
