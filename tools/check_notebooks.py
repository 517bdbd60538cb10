"""Checks that what is committed agrees: clean notebooks in the style of the project, dmin/ as exported from them
and with all its names, README.md and ARTIFACT.md as made from their notebooks, first cells as they should be.
"""
import difflib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from execnb.nbio import loads, nb2str
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export

from check_style import check as unlike_style
from first_cells import stale
from make_readme import ROOT, make_readme
from run_notebook import WIDGET


def shown(output: dict) -> str:
    """An output's text."""
    return "".join(output.get("text", [])) + "".join(output.get("data", {}).get("text/plain", []))


def unclean(path: Path) -> list[str]:
    """What nbdev_clean would change, and what failed when the notebook ran."""
    cfg, text = get_config(), path.read_text(encoding="utf-8")
    nb, found = loads(text), []
    for i, cell in enumerate(nb["cells"]):
        outputs = cell.get("outputs", [])
        if any(o["output_type"] == "error" for o in outputs):
            found.append(f"cell {i} holds an error: mend it and run the notebook again")
        if any(WIDGET in o.get("data", {}) for o in outputs):
            found.append(f"cell {i} shows a widget, which is nothing without its kernel: tools/run_notebook.py")
        if place := re.search(r"(?<![\w.~])/(tmp|home|root|Users)/\S+", " ".join(map(shown, outputs))):
            found.append(f"cell {i} shows a folder of one machine, {place[0][:60]}: run it with DMIN_OUT=out")
    clean_nb(
        nb,
        cfg.clear_all,
        cfg.get("allowed_metadata_keys", "").split(),
        cfg.get("allowed_cell_metadata_keys", "").split(),
        cfg.clean_ids)
    if nb2str(nb) != text: found.append("is not clean: run nbdev_clean")
    if nb["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("names no kernel: JupyterLab would ask its reader for one; set metadata.kernelspec to python3")
    return [f"{path.relative_to(ROOT)} {what}" for what in found]


def fresh_export(folder: Path) -> Path:
    """The package exported from the notebooks into an empty folder."""
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(
        ROOT / "nbs",
        folder / "nbs",
        ignore=lambda d, names: [n for n in names if Path(d, n).is_file() and not n.endswith(".ipynb")])
    os.chdir(folder)
    get_config.cache_clear()
    try: nbdev_export()
    finally:
        os.chdir(ROOT)
        get_config.cache_clear()
    return folder / "dmin"


def files(folder: Path) -> dict[str, list[str]]:
    """Path -> lines, of all files but compiled ones."""
    return {
        str(p.relative_to(folder)): p.read_text(encoding="utf-8").splitlines()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts}


def unlike_export() -> list[str]:
    """Where dmin/ differs from what the notebooks export."""
    with tempfile.TemporaryDirectory() as folder: fresh = files(fresh_export(Path(folder).resolve()))
    here, found = files(ROOT / "dmin"), []
    for name in sorted(here.keys() | fresh.keys()):
        if name not in fresh: found.append(f"dmin/{name} is exported by no notebook: remove it")
        elif name not in here: found.append(f"dmin/{name} is missing: run make export")
        elif here[name] != fresh[name]:
            diff = difflib.unified_diff(
                here[name], fresh[name], f"dmin/{name}", "as exported from its notebook", lineterm="", n=0)
            found.append(
                "\n    ".join(
                    [
                        f"dmin/{name} differs from its notebook: edit the notebook and run make export",
                        *list(diff)[:12]]))
    return found


def careless_names() -> list[str]:
    """Names that a module of dmin/ uses and does not have, which a notebook with more imports would hide, or
    imports and does not use.
    """
    said = subprocess.run(
        [sys.executable, "-m", "pyflakes", "dmin"], capture_output=True, text=True
    ).stdout.splitlines()
    return [f"{line}: see the exported imports of its notebook" for line in said if "__init__.py" not in line]


def words_of(outputs: list[dict]) -> str:
    """The text of a cell's outputs, without HTML's marks and with single spaces."""
    found = []
    for output in outputs:
        for value in (output.get("text", ""), *output.get("data", {}).values()):
            if not isinstance(value, dict): found.append(html.unescape("".join(value)))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", " ".join(found)))


def unlike_results() -> list[str]:
    """Measured numbers in results/mini that the committed outputs of their paper notebook do not show."""
    found = []
    for path in sorted((ROOT / "results" / "mini").glob("*.json")):
        notebook = ROOT / "nbs" / "paper" / f"{path.stem}.ipynb"
        if not notebook.exists(): continue
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        shown = words_of([output for cell in cells for output in cell.get("outputs", [])])
        for claim in json.loads(path.read_text(encoding="utf-8"))["result"].get("claims", []):
            measured = re.sub(r"\s+", " ", claim["measured"])
            if measured in shown: continue
            found.append(f"{notebook.relative_to(ROOT)} does not show {measured!r}, as {path.name} has it")
    return found


def unlike_readme() -> list[str]:
    """Where README.md, ARTIFACT.md and their pictures differ from what their notebooks make."""
    fresh = make_readme()
    here = {
        p.relative_to(ROOT).as_posix()
        for p in [ROOT / "README.md", ROOT / "ARTIFACT.md", *(ROOT / "index_files").glob("*")]
        if p.exists()}
    stale = {name for name in here if name not in fresh} | {
        n for n, c in fresh.items() if n not in here or (ROOT / n).read_bytes() != c}
    return [f"{name} differs from what its notebook makes: run make readme" for name in sorted(stale)]


def unlike_first_cells() -> list[str]:
    return [f"{path.relative_to(ROOT)} has other first cells: run tools/first_cells.py" for path in stale()]


if __name__ == "__main__":
    os.chdir(ROOT)
    paths = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    found = [what for path in paths for what in unclean(path)] + unlike_style(paths)
    found += unlike_export() + careless_names() + unlike_results() + unlike_readme()
    found += unlike_first_cells()
    for what in found: print(what, file=sys.stderr)
    print(f"{len(paths)} notebooks checked, {len(found)} things to mend", flush=True)
    sys.exit(1 if found else 0)
