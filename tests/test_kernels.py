"""Kernels: the three forms against the formula and each other, from memory, blocks and stores; their memory."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from dmin import collect
from dmin.core.registry import make_objective
from dmin.families.ddpm import tiny_ddpm
from dmin.methods.first_order import mean_gradients
from dmin.methods.kernels import Blocks, error_bound, in_memory, Kernel, left_out, mean_gradient_blocks
from dmin.methods.kernels import timestep_blocks, top_directions
from dmin.methods.trak import choose_damping, Damped, DAMPINGS, DampingCurve, Kernel as SameKernel, TRAK

DAMPING = (1e-5, .1, 1e3)


def draw(n, v, decay=.8, seed=0):
    """Rows whose use of directions falls off, and three queries like them; float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 3, v, generator=generator, dtype=torch.float64) * decay ** torch.arange(v)
    turn = torch.linalg.qr(torch.randn(v, v, generator=generator, dtype=torch.float64))[0]
    return (x @ turn).split([n, 3])


def shuffled_blocks(rows, size=7):
    """Blocks by position, in another order each time they are read."""
    reads = iter(range(10**6))

    def read():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(next(reads)))
        for part in order.split(size): yield part, rows[part]
    return Blocks(*rows.shape, read)


def exactly(rows, queries, damping):
    """Scores, solved rows' norms and leverages by a solve with the full matrix."""
    shift = damping * rows.square().sum(1).mean()
    solved = torch.linalg.solve(rows.T @ rows + shift * torch.eye(rows.shape[1], dtype=torch.float64), rows.T)
    return queries @ solved, solved.norm(dim=0), (rows * solved.T).sum(1)


def scores64(kernel, queries, damping):
    out = torch.full((len(queries), kernel.n), torch.nan, dtype=torch.float64)
    for positions, block in kernel.score_blocks(queries, damping): out[:, positions] = block
    return out


def close(a, b, relative): return (a - b).abs().max() <= relative * b.abs().max()


def test_trak_has_the_same_kernel(): assert SameKernel is Kernel and issubclass(TRAK, Damped) and len(DAMPINGS) == 9


@pytest.mark.parametrize("damping", DAMPING)
@pytest.mark.parametrize("n, v", [(10, 30), (60, 20), (25, 25), (1, 5), (5, 1)])
def test_every_form_is_the_formula(n, v, damping):
    rows, queries = draw(n, v)
    scores, norms, leverage = exactly(rows, queries, damping)
    for source in (rows, shuffled_blocks(rows)):
        for rank in (None, min(n, v)):
            kernel = Kernel(source, rank)
            assert kernel.form == ("truncated" if rank else "dual" if n <= v else "primal")
            # 1e-16 of the largest eigenvalue over the shift: at most 60 · 1e5 · 1e-16
            assert close(scores64(kernel, queries, damping), scores, 1e-8 if damping < 1e-3 else 1e-10)
            assert close(kernel.scores(queries, damping).double(), scores, 1e-6)
            assert close(kernel.norms(damping).double(), norms, 1e-5)
            assert close(kernel.own_scores(damping).double(), leverage, 1e-5)


@pytest.mark.parametrize("n, v", [(10, 30), (60, 20)])
def test_blocks_and_memory_agree_to_ten_digits(n, v):
    rows, queries = draw(n, v)
    held, read = Kernel(rows), Kernel(shuffled_blocks(rows))
    for damping in (1e-3, .1, 1e3):
        assert close(scores64(read, queries, damping), scores64(held, queries, damping), 1e-10)
        assert close(left_out(read, damping), left_out(held, damping), 1e-10)


def test_dual_and_primal_are_one_kernel():
    """Columns of nought change no product, and turn one form into the other."""
    rows, queries = draw(20, 15)
    primal = Kernel(rows)
    dual = Kernel(torch.nn.functional.pad(rows, (0, 10)))
    assert (primal.form, dual.form) == ("primal", "dual")
    padded = torch.nn.functional.pad(queries, (0, 10))
    for damping in (1e-3, .1, 10.):
        assert close(scores64(dual, padded, damping), scores64(primal, queries, damping), 1e-10)
        assert close(dual.own_scores(damping), primal.own_scores(damping), 1e-6)
        assert close(left_out(dual, damping), left_out(primal, damping), 1e-10)


@pytest.mark.parametrize("n, v", [(12, 40), (80, 16)])
def test_leverages_sum_to_the_effective_dimension(n, v):
    rows, _ = draw(n, v)
    values = torch.linalg.svdvals(rows) ** 2
    for damping in (1e-3, .1, 10.):
        h = Kernel(rows).own_scores(damping).double()
        shift = damping * rows.square().sum(1).mean()
        assert (h > 0).all() and (h < 1 + 1e-6).all()
        assert abs(h.sum() - (values / (values + shift)).sum()) < 1e-5 * n
        assert close(left_out(Kernel(rows), damping), 1 - h, 1e-5)


def test_what_leverage_leaves_keeps_its_digits():
    """With fewer rows than dimensions and hardly any damping all leverages are one, to float32."""
    rows, _ = draw(8, 20, decay=1.)
    shift = 1e-10 * rows.square().sum(1).mean()
    wanted = shift * torch.linalg.inv(rows @ rows.T + shift * torch.eye(8, dtype=torch.float64)).diagonal()
    assert torch.allclose(left_out(Kernel(rows), 1e-10), wanted, rtol=1e-6)
    assert (1 - Kernel(rows).own_scores(1e-10) == 0).any()


@pytest.mark.parametrize("damping", [1e-3, .1])
@pytest.mark.parametrize("decay", [.7, .95])
def test_the_error_bound_holds_and_falls(damping, decay):
    rows, queries = draw(200, 50, decay)
    scores, bounds = exactly(rows, queries, damping)[0], []
    for rank in (5, 20, 35, 50):
        kernel = Kernel(rows, rank)
        error = (scores64(kernel, queries, damping) - scores).norm(dim=1)
        bound = error_bound(kernel, queries, damping)
        assert (error <= bound * (1 + 1e-6) + 1e-9 * scores.norm(dim=1)).all()
        bounds.append((bound / scores.norm(dim=1)).max().item())
    assert bounds == sorted(bounds, reverse=True) and bounds[-1] < 1e-6


def test_a_low_rank_set_is_exact_at_its_rank():
    rows, queries = draw(100, 40)
    rows = rows @ torch.diag((torch.arange(40) < 6).double())
    kernel = Kernel(rows, 6)
    assert close(scores64(kernel, queries, .01), exactly(rows, queries, .01)[0], 1e-8)
    assert kernel.solver.directions.rest < 1e-10 * kernel.unit


def test_found_directions_keep_what_they_must():
    """Orthonormal, no eigenvalue above the true one, and nothing of the squared norm lost."""
    rows, _ = draw(300, 40, .9)
    found, values = top_directions(shuffled_blocks(rows), 10), torch.linalg.svdvals(rows) ** 2
    assert close(found.vectors.T @ found.vectors, torch.eye(10, dtype=torch.float64), 1e-12)
    assert (found.values.flip(0) <= values[:10] * (1 + 1e-9)).all()
    assert abs(found.values.sum() + 30 * found.rest - values.sum()) < 1e-9 * values.sum()


def test_what_goes_wrong_says_so():
    rows = torch.randn(6, 4)
    for bad, said in ((torch.zeros(6, 4), "mean squared norm"), (rows / 0, "not finite"), (rows[0], r"expected \(n, v\)"),
                      (rows[:0], "at least one"), (Blocks(7, 4, lambda: iter([(slice(0, 6), rows)])), "hold 6 rows, expected 7"),
                      (Blocks(6, 5, lambda: iter([(slice(0, 6), rows)])), r"expected \(m, 5\)")):
        with pytest.raises(ValueError, match=said): Kernel(bad)
    with pytest.raises(ValueError, match=r"queries of shape \(2, 3\): expected \(q, 4\)"): Kernel(rows).scores(torch.ones(2, 3), .1)
    for rank in (0, 5, 1.5):
        with pytest.raises(ValueError, match="rank="): Kernel(rows, rank)
    with pytest.raises(ValueError, match="memory=8"): Kernel(rows, memory=8)
    with pytest.warns(UserWarning, match="approximated by 2 directions"): assert Kernel(rows, memory=400).form == "truncated"


# stores

@pytest.fixture(scope="module")
def store(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return collect(make_objective(tiny_ddpm(8, channels=(16,))), digits, folder, v=4, timesteps=3, shard_size=16, progress=False)


def test_a_store_is_read_in_its_order(store):
    for weights in (None, [1, 0, 2.]):
        read = mean_gradient_blocks(store, weights, memory=0)
        assert read.kept is None and torch.equal(in_memory(read), mean_gradients(store, weights))
    for t in range(3): assert torch.equal(in_memory(timestep_blocks(store, t)), store.vectors()[:, t])


@pytest.mark.parametrize("form", ["plain", "relative", "renormalised"])
def test_trak_of_rows_that_are_not_kept(store, form):
    """40 rows of 4 numbers take 640 bytes, and so does their exact kernel."""
    read, held = TRAK(store, .1, form, memory=640), TRAK(store, .1, form)
    assert read.kernel.form == "primal" and read.kernel.solver.rows.kept is not None
    with pytest.warns(UserWarning, match="approximated by 3"): cut = TRAK(store, .1, form, memory=639)
    assert cut.kernel.solver.rows.kept is None
    queries = store.samples.select([3, 7])
    assert torch.allclose(read.scores(queries), held.scores(queries), rtol=1e-5)
    streamed = Kernel(mean_gradient_blocks(store, memory=0))
    vectors = held.vectors_of(store.gradients(queries))
    assert torch.allclose(streamed.scores(vectors, .1), held.kernel.scores(vectors, .1), rtol=1e-5)


# memory

MEASURED = """
import resource, sys, torch
torch.set_num_threads(1)
from dmin.methods.kernels import Blocks, Kernel
n, v, rank = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) or None
def read():
    for k in range(0, n, 500):
        yield slice(k, k + 500), torch.randn(500, v, generator=torch.Generator().manual_seed(k))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
Kernel(Blocks(500, 64, lambda: iter([(slice(0, 500), torch.randn(500, 64))]))).scores(torch.randn(1, 64), .1)
before = peak()
kernel = Kernel(Blocks(n, v, read), rank)
for _, scores in kernel.score_blocks(torch.randn(2, v), .1): pass
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
@pytest.mark.parametrize("n, v, rank", [(60_000, 512, 0), (6_000, 8192, 16)])
def test_memory_does_not_hold_the_rows(n, v, rank):
    """Rows of 123 and 197 MB in float32, made as they are read."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(n), str(v), str(rank)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    kernel = 8 * 5 * v * (rank or v)
    block = 500 * v * (4 + 3 * 8)   # as it is read, and in float64
    assert int(run.stdout) < kernel + block + 40e6 < 4 * n * v * (1 if rank else 2)


# dampings

def test_a_damping_is_chosen_with_all_rows_of_a_small_set(store, monkeypatch):
    import dmin.methods.trak as trak
    asked = []
    monkeypatch.setattr(trak, "choose_damping", lambda score, rows, tried: asked.append(rows) or choose_damping(score, rows, tried))
    method = TRAK(store)
    assert asked[0].tolist() == list(range(40))
    assert isinstance(method.dampings, DampingCurve) and method.damping == method.dampings.chosen
    assert list(method.dampings) == sorted(DAMPINGS) and list(method.dampings.shrinkage) == sorted(DAMPINGS)


def test_shrinkage_runs_from_nought_to_one():
    """Where the damping is far below every eigenvalue it does nothing; far above, nothing else."""
    rows, queries = draw(400, 6, .9)
    curve = choose_damping(lambda x: Kernel(rows).scores(queries, x), torch.tensor([0, 1, 2]), np.logspace(-8, 8, 33))[1]
    values = list(curve.shrinkage.values())
    assert abs(values[0]) < 1e-3 and abs(values[-1] - 1) < 1e-3
    assert curve.half is not None and 1e-2 < curve.half * 400 / 6 / 70 < 1e2   # about the eigenvalues


def test_dampings_may_come_in_any_order():
    rows, queries = draw(30, 6)
    def chosen(dampings): return choose_damping(lambda x: Kernel(rows).scores(queries, x), torch.tensor([0, 1, 2]), dampings)
    (a, up), (b, down) = chosen([1e-3, .1, 10.]), chosen([10., .1, 1e-3])
    assert a == b and up == down and list(up) == list(down)
    for x in up: assert up.shrinkage[x] == pytest.approx(down.shrinkage[x])
