"""States of pipelines, stores and training that change results unless they are noticed."""
import os
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import make_pipeline, own_store, RECIPE
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from test_objective_states import adapted
from test_text_to_image import small

from dmin import (
    build_index,
    collect,
    load_mixture,
    load_pipeline,
    make_objective,
    open_store,
    sample_gradients,
    show_images,
    finetune)
from dmin.methods.similarity import RawPixels, SSIM
from dmin.methods.trak import trajectory
from dmin.core.compression import Compressor
from dmin.measures.lds import random_subsets
from dmin.core.files import storing
from dmin.core.gradients import Gradients
from dmin.lora import add_lora, save_lora
from dmin.pipelines import generate
from dmin.core.schedule import noise_schedule, training_settings
from dmin.core.shards import Manifest
from dmin.core.store import Store
from dmin.families.latent import train_tokenizer
from dmin.training import fit



@pytest.fixture(scope="module")
def mixture(): return load_mixture("mini", size=32).select(range(4))


@pytest.fixture(scope="module")
def tokenizer(mixture): return train_tokenizer(mixture["prompt"], 600)


@pytest.fixture
def store(pipe, digits, tmp_path, collected):
    return own_store(tmp_path / "store", pipe, digits.select(range(12)), collected)


# adapters

@pytest.mark.filterwarnings("ignore:.*numbers of the adapters")
def test_scale_and_use_of_a_text_encoders_adapter_are_in_the_fingerprint(tokenizer):
    pipe = small("sd", tokenizer, lora=True)
    adapted(pipe.text_encoder)
    prints = [make_objective(pipe).fingerprint()]
    for weights in ({"text_encoder": .1, "unet": 1.}, {"text_encoder": 1., "unet": .5}):
        pipe.set_adapters(["default"], [weights])
        prints.append(make_objective(pipe).fingerprint())
    pipe.set_adapters(["default"], [1.])
    assert make_objective(pipe).fingerprint() == prints[0] and len({*prints}) == 3
    pipe.text_encoder.disable_adapters()   # then the network's alone are in use, and count
    assert make_objective(pipe).fingerprint() not in prints


def test_adapters_out_of_use_are_noticed_with_patterns_too(tokenizer):
    pipe = small("sd", tokenizer, lora=True)
    whole = make_objective(pipe, parameters="*to_k.base*").fingerprint()
    for spoil, mend, word in (
        (pipe.disable_lora, pipe.enable_lora, "enable_lora"),
        (pipe.fuse_lora, pipe.unfuse_lora, "unfuse_lora"),
    ):
        spoil()
        assert make_objective(pipe, parameters="*to_k.base*").fingerprint() != whole
        with pytest.raises(ValueError, match=word): make_objective(pipe, parameters="*lora*")
        mend()
        make_objective(pipe, parameters="*lora*")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_saving_one_of_several_adapters_is_refused(tokenizer, tmp_path):
    pipe = small("sd", tokenizer, lora=True)
    adapted(pipe.unet, "second", ("to_k",))
    with pytest.raises(ValueError, match="default, second.*delete_adapters"):
        save_lora(pipe, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# schedules

@pytest.mark.parametrize("make, said", [
    (lambda: diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "timestep_type"), (lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=0.), "no noise levels"),
    (lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=-2.), "no noise levels"), (lambda: diffusers.DDPMScheduler(beta_end=float("nan")), "no noise levels"),
    (lambda: diffusers.DDPMScheduler(trained_betas=[.01] * 10), "1000 timesteps"), (lambda: diffusers.RePaintScheduler(), "prediction_type=None")])
def test_impossible_schedules(make, said):
    with pytest.raises(ValueError, match=said): noise_schedule(make())


def test_a_shift_that_was_set_for_sampling_is_not_the_trainings():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.)
    scheduler.set_shift(5.)
    assert training_settings(scheduler)["shift"] == 3.


# queries and arguments

def test_gradients_of_wrong_shapes(store):
    c, one = torch.randn(2, 2, 64), torch.ones(2, 2)
    for bad in (Gradients(c, torch.tensor([1., 2.]), one), Gradients(c[0], one[0], one[0])):
        with pytest.raises(ValueError, match=r"expected \(n, T, v\) and \(n, T\)"): store.influence(bad)
    assert torch.allclose(
        store.influence(Gradients(c.double(), one.double(), one)).values,
        store.influence(Gradients(c, one, one)).values)


def test_bare_errors_of_libraries(store, digits, pipe):
    query = generate(pipe, 1, steps=2, progress=False)
    for ask, said in (
        (
            lambda: sample_gradients(
                store.objective, digits.select([0]), torch.tensor([10.5]), Compressor(8)),
            "timesteps="),
        (lambda: collect(pipe, digits, "s", timesteps=[True]), "timesteps hold True"),
        (lambda: show_images([digits[0]["image"]], columns=0), "columns=0"),
        (lambda: make_objective(pipe, parameters=3), "parameters=3"),
        (lambda: build_index(store, M=2**64), "M="),
        (lambda: store.influence(query, region=(0, 0, "a", 4)), "numbers of pixels"),
        (lambda: trajectory(pipe, query, steps=2.5), "steps=2.5"),
        (lambda: trajectory(pipe, query, steps=0), "steps=0"),
        (lambda: random_subsets(10, 2.5), "subsets=2.5"),
        (lambda: random_subsets(10, 2, float("nan")), "share=nan"),
        (lambda: random_subsets(10, 2, seed=-1), "seed=-1"),
        (lambda: load_mixture("authors", source="/nope"), "not a folder"),
        (lambda: load_mixture("paper", source=3), "source=3"),
    ):
        with pytest.raises((ValueError, FileNotFoundError, TypeError), match=said): ask()


@pytest.mark.parametrize("device", ["cuda:99", "meta", "mps:7"])
def test_devices_that_are_not_there(device):
    with pytest.raises(ValueError, match=f"device='{device}' cannot compute here"):
        load_pipeline("ddpm-mnist", device)


# images

def test_images_that_are_not_decoded(pipe, digits, tmp_path):
    raw = digits.select(range(4)).cast_column("image", ImageFeature(decode=False))
    plain, again = (
        collect(pipe, rows, tmp_path / name, **RECIPE)
        for name, rows in (("a", digits.select(range(4))), ("b", raw)))
    assert torch.equal(plain.vectors(), again.vectors())


def test_broken_images_are_named_by_their_row(pipe, digits):
    columns = {
        "image": [
            {"bytes": b"no image", "path": None} if i == 2 else x
            for i, x in enumerate(digits.cast_column("image", ImageFeature(decode=False))["image"][:4])]}
    broken = Dataset.from_dict(columns, Features({"image": ImageFeature()}))
    for ask in (
        lambda: finetune(pipe, broken, steps=1, progress=False),
        lambda: RawPixels(broken),
        lambda: SSIM(broken, progress=False),
    ):
        with pytest.raises(ValueError, match="sample 2 cannot be read"): ask()


def test_a_wrong_image_late_in_the_data_keeps_its_number(pipe, digits):
    rows = [digits[0]["image"]] * 260 + [Image.new("L", (9, 9))]
    with pytest.raises(ValueError, match="sample 260 has 9×9"):
        finetune(pipe, [{"image": x} for x in rows], steps=1, progress=False)


# training

def test_a_checkpoint_of_other_parameters(tmp_path):
    def run(p):
        return fit(
            p,
            4,
            lambda rows: {"x": rows.float()},
            lambda b: sum(w.square().sum() for w in p.values()) + 0 * b["x"],
            steps=2,
            batch_size=2,
            lr=0.1,
            folder=tmp_path,
            settings={"s": (1, 2)},
            progress=False)
    run({"a": torch.nn.Parameter(torch.ones(3))})
    run({"a": torch.nn.Parameter(torch.ones(3))})   # goes on, with a tuple in its settings
    for other in (
        {"a": torch.nn.Parameter(torch.ones(2, 3))},
        {"b": torch.nn.Parameter(torch.ones(3))},
        {"a": torch.nn.Parameter(torch.ones(4))},
    ):
        with pytest.raises(ValueError, match="parameters was"): run(other)


def test_another_sampler_does_not_refuse_a_checkpoint(digits, tmp_path):
    settings, rows = (
        dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
        digits.select(range(8)).select_columns(["image"]))
    for kind in (diffusers.DDPMScheduler, diffusers.EulerDiscreteScheduler):
        log = finetune(
            make_pipeline(scheduler=lambda kind=kind: kind(**settings)),
            rows,
            steps=2,
            batch_size=4,
            folder=tmp_path,
            progress=False)
    assert log.steps == 2
    with pytest.raises(ValueError, match="model was"):
        finetune(
            make_pipeline(scheduler=lambda: diffusers.DDPMScheduler(beta_end=0.03)),
            rows,
            steps=2,
            batch_size=4,
            folder=tmp_path,
            progress=False)


def test_leftovers_of_a_killed_saving_are_removed(tokenizer, tmp_path):
    left, theirs = tmp_path / ".m.00112233aabbccdd.tmp", tmp_path / ".other.00112233aabbccdd.tmp"
    for folder in (left, theirs):
        folder.mkdir(), (folder / "half").write_bytes(b"half"), os.utime(folder, (0, 0))
    save_lora(add_lora(small("sd", tokenizer)), tmp_path / "m")
    assert not left.exists() and theirs.exists() and (tmp_path / "m").is_dir()


def test_a_missing_folder_is_not_a_full_disk():
    with pytest.raises(OSError) as e, storing(Path("x")):
        raise FileNotFoundError(2, "No such file or directory")
    assert "full" not in str(e.value) and "No such file" in str(e.value)


# stores

def test_duplicates_among_the_new_samples(store, digits):
    with pytest.warns(UserWarning, match="1 of 2 new samples, such as new sample 1"):
        store.add(digits.select([13, 13]), progress=False)
    assert len(store.add(digits.select([14, 14]), progress=False, duplicates="skip")) == 15


def test_discarding_while_another_process_adds(store, pipe, digits, monkeypatch):
    """Its shards go as well, and the store stays open for all."""
    adding = open_store(store.folder, pipe, digits.select(range(12)))
    write, hurried = Store.write, []
    def meanwhile(self, rows, *rest):
        if self is adding and len(hurried) == 1:
            other = Store(store.folder)
            write(self, rows, *rest)                 # a shard that `other` has not seen
            hurried.append(other), other.discard_missing()
            return
        hurried.append(rows), write(self, rows, *rest)
    monkeypatch.setattr(Store, "write", meanwhile)
    with pytest.raises(ValueError, match="has changed since this store was opened"):
        adding.add(digits.select(range(12, 24)), progress=False)
    monkeypatch.undo()
    again = Store(store.folder)
    again.check_complete()
    assert len(again) == 20   # the old ones, and the two shards that were whole


def test_another_recipe_does_not_take_the_place_of_a_first_shard(pipe, digits, tmp_path, monkeypatch):
    """That another process has written after one looked for it."""
    first = Store.create(
        tmp_path / "s", collect(pipe, digits.select(range(4)), tmp_path / "made", **RECIPE).manifest)
    made = Store(tmp_path / "made")
    restart = Store.restart
    def late(self, manifest):
        first.write(range(4), made.vectors() + 1, torch.ones(4, 2), torch.ones(4, 2))
        return restart(self, manifest)
    monkeypatch.setattr(Store, "restart", late)
    with pytest.raises(ValueError, match="another recipe"):
        collect(pipe, digits.select(range(4)), tmp_path / "s", **RECIPE | {"v": 32})
    assert Store(tmp_path / "s").missing() == []


def test_the_note_of_labels_follows_the_store(store, pipe, digits, tmp_path, monkeypatch, recwarn):
    """No false alarm: without the column, with another data set in a folder that had no sample, or after
    discarding.
    """
    open_store(store.folder, pipe, digits.select(range(12)).remove_columns("label"))
    Store.create(tmp_path / "empty", Manifest("x", "y", 10**4, [0], 16, sample_ids=["a"]))
    (tmp_path / "empty" / "columns.json").write_text(
        '{"samples": 1, "digests": {"label": "0123456789abcdef"}}')
    collect(pipe, digits.select(range(3)), tmp_path / "empty", **RECIPE)
    store.extend(["announced"])
    store.discard_missing()
    open_store(store.folder, pipe, digits.select(range(12)))
    assert not [w for w in recwarn if "label" in str(w.message)]
    (store.folder / "columns.json").write_text("[1]")
    with pytest.warns(UserWarning, match="columns.json.*only tells when labels have changed"):
        open_store(store.folder, pipe, digits.select(range(12)))


def test_columns_of_another_type(store, digits):
    wrong = digits.select([13]).add_column("more", ["x"])
    with pytest.raises(ValueError, match="label"):
        store.add(wrong.remove_columns("label").add_column("label", [[1.5]]), progress=False)
    assert len(store) == len(Store(store.folder)) == 12
