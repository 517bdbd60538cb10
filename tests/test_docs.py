"""The site's pages: all notebooks have a place, links lead somewhere, and what has none is found."""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import make_docs


def test_each_notebook_has_one_place():
    found = [name for names in make_docs.pages().values() for name in names if name != "reference/index"]
    here = {str(p.relative_to(ROOT / "nbs").with_suffix("")) for p in (ROOT / "nbs").rglob("*.ipynb")
            if ".ipynb_checkpoints" not in p.parts}
    assert len(found) == len(set(found)) and set(found) == here
    for caption, names in make_docs.pages().items(): assert names, caption
    assert "dmin.core.store" in make_docs.modules() and "dmin.core.gpu" in make_docs.modules()


@pytest.mark.parametrize("page, link, expected", [
    ("index", "nbs/paper/table_2.ipynb", "paper/table_2.ipynb"),
    ("paper/summary", "nbs/paper/table_2.ipynb", "table_2.ipynb"),
    ("api", "methods", "methods/00_dmin.ipynb"),
    ("paper/table_2", "../core/12_dtypes.ipynb", "../core/12_dtypes.ipynb"),
    ("tutorials/quickstart", "../../Makefile", f"{make_docs.ADDRESS}/blob/main/Makefile"),
    ("index", "https://example.org/x", "https://example.org/x")])
def test_links_are_of_the_site(page, link, expected):
    path = ROOT / "nbs" / f"{page}.ipynb"
    assert make_docs.inside(f"see [it]({link}).", path) == f"see [it]({expected})."


def test_cells_as_the_site_shows_them():
    def shown(source):
        cell = {"source": source, "metadata": {}}
        make_docs.quieten(cell)
        return cell["source"], cell["metadata"].get("tags", [])
    assert shown("#| export\ndef f(): pass") == ("def f(): pass", [])
    assert shown("#| default_exp core.a") == ("", ["remove-cell"])
    assert shown("#| echo: false\nplot()") == ("plot()", ["remove-input"])


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html#there">x</a><img src="lost.png">')
    (tmp_path / "b.html").write_text('<a href="a.html#here">x</a><a href="https://e.org">x</a><a href="#no">x</a>')
    assert make_docs.broken(tmp_path) == ["a.html: b.html#there", "a.html: lost.png", "b.html: #no"]


def test_notebooks_link_to_what_is_there():
    """All links of the notebooks as they are kept, without building anything."""
    import re
    wrong = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "markdown": continue
            for link in re.findall(r"\]\(((?!\w+:)[^)#\s]+)", "".join(cell["source"])):
                if not (path.parent / link).exists() and not (ROOT / link).exists(): wrong.append((path.name, link))
    assert not wrong
