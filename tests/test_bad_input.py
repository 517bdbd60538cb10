"""Bad input gets an error that names the value, what was expected and the way out; nothing that was stored is
lost.
"""
import numpy as np
import pytest
import torch
from conftest import make_pipeline, own_store, RECIPE
from datasets import Dataset
from PIL import Image

from dmin import (
    collect, load_images, load_pipeline, make_objective, open_index, open_store, sample_gradients, select_timesteps)
from dmin.core.compression import Compressor
from dmin.core.gradients import Gradients
from dmin.core.store import Store



@pytest.fixture
def store(pipe, digits, tmp_path, collected): return own_store(tmp_path / "store", pipe, digits, collected)


@pytest.mark.parametrize("v, said", [(0, "v=0.*positive"), (-1, "v=-1.*positive"), ("big", "positive"), (10**8, "v=100000000 is larger than the gradient")])
def test_v(pipe, digits, tmp_path, v, said):
    with pytest.raises(ValueError, match=said): collect(pipe, digits, tmp_path / "s", **{**RECIPE, "v": v})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("empty", [[], Dataset.from_dict({"image": []})])
def test_no_samples(pipe, tmp_path, empty):
    with pytest.raises(ValueError, match="empty"): collect(pipe, empty, tmp_path / "s", **RECIPE)


def test_missing_column(pipe, tmp_path):
    with pytest.raises(ValueError, match="no column 'image'.*picture"):
        collect(pipe, Dataset.from_dict({"picture": [1]}), tmp_path / "s", **RECIPE)


@pytest.mark.parametrize("image, said", [
    (Image.new("L", (28, 28)), "28×28.*expected 8×8.*size=8"), (Image.new("RGB", (8, 8)), "RGB.*expected 1 channel"), (Image.new("I;16", (8, 8)), "uint16|int32")])
def test_images_that_do_not_fit(store, digits, image, said):
    with pytest.raises(ValueError, match=said): store.influence(image)
    with pytest.raises(ValueError, match=said):
        collect(make_pipeline(), [*digits["image"][:3], image], store.folder.parent / "other", **RECIPE)


@pytest.mark.parametrize("array, said", [(np.full((8, 8), 255.), "255.*expected floats in"), (np.full((8, 8), -1.), "-1"), (np.full((8, 8), np.nan), "NaN")])
def test_value_ranges(array, said):
    from dmin.core.images import images_to_tensor
    with pytest.raises(ValueError, match=said): images_to_tensor([np.zeros((8, 8)), array], 8, 1)


def test_infinite_loss_names_sample_and_timestep_and_keeps_what_was_stored(pipe, digits, tmp_path):
    """The loss of one sample becomes infinite on the way."""
    objective = make_objective(pipe)
    loss, objective.calls = objective.loss, 0
    def breaks(encoded, t, eps):
        found = loss(encoded, t, eps)
        objective.calls += 1
        return torch.where(torch.arange(len(t)) == 5, float("nan"), found) if objective.calls == 4 else found
    objective.loss = breaks
    with pytest.raises(FloatingPointError, match="loss of sample 10 at timestep 500 is nan"):
        collect(objective, digits, tmp_path / "s", **RECIPE)
    assert Store(tmp_path / "s").missing() == list(range(8, 40))
    objective.loss = loss
    assert collect(objective, digits, tmp_path / "s", **RECIPE).missing() == []


def test_infinite_and_zero_gradients(digits):
    pipe = make_pipeline()
    with torch.no_grad(): pipe.unet.conv_out.weight.fill_(1e30)
    with pytest.raises(FloatingPointError, match="sample 0 at timestep 0"):
        sample_gradients(make_objective(pipe), digits.select([0]), torch.tensor([0]), Compressor(8))
    pipe = make_pipeline()
    with torch.no_grad(): pipe.unet.conv_out.weight.zero_()
    with pytest.raises(FloatingPointError, match="gradient of sample 0 at timestep 0 is 0.*direction"):
        sample_gradients(
            make_objective(pipe, "conv_in*"), digits.select([0]), torch.tensor([0]), Compressor(8))


@pytest.mark.parametrize("timesteps", [[0, 1000], [-1], [10**6]])
def test_timesteps_outside_the_scheduler(pipe, digits, tmp_path, timesteps):
    with pytest.raises(ValueError, match="outside the scheduler: it has 0 to 999"):
        collect(pipe, digits, tmp_path / "s", **{**RECIPE, "timesteps": timesteps})


@pytest.mark.parametrize("n", [0, 1001])
def test_number_of_timesteps(pipe, n):
    with pytest.raises(ValueError, match="choose 1 to 1000"): select_timesteps(pipe.scheduler, n)


def test_no_timesteps(pipe, digits, tmp_path):
    with pytest.raises(ValueError, match="no timesteps"):
        collect(pipe, digits, tmp_path / "s", **{**RECIPE, "timesteps": []})


@pytest.mark.parametrize("k", [0, -1, 41])
def test_k(store, digits, k):
    scores = store.influence(digits.select([0]))
    for f in (scores.top, scores.bottom):
        with pytest.raises(ValueError, match=f"k={k}.*choose 1 to 40"): f(k)


def test_queries_of_another_v(store, digits):
    g = store.gradients(digits.select([0]))
    with pytest.raises(ValueError, match="2 timesteps × 32, the store of 2 × 64"):
        store.influence(Gradients(g.compressed[..., :32], g.norms, g.losses))


def test_store_without_its_pipeline(store, digits):
    with pytest.raises(ValueError, match="open_store"): Store(store.folder).influence(digits.select([0]))


def test_unfinished_store(store, digits):
    g = store.gradients(digits.select([0]))
    (store.folder / "shard-00000004.safetensors").unlink()
    with pytest.raises(ValueError, match="36 of 40 samples.*collect again"): Store(store.folder).influence(g)


def test_unsupported_pipeline(digits, tmp_path):
    with pytest.raises(TypeError, match="DDPMPipeline.*register_family"):
        collect(object(), digits, tmp_path / "s")


def test_no_index(store):
    with pytest.raises(FileNotFoundError, match="build_index"): open_index(store)


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="mnist_5k"): load_images("mnist6")
    with pytest.raises(ValueError, match="train"): load_images("mnist_5k", "validation")


def test_a_folder_with_something_else(pipe, digits, tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(FileExistsError, match="not empty"): collect(pipe, digits, tmp_path, **RECIPE)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("bad, said", [
    (dict(noises=0), "noises=0"), (dict(batch_size=0), "batch_size=0"), (dict(timesteps="10"), "timesteps='10'"), (dict(timesteps=[.5]), "whole numbers"),
    (dict(timesteps=[3, 3]), "hold one twice"), (dict(seed=1.5), "seed=1.5"), (dict(shard_size=0), "shard_size=0"), (dict(dtype="float8"), "float16"),
    (dict(spacing="cubic"), "uniform"), (dict(parameters=[]), "empty list")])
def test_arguments_of_collect(pipe, digits, tmp_path, bad, said):
    with pytest.raises(ValueError, match=said): collect(pipe, digits, tmp_path / "s", **{**RECIPE, **bad})
    assert not (tmp_path / "s").exists()


def test_a_bad_image_late_in_the_data_is_found_first(pipe, digits, tmp_path):
    images = [*digits["image"], Image.new("L", (9, 8))]
    with pytest.raises(ValueError, match="sample 40 has 8×9"): collect(pipe, images, tmp_path / "s", **RECIPE)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("mode", ["P", "YCbCr", "LAB"])
def test_modes_that_only_look_right(store, mode):
    with pytest.raises(ValueError, match=f"mode {mode}"):
        store.influence(
            Image.new("RGB", (8, 8), (200, 30, 30)).convert("P") if mode == "P" else Image.new(mode, (8, 8)))


def test_a_row_without_an_image(pipe, digits, tmp_path):
    with pytest.raises(ValueError, match="no image"):
        collect(pipe, [{"image": digits[0]["image"]}, {"image": None}], tmp_path / "s", **RECIPE)


def test_bad_new_samples_leave_the_store_as_it_was(store, digits):
    before = store.vectors()
    with pytest.raises(ValueError, match="28×28"):
        store.add([{"image": Image.new("L", (28, 28)), "label": 3}], progress=False)
    assert len(store) == len(Store(store.folder)) == 40 and torch.equal(store.vectors(), before)
    with pytest.warns(UserWarning, match="in the store already"):
        assert len(store.add(digits.select([0]), progress=False)) == 41


def test_queries_of_another_recipe(store, pipe, digits, tmp_path):
    other = collect(pipe, digits, tmp_path / "other", **RECIPE, seed=1)
    with pytest.raises(ValueError, match="recipe of another store"):
        store.influence(other.gradients(digits.select([0])))
    g = store.gradients(digits.select([0]))
    with pytest.raises(ValueError, match="not finite"):
        store.influence(g._replace(compressed=g.compressed * float("nan")))


def test_index_refuses_what_does_not_fit(store, digits):
    from dmin import build_index
    g = store.gradients(digits.select([0]))
    for bad in (dict(M=0), dict(M=1), dict(ef_construction=0)):
        with pytest.raises(ValueError, match="(M|ef_construction)=.*whole number"):
            build_index(store, progress=False, **bad)
    index = build_index(store, progress=False)
    for f in (index.search, index.recall):
        with pytest.raises(ValueError, match="timesteps × 32"):
            f(g._replace(compressed=g.compressed[..., :32]), 3)
    next(store.folder.glob("index-*.hnsw")).write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged.*build_index"): open_index(store)
    store.add([{"image": Image.new("L", (8, 8), 77), "label": 3}], progress=False)
    with pytest.raises(ValueError, match="grown to 41"): index.search(g, 3)


def test_another_networks_configuration_is_another_model(digits, tmp_path):
    """Equal weights, other attention heads."""
    a, b = make_pipeline(), make_pipeline(attention_head_dim=4)
    b.unet.load_state_dict(a.unet.state_dict())
    assert make_objective(a).fingerprint() != make_objective(b).fingerprint()


def test_a_name_instead_of_a_pipeline(digits, tmp_path):
    with pytest.raises(TypeError, match=r"load_pipeline\('ddpm-mnist'\)"):
        collect("ddpm-mnist", digits, tmp_path / "s")


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no store in .*nostore: collect\(pipe, samples, folder\)"):
        open_store(tmp_path / "nostore")
    with pytest.raises(FileNotFoundError, match="there is no folder .*my-sd"): load_pipeline(str(tmp_path / "my-sd"))
    with pytest.raises(OSError, match="my-sd: there is no such folder"): load_pipeline("./my-sd")
    with pytest.raises(OSError, match="models/my-sd is no folder here, and cannot be fetched"):
        load_pipeline("models/my-sd")
