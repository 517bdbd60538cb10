"""The compression kernel for GPUs, without one: interpreted on a processor, and compiled for two kinds of GPU."""
import json
import os
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import PYTHON

from dmin.core.compression import _holds, _kernel, add_plainly

if not os.environ.get("DMIN_REQUIRE_PEERS"): pytest.importorskip("triton")


@lru_cache
def python(script, interpreter=sys.executable, **environment):
    """What a process of its own prints. Triton reads TRITON_INTERPRET when it is imported: not by a fork."""
    run = subprocess.run([interpreter, "-c", script], capture_output=True, text=True, timeout=600, env={
        **{k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}, **environment})
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


EQUAL = """
import torch
from dmin.core.compression import _holds, add_plainly, Compressor
import dmin.core.gpu
from dmin.core.gpu import add_piece
draw, cases, usual = torch.Generator().manual_seed(0), 0, dmin.core.gpu._PROGRAMS
for v, seed, dtype, programs in (
    (1, 0, torch.float32, 1), (8, 2**62 + 1, torch.float64, 4), (96, 3, torch.float32, 4), (1500, 2**62 + 1, torch.float32, 8),
    (4096, 0, torch.float64, 16)):
    dmin.core.gpu._PROGRAMS = programs   # interpreted, each takes its time
    for start, length in ((0, 1), (0, 3 * v), (63, 7 * v + 5), (65 * v - 1, 10 * v), (2**33 + 17, 500)):
        compressor, n = Compressor(v, seed), 1 + cases % 3
        piece = torch.randint(-99, 100, (n, min(length, 2000)), generator=draw).to(dtype)   # all sums are exact
        plain, found = (compressor.zeros(n, dtype) for _ in range(2))
        for add, total in ((add_plainly, plain), (add_piece, found)): add(total, piece, start, compressor.places)
        assert torch.equal(compressor.finish(found), compressor.finish(plain)), (v, seed, start, length, n)
        cases += 1
dmin.core.gpu._PROGRAMS = 4
assert _holds(add_piece, torch.device("cpu"), ((96, 3, 20_000), (1500, 64, 6_000)))
dmin.core.gpu._PROGRAMS = usual
print(cases, "equal")
"""

COUNTED = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from dmin.core.compression import Compressor
import dmin.core.gpu as gpu

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        global n
        n += not any(word in str(f) for word in ("view", "slice", "empty"))   # which launch nothing
        return f(*args, **kwargs or {})

launched, launch = 0, gpu._add
class Kernel:
    def __getitem__(self, grid):
        def run(*args, **kwargs):
            global launched
            launched += 1
        return run
gpu._add = Kernel()
for batch in (1, 8, 64):
    compressor = Compressor(4096)
    piece, total = torch.zeros(batch, 500_000), compressor.zeros(batch)
    gpu.add_piece(total, piece, 0, compressor.places)   # its constants are on the device from now on
    n = launched = 0
    with Count(): gpu.add_piece(total, piece, 7, compressor.places)
    print(n, launched)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dmin.core.gpu import _add, _BLOCK
numbers = {name: "i64" for name in ("start", "length", "v", "m", "sign_seed", "high_seed", "blocks_each")}
for dtype in ("fp32", "fp64"):
    for chip in (80, 90):
        signature = {"out": f"*{dtype}", "piece": f"*{dtype}", "low": "*i64", **numbers, "BLOCK": "constexpr"}
        source = ASTSource(_add, signature, constexprs={"BLOCK": _BLOCK})
        assert triton.compile(source, target=GPUTarget("cuda", chip, 32)).asm["cubin"]
        print(dtype, chip)
"""


def test_the_same_numbers_as_on_the_processor():
    assert python(EQUAL + COUNTED, TRITON_INTERPRET="1").startswith("25 equal\n")


def test_few_launches_whatever_the_batch():
    """One of the kernel, and two of PyTorch: a sum, and adding it."""
    lines = python(EQUAL + COUNTED, TRITON_INTERPRET="1").splitlines()[1:]
    counts = [tuple(map(int, line.split())) for line in lines]
    assert len(counts) == 3 and len(set(counts)) == 1
    assert counts[0] == (2, 1)


def test_it_compiles_for_gpus_that_are_not_here():
    assert len(python(COMPILED, PYTHON).split("\n")) == 5


def test_what_gives_other_numbers_is_not_used():
    def forgets_one(total, piece, start, places): add_plainly(total, piece[:, :-1], start, places)
    here = torch.device("cpu")
    assert _holds(add_plainly, here) and not _holds(forgets_one, here)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel works here")
def test_where_it_fails_the_plain_operations_are_used():
    _kernel.cache_clear()
    with pytest.warns(UserWarning, match="not used on cuda, where it failed: .*slower"):
        assert _kernel(torch.device("cuda")) is None
    with warnings.catch_warnings():   # once
        warnings.simplefilter("error")
        assert _kernel(torch.device("cuda")) is None
    assert _kernel(torch.device("cpu")) is None


def gpu_tool(*options):
    tool = Path(__file__).parents[1] / "tools" / "gpu.py"
    return subprocess.run([PYTHON, str(tool), *options], capture_output=True, text=True, timeout=600)


def test_the_tool_for_machines_with_a_gpu(tmp_path):
    """The same lines with a small network on the processor, where everything must agree."""
    run = gpu_tool("--tiny", "--device", "cpu", "--output", str(tmp_path / "gpu.json"))
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found["checks"]["gradients"].values()) == set(found["checks"]["compressor"].values()) == {0.}
    measured = found["measured"]["SD 3 Medium (Full)"]
    assert measured["parameters"] > 10**6 and measured["paper_hours"] == 330 and measured["ratio"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_tool_says_that_there_is_no_gpu():
    run = gpu_tool()
    assert run.returncode == 2 and "there is no GPU" in run.stderr and "--tiny --device cpu" in run.stderr
