"""The package as others meet it: what it imports, what it ships, and that plain diffusers opens what it ships."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

from dmin.core.runtime import data_folder
from dmin.pipelines import PIPELINES
from dmin.training import training_record

ROOT = Path(__file__).parents[1]


def test_imports_no_development_tools():
    script = "import sys, dmin; print([m for m in ('nbdev', 'fastcore', 'pytest', 'IPython', 'hnswlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=600).stdout.strip() == "['hnswlib']"


def test_no_pickle_anywhere():
    for path in ROOT.glob("dmin/**/*.py"): assert not re.search(r"pickle|torch\.load\(|torch\.save\(", path.read_text()), path


def test_modules_import_only_those_above_them():
    """In the order of their notebooks' file names."""
    place = {}
    for path in sorted(ROOT.glob("nbs/[0-9]*.ipynb")):
        text = "".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"])
        place[re.search(r"#\| default_exp (\S+)", text)[1]] = len(place)
    for path in ROOT.glob("dmin/*.py"):
        if path.stem not in place: continue
        for used in re.findall(r"^from \.(\w+) import", path.read_text(), re.M): assert place[used] < place[path.stem], (path.name, used)


@pytest.mark.parametrize("folder, kind, most", [("ddpm-mnist", DDPMPipeline, 4e6), ("sd3", StableDiffusion3Pipeline, 12e6), ("sd", StableDiffusionPipeline, 12e6)])
def test_shipped_pipeline_opens_in_plain_diffusers(folder, kind, most):
    folder = data_folder() / "tiny" / folder
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= most
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind is StableDiffusion3Pipeline else {}
    pipe = kind.from_pretrained(str(folder), **absent)
    assert pipe.scheduler.config.num_train_timesteps == 1000
    if kind is not DDPMPipeline:
        image = pipe("a photo of a pink flower", num_inference_steps=2, **({"max_sequence_length": 1} if absent else {})).images[0]
        assert image.size == (64, 64) and np.asarray(image).std() > 1
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt")]


@pytest.mark.parametrize("name, most", [("sd3-lora", 1e6), ("sd-lora", 1e6), ("sd3-full", 12e6)])
def test_shipped_tuning_has_its_record(name, most):
    folder = data_folder() / "tiny" / name
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= most
    record = training_record(f"tiny-{name}")
    assert record["n_train"] == 974 and record["dataset"] == "mini" and round(record["epochs"]) == PIPELINES[f"tiny-{name}"].recipe.epochs


@pytest.mark.parametrize("name", ["mnist_5k.npz", "clipart_10.npz", "cards.parquet", "clipart.parquet", "creatures.parquet", "flowers.parquet", "renders.parquet", "toys.parquet"])
def test_data_is_there(name): assert (data_folder() / "mini" / name).stat().st_size > 10_000
