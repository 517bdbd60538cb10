"""Two groups of torchrun, as two machines with one folder: what they store, and who is named when one stops."""
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_pipeline, PYTHON

from dmin import collect, load_images
from dmin.core.ranks import Ranks
from dmin.core.store import Store

WORK = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import torch; torch.set_num_threads(1)
import dmin.core.ranks
from conftest import make_pipeline
from dmin.core.store import collect, Store
from dmin.reproduction.image_sets import load_images
write, rank, how = Store.write, int(os.environ["RANK"]), sys.argv[3]
def and_stop(self, rows, *rest):
    write(self, rows, *rest)
    if how and rank == 3: os.kill(os.getpid(), getattr(signal, how))
Store.write, dmin.core.ranks.STALLED = and_stop, 3
digits = load_images("mnist_5k", size=8).select(range(0, 2000, 50))
collect(make_pipeline(), digits, sys.argv[1], v=64, timesteps=2, shard_size=4, progress=False).check_complete()
"""


def start(folder, how=""):
    """Both groups, of two processes each; with `how`, the last process sends itself that signal."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    (folder / "work.py").write_text(WORK)
    where = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [PYTHON, "-m", "torch.distributed.run", *where, "--node-rank"]
    rest = [str(folder / "work.py"), str(folder / "store"), str(Path(__file__).parent), how]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    options = dict(env=environment, stderr=subprocess.STDOUT, start_new_session=True)
    outs = [open(folder / f"{i}.log", "w") for i in range(2)]   # a pipe would stay open as long as a stopped child
    both = [subprocess.Popen([*command, str(i), *rest], stdout=out, **options) for i, out in enumerate(outs)]
    for out in outs: out.close()
    return both


def end(processes):
    for process in processes:
        try: os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        process.wait()


def bytes_of(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("how, said", [("SIGKILL", "is gone"), ("SIGSTOP", "has written nothing for")])
def test_a_rank_that_stops_is_named(tmp_path, how, said):
    """The others end with its name, and the next run stores what one process would have."""
    both = start(tmp_path, how)
    try: assert both[0].wait(timeout=600)
    finally:
        end(both)
        out = (tmp_path / "0.log").read_text()
        named = re.search(r"rank 3 \(process (\d+) on ", out)
        if named and how == "SIGSTOP": os.kill(int(named[1]), signal.SIGKILL)   # its group is another
    assert named and said in out and "start it again with the same arguments" in out, out[-3000:]
    assert Store(tmp_path / "store").missing()
    if how == "SIGSTOP": return
    both = start(tmp_path)
    try: assert [process.wait(timeout=600) for process in both] == [0, 0], (tmp_path / "0.log").read_text()
    finally: end(both)
    digits = load_images("mnist_5k", size=8).select(range(0, 2000, 50))
    collect(make_pipeline(), digits, tmp_path / "one", v=64, timesteps=2, shard_size=4, progress=False)
    assert bytes_of(tmp_path / "store") == bytes_of(tmp_path / "one")
    assert not list((tmp_path / "store").glob(".rank-*"))


def test_as_long_as_nobody_has_done_a_part_nobody_is_called_stalled(tmp_path, monkeypatch):
    """A first shard may take hours, and those who have none wait for it."""
    monkeypatch.setattr("dmin.core.ranks.STALLED", .01)
    idle, slow = (
        Ranks(tmp_path, SimpleNamespace(process_index=i, num_processes=2, wait_for_everyone=None)) for i in range(2))
    idle.tell(0, 0), slow.tell(0, 1)
    idle.stopped(), time.sleep(.1)
    assert idle.stopped() == []
    slow.tell(1, 2)   # now it is known what a part takes
    idle.stopped(), time.sleep(10 * slow._longest + .1)
    assert len(idle.stopped()) == 1
