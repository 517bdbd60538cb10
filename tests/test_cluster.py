"""A store read by Dask's workers, real processes: the scores of one process, whatever happens to a worker."""
import os
import shutil
import signal
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from distributed import Client, LocalCluster
from test_dtypes import synthetic

import dmin.core.cluster
from dmin.core.cluster import _products, check_workers
from dmin.core.shards import ShardFolder
from dmin.core.store import Store


@pytest.fixture(scope="module")
def client():
    options = dict(threads_per_worker=1, processes=True, dashboard_address=None)
    with LocalCluster(n_workers=2, **options) as cluster, Client(cluster) as client: yield client


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "1bit"])
@pytest.mark.parametrize("read", [1, 2**26])   # bytes an answer: a shard each, or all at once
def test_scores_are_those_of_one_process(client, tmp_path, monkeypatch, dtype, read):
    store, g = synthetic(tmp_path, dtype=dtype)
    monkeypatch.setattr(dmin.core.cluster, "_READ", read)
    for options in (dict(), dict(normalise=False, weights=[1, -.5, 2])):
        alone, together = store.influence(g, **options), store.influence(g, client=client, **options)
        assert torch.equal(together.per_timestep, alone.per_timestep)
        alone, together = store.search(g, 20, **options), store.search(g, 20, client=client, **options)
        assert torch.equal(together.rows, alone.rows) and torch.equal(together.scores, alone.scores)


def slow_products(*arguments):
    time.sleep(.05)
    return _products(*arguments)


def test_a_worker_that_is_killed_changes_nothing(client, tmp_path, monkeypatch):
    import distributed
    store, g = synthetic(tmp_path, shard_size=10)
    wanted, as_completed, killed = store.influence(g).per_timestep, distributed.as_completed, []
    left = []

    def and_kill(*arguments, **options):
        for done in as_completed(*arguments, **options):
            if not killed:
                left.append(sum(not x.done() for x in arguments[0]))
                killed.append(client.run(os.getpid).popitem()[1])
                os.kill(killed[0], signal.SIGKILL)
            yield done
    monkeypatch.setattr(dmin.core.cluster, "_READ", 1)
    monkeypatch.setattr(dmin.core.cluster, "_products", slow_products)
    monkeypatch.setattr(distributed, "as_completed", and_kill)
    assert torch.equal(store.influence(g, client=client).per_timestep, wanted)
    assert killed and left[0] > 1   # so many shares had not come back


def test_a_worker_that_cannot_see_the_folder_is_named(client, tmp_path):
    store, g = synthetic(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"worker tcp://\S+ cannot read the store: there is no store.*one name"):
        check_workers(store, client)
    synthetic(tmp_path / "a", v=32)
    with pytest.raises(ValueError, match=r"worker tcp://\S+ sees another store in"): check_workers(store, client)


def test_a_folder_that_is_collected_again_is_read_again(client, tmp_path):
    """By the same recipe, of as many other samples: workers that know the folder do not answer from the old one."""
    store, g = synthetic(tmp_path / "a")
    before = store.influence(g, client=client).per_timestep
    shutil.rmtree(tmp_path / "a")
    other, g = synthetic(tmp_path / "a", seed=1)
    assert other.manifest.fingerprint() == store.manifest.fingerprint()
    with pytest.raises(ValueError, match="sees another store in"): store.influence(g, client=client)
    assert torch.equal(other.influence(g, client=client).per_timestep, other.influence(g).per_timestep)
    assert not torch.equal(other.influence(g).per_timestep, before)


def test_a_worker_with_other_versions_is_named(client, tmp_path, monkeypatch):
    store, g = synthetic(tmp_path)
    mine = dmin.core.cluster._versions()
    monkeypatch.setattr(dmin.core.cluster, "_versions", lambda: mine | {"dask": "1.0"})
    with pytest.raises(ValueError, match=r"worker tcp://\S+ has dask .*, and here it is 1\.0"):
        store.search(g, 3, client=client)


def test_no_workers_no_client_no_dask(tmp_path, monkeypatch):
    store, g = synthetic(tmp_path)
    with pytest.raises(TypeError, match="Client is needed"): store.influence(g, client="tcp://here:8786")
    with pytest.raises(TypeError, match="waits for answers"):
        store.influence(g, client=Mock(spec=Client, asynchronous=True))
    with LocalCluster(n_workers=0, dashboard_address=None) as cluster, Client(cluster) as empty:
        with pytest.raises(ValueError, match="has no workers"): store.influence(g, client=empty)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'dmin\[cluster\]'"): store.influence(g, client=object())


def test_an_incomplete_store_is_refused_before_anything_is_sent(client, tmp_path):
    store, g = synthetic(tmp_path)
    [*_, last] = sorted(store.folder.glob("shard-*"))
    last.unlink()
    with pytest.raises(ValueError, match="first that is missing"): Store(store.folder).influence(g, client=client)
