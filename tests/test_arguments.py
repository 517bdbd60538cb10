"""Arguments: what is wrong is refused by name before anything is computed or made; what is right in another
type is taken.
"""
import math

import numpy as np
import pytest
import torch
from conftest import make_pipeline

from dmin import build_index, collect, make_objective, open_store, sample_gradients, select_timesteps
from dmin.methods.first_order import Gradient, mean_gradients, TracInCP
from dmin.methods.kfac import KFAC, StoreKFAC
from dmin.methods.trak import Kernel, TRAK
from dmin.methods.whitened import WhitenedDMin
from dmin.core.checks import finite, whole
from dmin.core.compression import Compressor, make_compressor, ReferenceCompressor
from dmin.methods.dmin import DMin
from dmin.core.store import Store

RECIPE = dict(v=64, timesteps=2, shard_size=4, progress=False)
BAD_WEIGHTS = [[1.], [[1.], [2.]], [math.nan, 1.], [math.inf, 1.], [0., 0.], "ab", 1.]


@pytest.fixture(scope="module")
def store(digits, tmp_path_factory):
    return collect(
        make_pipeline(), digits.select(range(8)), tmp_path_factory.mktemp("arguments") / "s", **RECIPE)


@pytest.fixture(scope="module")
def index(store): return build_index(store, progress=False)


@pytest.mark.parametrize("weights", BAD_WEIGHTS, ids=str)
def test_weights(store, index, digits, weights):
    """One finite number a timestep, not all zero, wherever weights are taken."""
    query = digits.select([0])
    asks = [
        lambda: store.influence(query, weights=weights),
        lambda: store.influence(query).reweight(weights),
        lambda: index.search(query, 3, weights=weights),
        lambda: DMin(store, weights=weights).scores(query),
        lambda: mean_gradients(store, weights),
        lambda: Gradient(store, weights=weights),
        lambda: WhitenedDMin(store, 0.1, weights),
        lambda: TRAK(store, 0.1, weights=weights)]
    for ask in asks:
        with pytest.raises(ValueError, match="weights"): ask()


def test_weights_of_the_index_are_those_of_the_scores(store, index, digits):
    query, weights = digits.select([5]), np.array([2, -1])
    exact = store.influence(query, weights=weights).top(8)
    found = index.search(query, 8, ef=8, rerank=8, weights=torch.tensor(weights))
    assert torch.equal(found.rows, exact.rows) and torch.allclose(found.scores, exact.scores, atol=1e-5)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1, 0, "1", None])
def test_scale(store, digits, scale):
    with pytest.raises(ValueError, match="scale="): store.influence(digits.select([0]), scale=scale)


@pytest.mark.parametrize("value", [0, -1, "8", 2.5, None, True])
def test_whole_numbers_of_queries(store, index, digits, value):
    """Also where a cached answer would hide them."""
    query = digits.select([1])
    store.influence(query)
    for ask in (
        lambda: store.gradients(query, batch_size=value),
        lambda: store.influence(query, batch_size=value),
        lambda: index.search(query, k=value),
        lambda: index.recall(query, k=value),
        lambda: store.search(query, value),
        lambda: store.search(query, batch_size=value),
        lambda: store.influence(query).top(value),
        lambda: store.add(query, batch_size=value),
        lambda: build_index(store, ef_construction=value),
        lambda: build_index(store, M=value),
        lambda: sample_gradients(store.objective, query, torch.tensor([0]), Compressor(8), batch_size=value),
        lambda: sample_gradients(store.objective, query, torch.tensor([0]), Compressor(8), noises=value),
    ):
        with pytest.raises(ValueError, match="whole number"): ask()
    if value is not None:   # which leaves the choice to the index
        for ask in (index.search, index.recall):
            with pytest.raises(ValueError, match="whole number"): ask(query, 3, ef=value)
    assert len(store) == 8


@pytest.mark.parametrize("bad, said", [
    (dict(batch_size="8"), "batch_size='8'"), (dict(noises=1.5), "noises=1.5"), (dict(seed=-1), "seed=-1"), (dict(seed=2**64), "seed=18446744073709551616"), (dict(seed=2**63), "choose 0 to"),
    (dict(seed="0"), "seed='0'"), (dict(v=2.5), "v=2.5"), (dict(v="64"), "v='64'"), (dict(v=True), "v=True"), (dict(timesteps=2.5), "timesteps=2.5"), (dict(timesteps=None), "timesteps=None"),
    (dict(timesteps=True), "timesteps=True"), (dict(timesteps=[1.5]), "timesteps hold 1.5"), (dict(timesteps=["a"]), "timesteps hold 'a'"), (dict(timesteps=[[1, 2]]), "timesteps hold"),
    (dict(timesteps={3}), "in a list"), (dict(timesteps=torch.tensor([[1], [2]])), "timesteps hold"), (dict(dtype=torch.float16), "dtype=torch.float16"), (dict(dtype=None), "dtype=None"),
    (dict(shard_size=2.5), "shard_size=2.5"), (dict(parameters=[1]), "1 is no pattern"), (dict(spacing=3), "spacing")])
def test_arguments_of_collect(digits, tmp_path, bad, said):
    with pytest.raises(ValueError, match=said):
        collect(make_pipeline(), digits.select(range(2)), tmp_path / "s", **{**RECIPE, **bad})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("folder", [None, 3, ["s"], ""])
def test_folders(digits, folder):
    for ask in (
        lambda: open_store(folder),
        lambda: Store(folder),
        lambda: collect(make_pipeline(), digits.select(range(2)), folder, **RECIPE),
    ):
        with pytest.raises(TypeError, match="folder=.*a path is needed"): ask()


def test_numbers_of_other_libraries(digits, tmp_path):
    """NumPy's and PyTorch's whole numbers are whole numbers, and what is stored is the same."""
    rows, plain = (
        digits.select(range(4)),
        dict(v=64, timesteps=3, seed=3, noises=2, batch_size=8, shard_size=2, progress=False))
    store = collect(make_pipeline(), rows, tmp_path / "a", **plain)
    other = dict(
        v=np.int64(64),
        timesteps=torch.tensor(3),
        seed=np.uint8(3),
        noises=torch.tensor(2),
        batch_size=np.int32(8),
        shard_size=np.int64(2),
        progress=False)
    again = collect(make_pipeline(), rows, tmp_path / "b", **other)
    assert torch.equal(store.vectors(), again.vectors()) and store.manifest == again.manifest
    for timesteps in (
        np.array([0, 333, 666]),
        torch.tensor([0, 333, 666]),
        (0, 333, 666),
        range(0, 999, 333),
        np.int64(3),
    ):
        collect(make_pipeline(), rows, tmp_path / "a", **plain | {"timesteps": timesteps})
    assert store.influence(rows.select([0])).top(np.int64(2)).rows.shape == (1, 2)
    assert select_timesteps(make_pipeline().scheduler, np.int64(3)).tolist() == [0, 333, 666]


def test_compressors(store):
    for make in (
        Compressor,
        lambda v, seed=0: ReferenceCompressor(1000, v, seed),
        lambda v, seed=0: make_compressor(1000, v, seed),
    ):
        for v in (0, -3, 2.5, "8", True):
            with pytest.raises(ValueError, match="v=.*positive whole number"): make(v)
    for seed in (-1, 2**63, 1.5, None):
        with pytest.raises(ValueError, match="seed="): Compressor(8, seed)
    x = torch.randn(2, 100)
    assert torch.equal(Compressor(np.int64(8), torch.tensor(2))(x), Compressor(8, 2)(x))


@pytest.mark.parametrize("damping", [0, -1, math.nan, math.inf, "1"])
def test_dampings(store, damping):
    for ask in (
        lambda: Kernel(torch.randn(3, 4)).scores(torch.randn(1, 4), damping),
        lambda: KFAC(store.objective, store.samples, damping),
        lambda: StoreKFAC(store, damping),
    ):
        with pytest.raises(ValueError, match="damping="): ask()


def test_learning_rates(store):
    for bad in ([math.nan], [-1], ["a"]):
        with pytest.raises(ValueError, match="learning_rates"): TracInCP([store], bad)


@pytest.mark.parametrize("options, said", [(dict(size=0), "size"), (dict(latent_seed=-1), "latent_seed=-1"), (dict(max_sequence_length=0), "max_sequence_length=0"), (dict(latents="mode"), "mean, draw"),
                                           (dict(output="mean"), "output='mean'"), (dict(parameters=[1]), "no pattern")])
def test_options_of_text_to_image(options, said):
    from test_text_to_image import small

    from dmin.families.latent import train_tokenizer
    pipe = small("sd3", train_tokenizer(["a rose", "a card"], 520))
    with pytest.raises(ValueError, match=said): make_objective(pipe, **options)


def test_what_is_no_number():
    for bad in (None, "3", 2.0, np.float32(3), torch.tensor(2.), torch.tensor([1, 2]), np.True_, [3]):
        with pytest.raises(ValueError, match="n="): whole("n", bad)
    for bad in (None, "3", math.nan, [1.], torch.tensor([1., 2.])):
        with pytest.raises(ValueError, match="x="): finite("x", bad)
