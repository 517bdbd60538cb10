"""Rehearses the paper preset: runs nbs/paper through its code, against a stand-in for the Hugging Face Hub.

python tools/rehearse.py                      # all notebooks
python tools/rehearse.py table_2 figure_1     # some
python tools/rehearse.py --again              # also those that are done

The preset's names stay as they are: pipelines, data sets and models are fetched by the Hub's real clients,
from tools/hub_stand_in.py, and tuned and judged as ever. Its numbers become small, as `SMALLER` says. So what
is measured means nothing; that everything ran does. Nothing is asked of the network or of the user's caches.

Everything goes to out/rehearsal: repositories to hub, what was fetched to home, executed notebooks and
summary.md to paper/paper. A run that was stopped goes on where it was, unless the stand-in or the sizes have
changed since.
"""
import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "rehearsal"

# What is smaller than in the paper preset, and why. Numbers that are not here are the smoke preset's.
SMALLER = {
    "fields": {   # of the preset: as many sizes as the paper has, and enough samples for its ranks
        "n_train": 128,
        "table_5_train": 128,
        "mixture_train": 128,
        "bench_n": 128,   # no more than there are, so that the store stays as it is, as the paper's does
        "n_queries": 8,
        "detection_k": (5, 10, 50, 100),
        "top": 25,
        "table_2_prompts": 2,   # a subset: from two on there are intervals
        "mixture_timesteps": (2, 2, 1),
        "mixture_v": (2**8, 2**10, 2**12),
        "sampler_steps": None,   # the families' own
        "guidance_scale": 7.,
        "hnsw_grid": dict(
            M=(4, 8, 16, 32, 48), ef_construction=(50, 100, 200, 300, 400, 500), ef=(200, 1000)),
        "halves": 6,
        "other_halves": 4,
        "lds_timesteps": 10,   # a tenth, a fifth and a half of them are whole numbers
        "counterfactuals": 3,
        "removed": (1, 5, 10)},   # the paper's shares, 2, 10 and 20 % of the samples
    # the recipe of the model that is trained again and again, on CIFAR-2
    "recipe": dict(samples=50, queries=6, size=16, channels=(16, 16, 16, 16), layers=1, steps=6, batch_size=8,
                   sampler_steps=2, timesteps=4),
    "drawn": {"train": 120, "test": 40},   # images of CIFAR-2: a tenth of the stand-in's are of either class
    "pixels": 64,   # height and width, of the mixture and of pipelines from the Hub
    "epochs": 2,    # in which those are tuned
}


def is_name(value) -> bool:
    """Whether a preset's value says what, not how much."""
    return isinstance(value, str) or isinstance(value, tuple) and all(isinstance(x, str) for x in value)


def smaller_preset() -> dict:
    """The paper preset with small numbers."""
    from dmin.reproduction.presets import PRESETS

    paper, smoke = PRESETS["paper"], PRESETS["smoke"]
    found = {field: x if is_name(x) else smoke[field] for field, x in paper.items()} | SMALLER["fields"]
    return found | {"recipes": {name: x | SMALLER["recipe"] for name, x in paper["recipes"].items()}}


def make_smaller() -> None:
    """Changes the sizes in this process, before a notebook's first cell."""
    from dmin.pipelines import PIPELINES
    from dmin.reproduction.image_sets import IMAGE_SETS
    from dmin.reproduction.mixture import PIXELS
    from dmin.reproduction.presets import PRESETS

    PRESETS["paper"] = smaller_preset()
    PIXELS["paper"] = SMALLER["pixels"]
    IMAGE_SETS["cifar2"] = replace(IMAGE_SETS["cifar2"], n=tuple(SMALLER["drawn"].items()))
    for name, source in PIPELINES.items():
        if not (source.hub and source.recipe): continue
        recipe = replace(source.recipe, size=SMALLER["pixels"], epochs=SMALLER["epochs"])
        PIPELINES[name] = replace(source, recipe=recipe)


# each kernel begins with it; one that fails here would go on in the paper's sizes, so it ends
STARTUP = """\
import os, runpy, traceback
try: runpy.run_path({path!r})["make_smaller"]()
except BaseException:
    traceback.print_exc()
    os._exit(1)
del os, runpy, traceback
"""


def begin(out: Path) -> None:
    """An empty folder, unless what is there was made by this very code."""
    tools = [Path(__file__).resolve().with_name(name) for name in ("rehearse.py", "hub_stand_in.py")]
    made_by = hashlib.sha256(b"".join(path.read_bytes() for path in tools)).hexdigest()
    note = out / "made_by.txt"
    if note.exists() and note.read_text() == made_by: return
    if out.exists(): shutil.rmtree(out)
    startup = out / "ipython" / "profile_default" / "startup" / "00-smaller.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(STARTUP.format(path=str(Path(__file__).resolve())))
    note.write_text(made_by)


def environment(out: Path, address: str) -> dict[str, str]:
    """This process's, but for whatever leads to another Hub or to what was fetched from it."""
    clients = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DIFFUSERS_")
    kept = {name: x for name, x in os.environ.items() if not name.startswith(clients)}
    for name in ("NO_PROXY", "no_proxy"): kept[name] = ",".join(filter(None, (kept.get(name), "127.0.0.1")))
    return kept | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(out / "home"),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",   # which datasets reports elsewhere
        "DMIN_PRESET": "paper",
        "DMIN_OUT": str(out),
        "IPYTHONDIR": str(out / "ipython"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))}


def run(options: list[str], out: Path) -> int:
    """Runs the notebooks one after another, as a machine with a GPU does; tools/run_paper.py's exit status."""
    from hub_stand_in import make_repositories, serving

    make_repositories(out / "hub")
    command = [sys.executable, str(ROOT / "tools" / "run_paper.py"), "--lanes", "1", *options]
    if hasattr(os, "fork"): command = [sys.executable, str(ROOT / "tools" / "forked.py"), *command]
    with serving(out / "hub") as address:
        return subprocess.run(command, env=environment(out, address)).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of notebooks, without .ipynb; all by default")
    parser.add_argument("--again", action="store_true", help="also run what is done")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from dmin.reproduction.claims import paper_notebooks

    names = paper_notebooks()
    wanted = args.names or names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"there is no notebook {unknown[0]!r} in nbs/paper; there are {', '.join(names)}")
    begin(OUT)
    status = run([*args.names, *["--again"] * args.again], OUT)
    record = OUT / "paper" / "paper" / "done.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    ran = [name for name in wanted if done.get(name, {}).get("ok")]
    print(f"\nRehearsal: {len(ran)} of {len(wanted)} notebooks ran in the code of the paper preset.")
    print("Its models and data were stand-ins, tiny and random: the numbers and verdicts above mean nothing.")
    if len(ran) < len(wanted): print("These did not:", ", ".join(name for name in wanted if name not in ran))
    return status or len(ran) < len(wanted)


if __name__ == "__main__": sys.exit(main())
