"""Builds the site from the notebooks as they are kept, without running them, and checks its links.

    python tools/make_docs.py              into out/docs/html
    python tools/make_docs.py --check      the links of what was built

Pages are the notebooks, in the order of their names, and for each module of the package what its docstrings and the
comments of its parameters say. Needs nothing from the network: formulas are drawn by a copy of MathJax that is
installed with the other tools (`pip install dmin[docs]`). Ends with 1 where a link leads nowhere.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from first_cells import settings
from run_notebook import WIDGET

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "docs"
SETTINGS = settings()
ADDRESS, BRANCH = SETTINGS["git_url"], SETTINGS["branch"]

# caption -> what is in it: folders of notebooks, or notebooks, below nbs
SECTIONS = {
    "Start": ["index", "tutorials/quickstart", "tutorials/own_pictures", "tutorials/any_image", "tutorials/digits",
        "tutorials/explore"],
    "Tutorials": ["tutorials"],
    "Methods": ["methods"],
    "How it works": ["core", "00_lora", "01_pipelines", "02_training", "api"],
    "Families of pipelines": ["families"],
    "Results": ["paper/summary", "paper", "benchmarks"],
    "Measures and reproduction": ["measures", "reproduction"],
    "Reference": ["reference"]}

CONF = '''
import sys
sys.path.insert(0, {root!r})
project, author, copyright, version = "dmin", "dmin", "dmin", {version!r}
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx-mathjax-offline"]
root_doc = "contents"
exclude_patterns = ["**/.ipynb_checkpoints", "**/index_files"]
html_theme = "furo"
html_title = "dmin"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "misc.highlighting_failure"]
default_role = "literal"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {{"members": True, "show-inheritance": True}}


def described(app, what, name, object, options, lines):
    """Docstrings are plain text but for `code`; the comments beside parameters follow them."""
    import inspect, re
    from fastcore.docments import docments
    plain = {{ord(x): chr(92) + x for x in "*|_"}}
    for i, line in enumerate(lines):
        parts = re.split("(`[^`]*`)", line)
        lines[i] = "".join(x if x[:1] == "`" else x.translate(plain) for x in parts)
    if not inspect.isroutine(object): return
    try: found = docments(object, returns=False)
    except Exception: return   # without source
    lines += ["", *(f":param {{k}}: {{' '.join(x.translate(plain).split())}}" for k, x in found.items() if x), ""]


def setup(app): app.connect("autodoc-process-docstring", described)
'''

CSS = """
article table { font-size: .85rem; display: block; overflow-x: auto; max-width: 100% }
.cell_output pre { white-space: pre-wrap }
.cell_output img { max-width: 100% }
.cell_output > div { overflow-x: auto }
"""

def notebooks(entry: str) -> list[str]:
    """The pages of a section's entry, without their suffix, in the order of their files."""
    folder = ROOT / "nbs" / entry
    if not folder.is_dir(): return [entry]
    return [f"{entry}/{path.stem}" for path in sorted(folder.glob("*.ipynb"))]


def modules() -> list[str]:
    """The package's modules by their names."""
    found = []
    for path in sorted((ROOT / "dmin").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not path.name.startswith("_"): found.append(name)
    return found


def pages() -> dict[str, list[str]]:
    """Caption -> pages, each page once."""
    seen, found = set(), {}
    for caption, entries in SECTIONS.items():
        names = ["reference/index"] if entries == ["reference"] else [x for e in entries for x in notebooks(e)]
        found[caption] = [x for x in names if not (x in seen or seen.add(x))]
    return found


def inside(text: str, page: Path) -> str:
    """Markdown whose links from the repository's root, and to folders, lead to pages of the site."""
    folder = page.relative_to(ROOT / "nbs").parent

    def changed(link):
        to = link[1]
        if to.startswith("nbs/"): to = os.path.relpath(to, Path("nbs") / folder)
        there = (page.parent / to).resolve()
        if there.is_dir() and there.is_relative_to(ROOT / "nbs"): to += f"/{min(there.glob('*.ipynb')).name}"
        elif there.exists() and not there.is_relative_to(ROOT / "nbs"):
            to = f"{ADDRESS}/blob/{BRANCH}/{there.relative_to(ROOT)}"
        return f"]({to})"
    return re.sub(r"\]\(((?!\w+:)[^)#\s]+)\)", changed, text)


def readable(path: Path) -> dict:
    """A notebook without widgets, which need a kernel, and with what colours its code."""
    book = json.loads(path.read_text(encoding="utf-8"))
    book["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            source = re.sub(r"!(\[Open in Colab\])\(\S+?\)", r"\1", "".join(cell["source"]))   # no picture of others'
            cell["source"] = inside(source.replace("[[Open in Colab]]", "[Open in Colab]"), path)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data: data["text/markdown"] = inside("".join(data["text/markdown"]), path)
        if cell["cell_type"] == "code":
            cell["outputs"] = [o for o in cell["outputs"] if WIDGET not in o.get("data", {})]
            quieten(cell)
    return book


def quieten(cell: dict) -> None:
    """Takes nbdev's directives out of a cell, and with `echo: false` its code; what only names a module, whole."""
    source = "".join(cell["source"])
    directives = re.findall(r"^#\| ?(.*)", source, re.M)
    cell["source"] = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
    hidden = [x for x in directives if x.startswith(("echo: false", "hide"))]
    if not cell["source"].strip(): cell["metadata"]["tags"] = ["remove-cell"]
    elif hidden: cell["metadata"]["tags"] = ["remove-input"]


def write_source(folder: Path) -> None:
    """All that Sphinx reads."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts: continue
        to = folder / path.relative_to(ROOT / "nbs")
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(readable(path)), encoding="utf-8")
    (folder / "_static").mkdir()
    (folder / "_static" / "site.css").write_text(CSS)
    (folder / "conf.py").write_text(CONF.format(root=str(ROOT), version=SETTINGS["version"]))
    trees = ["# dmin\n"]
    for caption, names in pages().items():
        trees.append("```{toctree}\n:caption: " + caption + "\n:maxdepth: 1\n\n" + "\n".join(names) + "\n```\n")
    (folder / "contents.md").write_text("\n".join(trees))
    reference = folder / "reference"
    reference.mkdir()
    names = modules()
    for name in names:
        (reference / f"{name}.rst").write_text(f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n")
    listed = "\n".join(f"   {name}" for name in names)
    (reference / "index.rst").write_text(f"Reference\n=========\n\n.. toctree::\n   :maxdepth: 1\n\n{listed}\n")


class Page(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.anchors |= {known[k] for k in ("id", "name") if known.get(k)}
        if tag == "a" and known.get("href"): self.links.append(known["href"])
        if tag in ("img", "script") and known.get("src"): self.links.append(known["src"])
        if tag == "link" and known.get("rel") == "stylesheet": self.links.append(known["href"])


def broken(folder: Path) -> list[str]:
    """Links within the site that lead nowhere, `page: link`."""
    read = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    wrong = []
    for path, page in read.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if to.is_dir(): to = to / "index.html"
            there = read.get(to)
            lost = not to.exists() or (parts.fragment and there and unquote(parts.fragment) not in there.anchors)
            if lost: wrong.append(f"{path.relative_to(folder)}: {link}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="the links alone")
    options = parser.parse_args()
    site = OUT / "html"
    if options.check and not site.exists(): parser.error(f"there is no site in {site}: build it first")
    if not options.check:
        shutil.rmtree(site, ignore_errors=True)   # pages of notebooks that are gone
        write_source(OUT / "source")
        command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", str(OUT / "source"), str(site)]
        if code := subprocess.run(command).returncode: return code
    wrong = broken(site)
    for line in wrong: print(line)
    print(f"{len(list(site.rglob('*.html')))} pages in {site}, {len(wrong)} broken links")
    return 1 if wrong else 0


if __name__ == "__main__": sys.exit(main())
