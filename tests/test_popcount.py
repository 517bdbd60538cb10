"""Counted bits: the same products to the bit as unpacked ones, on any width, and nothing lost without a compiler."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import dmin.core.dtypes
import dmin.core.popcount as popcount
from dmin.core.dtypes import columns, pack, products

compiled = pytest.mark.skipif(not popcount.counts_bits(8), reason="no compiler")


@pytest.fixture
def fresh():
    popcount._library.cache_clear()
    yield
    popcount._library.cache_clear()


@compiled
@pytest.mark.parametrize("width", [8, 16, 56, 64, 72, 512, 520, 8192])
@pytest.mark.parametrize("q", [1, 3])
def test_sums_are_those_of_numpy(width, q):
    draw = torch.Generator().manual_seed(width)
    signs = torch.randint(0, 256, (70, 3, width), generator=draw, dtype=torch.uint8)
    whole = torch.randint(-2**14, 2**14, (3, q, 8 * width), generator=draw)
    whole[0, 0, :2] = torch.tensor([-2**14, 2**14 - 1])
    bits = torch.from_numpy(np.unpackbits(signs.numpy(), axis=-1, bitorder="little"))
    expected = torch.einsum("ntv,tqv->tnq", bits.double(), whole.double()).long()
    planes = popcount.planes_of(whole)
    assert torch.equal(popcount.whole_products(signs, planes), expected)
    assert torch.equal(popcount._by_numpy(signs, planes), expected)


@compiled
def test_some_rows_of_a_shard_and_several_threads():
    signs = torch.randint(0, 256, (500, 2, 64), dtype=torch.uint8)
    planes = popcount.planes_of(torch.randint(-2**14, 2**14, (2, 2, 512)))
    expected, threads = popcount._by_numpy(signs, planes), torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(popcount.whole_products(signs, planes), expected)
            assert torch.equal(popcount.whole_products(signs[100:], planes), expected[:, 100:])
            assert torch.equal(popcount.whole_products(signs[::3], planes), expected[:, ::3])
            apart = signs.transpose(1, 2).contiguous().transpose(1, 2)
            assert torch.equal(popcount.whole_products(apart, planes), expected)
            assert popcount.whole_products(signs[:0], planes).shape == (2, 0, 2)
    finally: torch.set_num_threads(threads)


@compiled
@pytest.mark.parametrize("v", [8, 32, 64, 256, 4096])
@pytest.mark.parametrize("q", [1, 4, 5])
def test_products_to_the_bit_with_and_without(v, q, monkeypatch):
    x, queries = torch.randn(40, 3, v), torch.randn(q, 3, v)
    stored = pack(x / x.norm(dim=2, keepdim=True), "1bit")
    def found(): return products(stored["gradients"], stored["scales"], columns(queries, "1bit"))
    by = columns(queries, "1bit")
    assert (by.planes is not None) == (q <= 4 and v >= 64)
    with_library = found()
    monkeypatch.setattr(dmin.core.dtypes, "counts_bits", lambda width: False)
    assert columns(queries, "1bit").planes is None
    assert torch.equal(with_library, found())


def test_without_a_compiler(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert not popcount.counts_bits(512)


def test_a_compiler_that_fails(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(popcount, "_SOURCE", "this is not C")
    assert not popcount.counts_bits(512) and not list(tmp_path.rglob("*.so"))


@compiled
def test_what_counts_wrongly_is_not_used(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wrong = popcount._SOURCE.replace("(t * n + i) * q + c] =", "(t * n + i) * q + c] = 1 +")
    assert wrong != popcount._SOURCE
    monkeypatch.setattr(popcount, "_SOURCE", wrong)
    assert not popcount.counts_bits(512) and list(tmp_path.rglob("*.so"))


def test_a_folder_where_nothing_can_be_kept(fresh, monkeypatch, tmp_path):
    (tmp_path / "dmin").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not popcount.counts_bits(512)


@compiled
def test_two_processes_compile_at_once(tmp_path):
    script = "from dmin.core.popcount import counts_bits; assert counts_bits(512)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [each.wait(timeout=300) for each in running] == [0, 0]
    assert len(list(tmp_path.rglob("*.so"))) == 1 and len(list((tmp_path / "dmin").iterdir())) == 1
