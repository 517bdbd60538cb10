"""Training and saving: bad numbers stop it before any work, damage and other runs are named, nothing is half
written.
"""
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import PYTHON
from safetensors.torch import save_file

import dmin.training
from dmin.reproduction.image_sets import load_images
from dmin.core.files import locked, read_tensors
from dmin.core.registry import make_objective
from dmin.pipelines import load_pipeline
from dmin.families.ddpm import tiny_ddpm
from dmin.training import (
    _encoder,
    _read_checkpoint,
    fit,
    save_trained,
    finetune,
    training_record,
    TrainingLog)

LOG = TrainingLog(np.ones(2), np.ones(2), batch_size=4, n_train=8, seed=0, seconds=1.)


@pytest.fixture(scope="module")
def few(): return load_images("mnist_5k", size=16).select(range(20))


def small(seed=0): return tiny_ddpm(channels=(16, 32), seed=seed)


def weights(pipe): return torch.cat([p.detach().flatten() for p in pipe.unet.parameters()])


def fit_line(**options):
    """Two numbers, fitted to a line in moments; returns them."""
    x = torch.linspace(-1, 1, 10)
    line = {"slope": torch.nn.Parameter(torch.zeros(())), "offset": torch.nn.Parameter(torch.zeros(()))}
    usual = dict(steps=4, batch_size=2, lr=.1, progress=False)
    fit(
        line,
        10,
        lambda rows: {"x": x[rows]},
        lambda b: (line["slope"] * b["x"] + line["offset"] - b["x"]) ** 2,
        **usual | options)
    return [p.item() for p in line.values()]


# --- numbers ---

NAN, INF = float("nan"), float("inf")
BAD = [
    *[
        dict([(name, x)])
        for name in ("steps", "batch_size", "accumulate", "save_every")
        for x in (0, -1, 2.5, "2", True)],
    dict(warmup=-1),
    dict(warmup=0.5),
    dict(lr=0),
    dict(lr=-1e-3),
    dict(lr=NAN),
    dict(lr=INF),
    dict(lr="1"),
    dict(weight_decay=-0.1),
    dict(weight_decay=NAN),
    dict(clip=-1),
    dict(clip=0),
    dict(clip=NAN),
    dict(clip=-INF),
    dict(ema=1),
    dict(ema=-0.1),
    dict(ema=NAN),
    dict(betas=(0.9,)),
    dict(betas=0.9),
    dict(betas=(0.9, 1.0)),
    dict(betas=(NAN, 0.9)),
    dict(seed=-1),
    dict(seed=0.5),
    dict(seed=2**63),
    dict(accumulate=3, batch_size=2)]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_numbers_that_make_no_sense(bad, few, tmp_path, monkeypatch):
    name, folder = next(iter(bad)), tmp_path / "run"
    with pytest.raises(ValueError, match=rf"{name}(\[\d\])?="): fit_line(folder=folder, **bad)
    monkeypatch.setattr(dmin.training, "_encoder", lambda *a, **k: pytest.fail("encoded before the check"))
    pipe = small()
    before = weights(pipe)
    with pytest.raises(ValueError, match=rf"{name}(\[\d\])?="):
        finetune(pipe, few, **dict(steps=1, batch_size=2, folder=folder, progress=False) | bad)
    assert not folder.exists() and torch.equal(weights(pipe), before)


@pytest.mark.parametrize("epochs", [0, -1, NAN, INF, "1"])
def test_epochs_that_make_no_sense(epochs, few):
    with pytest.raises(ValueError, match="epochs="): finetune(small(), few, epochs=epochs, progress=False)


def test_other_kinds_of_numbers():
    usual = dict(steps=4, batch_size=2, lr=.1, accumulate=2, warmup=1, save_every=2, seed=3)
    plain = fit_line(**usual)
    assert plain == fit_line(**{name: np.array(x)[()] for name, x in usual.items()})
    assert plain == fit_line(
        **{name: torch.tensor(x) for name, x in usual.items() if name != "lr"} | {"lr": 0.1})


def test_no_clipping(tmp_path):
    assert (
        fit_line(clip=INF, folder=tmp_path)
        == fit_line(clip=1e9)
        == fit_line(clip=INF, folder=tmp_path)
        != fit_line(clip=1e-3))


# --- checkpoints ---

def test_a_flipped_bit_is_found(tmp_path):
    fit_line(folder=tmp_path, save_every=2, seed=1)
    path = tmp_path / "checkpoint.safetensors"
    settings, good = read_tensors(path, "")[1]["settings"], path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    assert _read_checkpoint(path, settings)["seconds"].dtype == torch.float64
    for i in range(start, len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1:])
        with pytest.raises(
            ValueError, match=f"{re.escape(str(path))} is damaged.*delete it to train from the start"
        ):
            _read_checkpoint(path, settings)
    with pytest.raises(ValueError, match="delete it to train from the start"):
        fit_line(folder=tmp_path, seed=1)
    path.unlink()
    assert fit_line(folder=tmp_path, seed=1) == fit_line(seed=1)


def test_a_checkpoint_of_older_versions(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_file({"losses": torch.ones(2, dtype=torch.float64)}, path, {"settings": "{}", "seconds": "1.5"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no checksum.*delete it to train from the start"):
        fit_line(folder=tmp_path)
    assert path.read_bytes() == before


def test_seconds_go_on(tmp_path):
    def stop(step, loss):
        if step == 1:
            raise KeyboardInterrupt
        time.sleep(.2)
    with pytest.raises(KeyboardInterrupt): fit_line(folder=tmp_path, save_every=1, callback=stop)
    tensors, _ = read_tensors(tmp_path / "checkpoint.safetensors", "")
    assert tensors["seconds"] > .2
    fit_line(folder=tmp_path, save_every=1)
    assert read_tensors(tmp_path / "checkpoint.safetensors", "")[0]["seconds"] > tensors["seconds"]


def test_leftovers_go(tmp_path):
    old, new = (
        tmp_path / f".checkpoint.safetensors.{'0' * 16}.tmp",
        tmp_path / f".checkpoint.safetensors.{'1' * 16}.tmp")
    for path in (old, new, tmp_path / "checkpoint.part", tmp_path / "mine.tmp"): path.write_bytes(b"x")
    for path in (old, tmp_path / "checkpoint.part", tmp_path / "mine.tmp"): os.utime(path, (1e9, 1e9))
    fit_line(folder=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} - {".lock"} == {
        "checkpoint.safetensors",
        new.name,
        "mine.tmp"}


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    def full_from_then_on(step, loss):
        if step == 1: monkeypatch.setattr(os, "fsync", no_room)
    def no_room(descriptor): raise OSError(28, "No space left on device")
    with pytest.raises(
        OSError, match=r"could not write .*checkpoint\.safetensors.*No space left on device.*make room"
    ):
        fit_line(folder=tmp_path, save_every=2, callback=full_from_then_on)
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir()} - {".lock"} == {"checkpoint.safetensors"}
    assert len(read_tensors(tmp_path / "checkpoint.safetensors", "")[0]["losses"]) == 2
    assert fit_line(folder=tmp_path, save_every=2) == fit_line()


# --- one run a folder ---

def test_two_runs_in_one_folder(few, tmp_path, monkeypatch):
    monkeypatch.setattr(dmin.training, "_encoder", lambda *a, **k: pytest.fail("encoded before the check"))
    with locked(tmp_path, "training"):
        for run in (
            lambda: fit_line(folder=tmp_path),
            lambda: finetune(small(), few, steps=1, folder=tmp_path, progress=False),
        ):
            with pytest.raises(
                ValueError, match=f"another process is training in {tmp_path}: .*choose another folder"
            ):
                run()
        assert fit_line(folder=tmp_path / "other") == fit_line()
    assert not (tmp_path / "checkpoint.safetensors").exists()


CHILD = """
import sys, torch
from dmin.training import fit
p = {"x": torch.nn.Parameter(torch.zeros(()))}
def wait(step, loss):
    print("step", step, flush=True)
    sys.stdin.readline()
fit(p, 10, lambda rows: {"x": rows.float()}, lambda b: (p["x"] - b["x"]) ** 2, steps=2, batch_size=2, lr=.1, folder=sys.argv[1],
    progress=False, callback=wait)
"""


def test_two_processes_in_one_folder(tmp_path):
    """The second is refused at once; that of a killed process is free again."""
    child = subprocess.Popen(
        [PYTHON, "-c", CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "step 0\n"
        start = time.perf_counter()
        with pytest.raises(ValueError, match="another process is training"): fit_line(folder=tmp_path)
        assert time.perf_counter() - start < 10
        fit_line(folder=tmp_path / "other")
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.stdout.read()   # until it has ended
        child.wait()
        child.stdin.close(), child.stdout.close()
    assert fit_line(folder=tmp_path) == fit_line()


# --- samples ---

@pytest.fixture
def filed(few, tmp_path, monkeypatch):
    """Encodes into files of four samples, and counts how often."""
    objective, calls = make_objective(small()), []
    encode = objective.encode
    monkeypatch.setattr(
        objective,
        "encode",
        lambda samples, names=None: calls.append(len(samples["image"])) or encode(samples, names))
    monkeypatch.setattr(dmin.training, "_ENCODED", 4)
    def read():
        calls.clear()
        return _encoder(objective, few, tmp_path, room=0)[0](torch.arange(20))["z0"], sum(calls)
    return read


def test_damaged_encoded_files_are_made_anew(filed, tmp_path):
    z0, encoded = filed()
    assert encoded == 24   # the first part twice: for the digest, and for its file
    assert filed()[1] == 4
    first, second, third = sorted(tmp_path.rglob("*.safetensors"))[:3]
    content = second.read_bytes()
    second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    third.write_bytes(third.read_bytes()[:100])
    save_file({"z0": torch.zeros(4, 1, 16, 16)}, first)   # as older versions wrote it: no checksum
    again, encoded = filed()
    assert torch.equal(again, z0) and encoded == 4 + 12
    assert second.read_bytes() == content and filed()[1] == 4


def test_encoding_needs_no_gradients(few, monkeypatch):
    objective = make_objective(small())
    factor = torch.nn.Parameter(torch.ones(()))
    encode = objective.encode
    monkeypatch.setattr(
        objective, "encode", lambda samples, names=None: {"z0": encode(samples)["z0"] * factor})
    for room in (2**30, 0):
        assert not _encoder(objective, few, room=room)[0](torch.arange(3))["z0"].requires_grad


def test_formats_change_nothing(few):
    pipes = [small(), small()]
    for pipe, samples in zip(pipes, (few, few.with_format("numpy"))):
        finetune(pipe, samples, steps=2, batch_size=4, progress=False)
    assert torch.equal(*map(weights, pipes))


def test_transforms_are_refused(few):
    pipe = small()
    before = weights(pipe)
    with pytest.raises(ValueError, match="transform"):
        finetune(pipe, few.with_transform(lambda rows: rows), steps=1, batch_size=2, progress=False)
    assert torch.equal(weights(pipe), before)


# --- saving ---

def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("part", ["pipeline", "network"])
def test_a_failed_save_changes_nothing(part, tmp_path, monkeypatch):
    save_trained(small(), tmp_path / "saved", LOG, part=part)
    before, pipe = content(tmp_path / "saved"), small(seed=1)
    def full(*args, **options): raise OSError(28, "No space left on device")
    monkeypatch.setattr(type(pipe.scheduler), "save_pretrained", full)
    monkeypatch.setattr(dmin.training, "_forget_where", full)
    for name in ("saved", "new/folder"):
        with pytest.raises(OSError, match="could not write .*No space left on device.*make room"):
            save_trained(pipe, tmp_path / name, LOG, part=part)
    assert content(tmp_path / "saved") == before and content(tmp_path) == {
        f"saved/{name}": x for name, x in before.items()}
    monkeypatch.undo()
    save_trained(pipe, tmp_path / "saved", LOG, part=part)
    assert content(tmp_path / "saved").keys() == before.keys() and content(tmp_path / "saved") != before


FULL = """
import resource, signal, sys
import numpy as np
from dmin.families.ddpm import tiny_ddpm
from dmin.training import save_trained, TrainingLog
log = TrainingLog(np.ones(2), np.ones(2), batch_size=4, n_train=8, seed=0, seconds=1.)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try: save_trained(tiny_ddpm(channels=(16, 32), seed=1), sys.argv[1], log)
except OSError as e: print("OSError:", e)
"""


def test_no_room_for_a_file(tmp_path):
    """By the system's own error."""
    save_trained(small(), tmp_path / "saved", LOG)
    before = content(tmp_path)
    done = subprocess.run(
        [PYTHON, "-c", FULL, str(tmp_path / "saved")], capture_output=True, text=True, timeout=300)
    assert f"could not write {tmp_path / 'saved'}: " in done.stdout and "too large" in done.stdout, done
    assert content(tmp_path) == before


def test_what_cannot_be_recorded_changes_nothing(tmp_path):
    with pytest.raises(TypeError): save_trained(small(), tmp_path / "new", LOG, when=object())
    with pytest.raises(ValueError, match="part='unet': choose one of pipeline, adapters, network"):
        save_trained(small(), tmp_path / "new", LOG, part="unet")
    with pytest.raises(ValueError, match="no adapters to save"):
        save_trained(small(), tmp_path / "new", LOG, part="adapters")
    assert not list(tmp_path.iterdir())


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "notes.json").write_text('{"_name_or_path": "mine"}')
    save_trained(small(), tmp_path, LOG)
    assert (tmp_path / "notes.json").read_text() == '{"_name_or_path": "mine"}'
    assert torch.equal(weights(load_pipeline(tmp_path, "cpu")), weights(small()))


def test_changing_the_folder_moves_nothing(few, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir(), (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pipe, go = small(), lambda *a: os.chdir(tmp_path / "there")
    log = finetune(pipe, few, steps=2, batch_size=2, folder="run", save_every=1, callback=go, progress=False)
    os.chdir(tmp_path / "here")
    save = type(pipe).save_pretrained
    monkeypatch.setattr(type(pipe), "save_pretrained", lambda *a, **k: (save(*a, **k), go()))
    save_trained(pipe, "saved", log)
    assert not list((tmp_path / "there").iterdir())
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["run", "saved"]
    assert (tmp_path / "here" / "saved" / "training.json").is_file() and (
        tmp_path / "here" / "run" / "checkpoint.safetensors"
    ).is_file()


@pytest.mark.parametrize("folder", [3, ""])
def test_folders_that_are_none(folder, few):
    with pytest.raises(TypeError, match="a path is needed"): fit_line(folder=folder)
    with pytest.raises(TypeError, match="a path is needed"):
        finetune(small(), few, steps=1, folder=folder, progress=False)
    with pytest.raises(TypeError, match="a path is needed"): save_trained(small(), folder, LOG)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"epochs": "3", "mean_learning_rate": 1.0}'])
def test_a_damaged_record(text, tmp_path):
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(ValueError, match="training.json is damaged.*save_trained writes it anew"):
        training_record(tmp_path)


def test_text_in_a_log_is_no_html():
    log = TrainingLog(np.ones(2), np.ones(2), batch_size=4, n_train=8, seed=0, seconds=1.)
    log.n_train = type("Named", (int,), {"__format__": lambda self, how: "<script>"})(8)
    assert (
        "<script>" in repr(log)
        and "<script>" not in log._repr_html_()
        and "&lt;script&gt;" in log._repr_html_())
