"""The package as others meet it: what it imports, what it ships, and that plain diffusers opens what it
ships.
"""
import ast
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PYTHON
from diffusers import AutoencoderKL, DDPMPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

import dmin
from dmin import load_images, load_mixture, load_pipeline
from dmin.core.runtime import data_folder
from dmin.methods.similarity import clip_source
from dmin.pipelines import PIPELINES
from dmin.reproduction.results import shipped_results
from dmin.training import training_record

ROOT = Path(__file__).parents[1]


UNKNOWN = "import sys; [sys.modules.pop(x) for x in [*sys.modules] if x.split('.')[0] == 'dmin']; "


def run(script, *arguments, python=sys.executable):
    """What a script prints, and what it says on standard error, in a process of its own."""
    done = subprocess.run(
        [python, "-c", script, *arguments], capture_output=True, text=True, check=True, timeout=600)
    return done.stdout.strip(), done.stderr


def imports(path):
    """The names that a module imports from the package while nothing runs it: name -> module."""
    block = next(
        n
        for n in ast.parse(path.read_text()).body
        if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {name.name: n.module for n in block.body for name in n.names}


LOADED = "import sys; {}; print(*sorted({{m.split('.')[0] for m in sys.modules}} & set(sys.argv[1:])))"
HEAVY = (
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "matplotlib",
    "scipy",
    "hnswlib",
    "torch")
TOOLS = ("nbdev", "fastcore", "pytest", "IPython")


def test_imports_no_development_tools():
    everything = "import dmin; [getattr(dmin, name) for name in dmin.__all__]"
    assert run(LOADED.format(everything), *TOOLS)[0] == ""


def test_import_loads_nothing_heavy():
    assert run(LOADED.format("import dmin"), *HEAVY) == ("", "")


def test_every_name_is_there_when_asked_for():
    assert len(set(dmin.__all__)) == len(dmin.__all__) and {*dmin.__all__} <= {*dir(dmin)}
    for name in dmin.__all__:
        assert getattr(dmin, name).__name__ == name
        assert pickle.loads(pickle.dumps(getattr(dmin, name))) is getattr(dmin, name)


def test_type_checkers_see_the_same_names():
    assert imports(ROOT / "dmin" / "__init__.py") == dmin._PLACES and {*dmin._PLACES} == {*dmin.__all__}


@pytest.mark.parametrize("script, printed", [
    ("import dmin; print(dmin.collect.__module__, 'collect' in vars(dmin))", "dmin.core.store True"),
    ("from dmin import *; print(Store.__name__, load_pipeline.__module__)", "Store dmin.pipelines"),
    ("import dmin; print(hasattr(dmin, 'collects'), dmin.__version__ > '')", "False True"),
    ("from dmin import pipelines; print(pipelines.__name__)", "dmin.pipelines"),
])
def test_names_are_loaded_in_every_way(script, printed):
    """A fork may have libraries in memory, but nothing of dmin."""
    assert run(UNKNOWN + script, python=PYTHON) == (printed, "")


def test_a_clone_beside_the_script_is_not_the_package(tmp_path):
    """Whose folder is called as the package is."""
    (tmp_path / "dmin" / "nbs").mkdir(parents=True)
    script = "import dmin; print(dmin.collect.__name__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.stdout.strip(), done.stderr) == ("collect", "")


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="module 'dmin' has no attribute 'colect'"): dmin.colect
    with pytest.raises(ImportError, match="colect"): from dmin import colect   # noqa: F401


@pytest.mark.parametrize("script", [
    "import dmin; dmin.load_pipeline('tiny-sd-lora'); from diffusers import StableDiffusion3Pipeline",
    "import diffusers; from dmin import load_pipeline; load_pipeline('ddpm-mnist'); load_pipeline('tiny-sd3-lora')",
])
def test_nothing_on_standard_error(script): assert run(script) == ("", "")


def test_no_pickle_anywhere():
    for path in ROOT.glob("dmin/**/*.py"):
        assert not re.search(r"pickle|torch\.load\(|torch\.save\(", path.read_text()), path


WINGS = "core", "families", "", "methods", "measures", "reproduction"   # "": nbs/00_lora and what follows it


def modules_in_order():
    """The modules, as `core.store`, in the order of their notebooks: wing by wing, by file name."""
    found = []
    for wing in WINGS:
        for path in sorted((ROOT / "nbs" / wing).glob("[0-9]*.ipynb")):
            text = "".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"])
            found.append(re.search(r"#\| default_exp ([\w.]+)", text)[1])
    return found


def used_modules(module):
    """What a module of the package imports from it, at its top or within a function."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse((ROOT / "dmin" / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found = ".".join([*package[:len(package) - node.level + 1], *(node.module or "").split(".")])
            if found not in ("", "_modidx"): yield found   # the version and the address: from settings.ini
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dmin."):
            yield node.module.removeprefix("dmin.")


def test_modules_import_only_those_above_them():
    """No circle, no import upwards, nothing of the reproduction in the library: imports within functions
    count, too.
    """
    modules = modules_in_order()
    assert len(set(modules)) == len(modules) > 40
    for place, module in enumerate(modules):
        for used in used_modules(module): assert used in modules[:place], f"{module} imports {used}"


def test_every_module_has_its_notebook():
    there = {
        ".".join(p.relative_to(ROOT / "dmin").with_suffix("").parts)
        for p in ROOT.glob("dmin/**/*.py")
        if p.name[0] != "_"}
    assert there == set(modules_in_order())


@pytest.mark.parametrize("folder, kind, most", [("ddpm-mnist", DDPMPipeline, 4e6), ("sd3", StableDiffusion3Pipeline, 12e6), ("sd", StableDiffusionPipeline, 12e6)])
def test_shipped_pipeline_opens_in_plain_diffusers(folder, kind, most):
    folder = data_folder() / "tiny" / folder
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= most
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind is StableDiffusion3Pipeline else {}
    shared = (
        {"vae": AutoencoderKL.from_pretrained(folder.parent / "sd3/vae")}
        if kind is StableDiffusionPipeline
        else {})
    pipe = kind.from_pretrained(str(folder), **absent, **shared)
    assert pipe.scheduler.config.num_train_timesteps == 1000
    if kind is not DDPMPipeline:
        image = pipe(
            "a photo of a pink flower",
            num_inference_steps=2,
            **({"max_sequence_length": 1} if absent else {}),
        ).images[0]
        assert image.size == (64, 64) and np.asarray(image).std() > 1
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt")]


@pytest.mark.parametrize("name, most", [("sd3-lora", 1e6), ("sd-lora", 1e6), ("sd3-full", 12e6)])
def test_shipped_tuning_has_its_record(name, most):
    folder = data_folder() / "tiny" / name
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= most
    record = training_record(f"tiny-{name}")
    assert (
        record["n_train"] == 974
        and record["dataset"] == "mini"
        and round(record["epochs"]) == PIPELINES[f"tiny-{name}"].recipe.epochs)


@pytest.mark.parametrize("name", ["mnist_5k.npz", "clipart_10.npz", "cards.parquet", "clipart.parquet", "creatures.parquet", "flowers.parquet", "renders.parquet", "toys.parquet"])
def test_data_is_there(name): assert (data_folder() / "mini" / name).stat().st_size > 10_000


@pytest.mark.parametrize("part, ask", [
    ("mini/flowers.parquet", load_mixture), ("mini/mnist_5k.npz", lambda: load_images("mnist_5k")),
    ("tiny/clip", lambda: clip_source(None)), ("tiny/sd3", lambda: load_pipeline("tiny-sd3-lora")),
    ("tiny/sd3-lora", lambda: training_record("tiny-sd3-lora")), ("../results", shipped_results)])
def test_a_part_of_the_data_that_is_missing(part, ask, tmp_path, monkeypatch):
    for folder in ("mini", "tiny", "published", "benchmarks"): (tmp_path / "data" / folder).mkdir(parents=True)
    monkeypatch.setenv("DMIN_DATA", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match=f"no {part}: set the variable DMIN_DATA"): ask()


def test_no_shipped_configuration_names_a_folder():
    """diffusers and transformers note where a part was read from, on the machine that made it."""
    configurations = list((ROOT / "data").rglob("*.json"))
    named = [path for path in configurations if "_name_or_path" in path.read_text()]
    assert len(configurations) > 20 and named == []
