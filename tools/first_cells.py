"""Writes the first cells of tutorials, benchmarks and paper notebooks: where to open each and what it needs, and
what installs dmin where that is missing.

python tools/first_cells.py            # after results/needs.json, the version or the address has changed

The address is git_url in settings.ini, which tools/set_address.py sets; minutes and memory are measured by
`tools/run_notebook.py --record` and `tools/run_paper.py --record-times`; "stopped" is a run that was not waited for.
"""
import configparser
import hashlib
import json
import math
import textwrap
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = "tutorials", "benchmarks", "paper"
# what is optional, and the notebooks that need it, by how their names begin
EXTRAS = {
    "kfac": ("paper/kfac_figure_2", "paper/kfac_figure_4", "paper/kfac_figure_6", "paper/dtrak", "benchmarks/methods",
             "benchmarks/leaderboard", "benchmarks/tried"),
    "cluster": ("tutorials/laptop_to_cluster",)}
PEERS = "benchmarks/peers",   # compare with other packages, which would ask for other builds of torch
BADGE, INSTALL = "[![Open in Colab]", "#| hide\n# Where dmin is missing"


def settings(root: Path = ROOT) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(root / "settings.ini")
    return parser["DEFAULT"]


def minutes(seconds: float, stopped: bool = False) -> str:
    if stopped: return f"More than {seconds / 3600:.0f} hour{'s' * (seconds >= 5400)}"
    if seconds < 90: return "A minute"
    if seconds < 600: return f"{math.ceil(seconds / 60)} minutes"
    return f"{5 * math.ceil(seconds / 300)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def needs(name: str, root: Path = ROOT) -> str:
    """What a notebook such as "tutorials/quickstart" needs, as measured in the mini preset."""
    path = root / "results" / "needs.json"
    measured = json.loads(path.read_text()).get("notebooks", {}) if path.exists() else {}
    if name not in measured: return ""
    found = measured[name]
    memory = f"{math.ceil(found['memory_gb'] * 2) / 2:g} GB of memory, " if "memory_gb" in found else ""
    shared = " (in `make paper`, whose notebooks share stores; alone, it collects those that are missing first)"
    if not name.startswith("paper/") or name == "paper/summary": shared = ""
    took = minutes(found["seconds"], found.get("stopped", False))
    return f"{took} on two CPU cores{shared}, {memory}no GPU."


def extras(name: str) -> str:
    """What a notebook needs beside the package, as pip names it."""
    wanted = [extra for extra, notebooks in EXTRAS.items() if name.startswith(notebooks)]
    return f"[{','.join(wanted)}]" if wanted else ""


def peers(root: Path = ROOT) -> str:
    """A line that installs the other packages, as the Makefile does."""
    lines = (root / "tests" / "peers.txt").read_text().splitlines()
    pins = " ".join(line for line in lines if line and not line.startswith("#"))
    parts = textwrap.wrap(pins, 90, break_on_hyphens=False)
    quoted = "\n".join(f'        "{part} "' for part in parts)
    return f"\n    others = (\n{quoted})\n" + '    get_ipython().run_line_magic("pip", f"install -q --no-deps {others}")'


def first_cells(name: str, root: Path = ROOT) -> tuple[str, str]:
    """The sources of the two cells, Markdown and code."""
    s = settings(root)
    where = s["git_url"].removeprefix("https://github.com/")
    badge = (
        f"{BADGE}(https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{where}/blob/{s['branch']}/nbs/{name}.ipynb)")
    install = (
        f"{INSTALL}, as in Colab, this installs it with its data; elsewhere it does nothing.\n"
        "import importlib.util\n\n"
        'found = importlib.util.find_spec("dmin")\n'
        "if found is None or found.origin is None:   # a folder of that name is no package\n"
        f'    release = "{s["git_url"]}/releases/download/v{s["version"]}"\n'
        f'    code = f"dmin{extras(name)}@{{release}}/dmin-{s["version"]}-py3-none-any.whl"\n'
        f'    data = f"dmin_data@{{release}}/dmin_data-{s["version"]}-py3-none-any.whl"\n'
        '    get_ipython().run_line_magic("pip", f"install -q {code} {data}")')
    if name in PEERS: install += peers(root)
    return f"{badge} {needs(name, root)}".strip(), install


def renewed(path: Path, root: Path = ROOT) -> nbformat.NotebookNode | None:
    """The notebook with the two cells below its title as they should be; None where they are."""
    nb = nbformat.read(path, as_version=4)
    name = path.relative_to(root / "nbs").with_suffix("").as_posix()
    rest = [c for c in nb.cells if not c.source.startswith((BADGE, INSTALL))]
    new = []
    for source, make in zip(first_cells(name, root), (nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell)):
        known = hashlib.sha256(f"{name} {make.__name__}".encode()).hexdigest()[:8]
        new.append(make(source, id=known))
    cells = [rest[0], *new, *rest[1:]]
    if [c.source for c in cells] == [c.source for c in nb.cells]: return None
    nb.cells = cells
    return nb


def stale(root: Path = ROOT) -> dict[Path, nbformat.NotebookNode]:
    """Notebooks whose first cells are not as they should be -> as they should be."""
    paths = [p for folder in FOLDERS for p in sorted((root / "nbs" / folder).glob("*.ipynb"))]
    return {path: nb for path in paths if (nb := renewed(path, root))}


def main(root: Path = ROOT) -> None:
    for path, nb in stale(root).items():
        path.write_text(nbformat.writes(nb, version=nb.nbformat) + "\n")
        print(path.relative_to(root))


if __name__ == "__main__": main()
