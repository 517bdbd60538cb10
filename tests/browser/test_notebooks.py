"""The tutorials in JupyterLab, as a reader sees them: Run All, nothing red, nothing cut off, in both themes."""
import re

import pytest

from conftest import ROOT

TUTORIALS = [p.stem for p in sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))]

# what is wider than its place: outputs, and lines of code that must be scrolled
CUT = """() => [...document.querySelectorAll(".jp-Notebook .jp-OutputArea-output, .jp-Notebook .cm-scroller")]
  .filter((x) => x.scrollWidth > x.clientWidth + 1)
  .map((x) => `${x.scrollWidth} > ${x.clientWidth}: ${x.textContent.trim().slice(0, 80)}`)"""
RED = "[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']"
KERNEL = """async () => {
  const sessions = await (await fetch("/api/sessions")).json();
  return sessions.length === 1 && sessions[0].kernel.execution_state === "idle";
}"""
BUSY = """() => {
  const marks = [...document.querySelectorAll(".jp-Notebook .jp-CodeCell .jp-InputArea-prompt")];
  return marks.every((x) => /\\[\\d+\\]/.test(x.textContent)) ? "done" : marks.map((x) => x.textContent).join("");
}"""


def open_notebook(page, lab, name: str) -> None:
    page.goto(f"{lab.url}/lab/workspaces/{name}/tree/{name}.ipynb?reset", wait_until="domcontentloaded")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").wait_for()
    page.wait_for_function(KERNEL)
    page.wait_for_timeout(3000)   # the page learns of it: until then, JupyterLab asks which kernel is meant


def run_all(page) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    page.wait_for_function(f"({BUSY})() === 'done' || document.querySelector(\"{RED}\")", timeout=150_000)


def keep(page, path) -> None:
    """A picture of all of it: the window grows to the notebook."""
    height = page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollHeight")
    page.set_viewport_size({"width": 1440, "height": min(int(height) + 120, 14_000)})
    page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
    page.wait_for_timeout(500)
    page.screenshot(path=path)
    page.set_viewport_size({"width": 1440, "height": 1000})


def switch_theme(page, name: str) -> None:
    """As a reader does, by the menu; what is shown stays."""
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Settings$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Theme$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^JupyterLab {name}$")).click()
    page.wait_for_function("(x) => document.body.dataset.jpThemeLight === x", arg=str(name == "Light").lower())


def end_kernel(page, lab) -> None:
    token = next(x["value"] for x in page.context.cookies(lab.url) if x["name"] == "_xsrf")
    for session in page.request.get(f"{lab.url}/api/sessions").json():
        where = f"{lab.url}/api/sessions/{session['id']}"
        assert page.request.delete(where, headers={"X-XSRFToken": token}).status == 204


@pytest.mark.parametrize("name", TUTORIALS)
def test_run_all(page, lab, shots, name):
    lab.theme("Light")
    open_notebook(page, lab, name)
    run_all(page)
    for theme in ("Light", "Dark"):
        if theme == "Dark": switch_theme(page, theme)
        keep(page, shots / f"{name}_{theme.lower()}.png")
        assert (red := page.locator(RED)).count() == 0, red.all_inner_texts()
        assert (cut := page.evaluate(CUT)) == [], cut
    assert page.evaluate(BUSY) == "done"
    assert page.locator(".jp-OutputArea-output", has_text="<Figure size").count() == 0   # a figure's name alone
    end_kernel(page, lab)


def place(page):
    """Which of the pictures has the focus."""
    pictures = "[...document.querySelectorAll('.dmin-explorer .sample')]"
    return page.evaluate(f"{pictures}.indexOf(document.activeElement)")


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_explorer(page, lab, shots, theme):
    """Everything that the widget offers, by mouse and by keyboard."""
    lab.theme(theme)
    open_notebook(page, lab, "explore")
    run_all(page)
    widget = page.locator(".dmin-explorer").first
    samples, about = widget.locator("button.sample"), widget.locator(".about")
    assert samples.count() == 8 and widget.locator(".query").count() == 3

    widget.get_by_text("as they were").click()   # the notebook's last cells have set weights
    page.wait_for_function(
        "[...document.querySelectorAll('.dmin-explorer .weights output')].every((x) => x.textContent === '1')")
    widget.locator(".query").nth(0).click()
    about.filter(has_text="query 0").wait_for()
    widget.locator(".query").nth(1).click()
    about.filter(has_text="query 1").wait_for()
    first = samples.first.inner_text()
    slider = widget.get_by_label("samples")
    slider.fill("12")
    page.wait_for_function("document.querySelectorAll('.dmin-explorer .sample').length === 12")
    slider.press("ArrowLeft")   # the keyboard keeps its place, though all is drawn anew
    page.wait_for_function("document.querySelectorAll('.dmin-explorer .sample').length === 11")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelectorAll('.dmin-explorer .sample').length === 12")
    widget.get_by_label("method").select_option("raw pixels")
    about.filter(has_text="raw pixels").wait_for()
    assert samples.first.inner_text() != first and widget.locator(".weights").count() == 0
    widget.get_by_label("method").select_option("DMin")
    about.filter(has_text="DMin").wait_for()
    assert samples.first.inner_text() == first   # the same again

    widget.locator("summary").click()
    widget.locator(".weights[open]").wait_for()
    widget.locator(".weights input").first.fill("2")
    page.wait_for_function(f"document.querySelector('.dmin-explorer .sample').innerText !== {first!r}")
    widget.get_by_text("as they were").click()
    page.wait_for_function(f"document.querySelector('.dmin-explorer .sample').innerText === {first!r}")
    widget.get_by_label("show").select_option("bottom")
    about.filter(has_text="lowest scores").wait_for()
    widget.get_by_label("show").select_option("top")
    about.filter(has_text="most influential").wait_for()
    subset = widget.get_by_label("among").locator("option", has_text="subset:").first
    widget.get_by_label("among").select_option(label=subset.inner_text())
    named = subset.inner_text().removeprefix("subset: ")
    page.wait_for_function(
        "(x) => [...document.querySelectorAll('.dmin-explorer .sample')].every((y) => y.title.includes(x))",
        arg=named)
    widget.get_by_label("among").select_option(label="all")

    samples.nth(2).click()
    large = widget.locator(".large")
    large.wait_for()
    assert "prompt" in large.inner_text() and large.locator(".bar").count() >= 2
    widget.screenshot(path=shots / f"explorer_{theme.lower()}.png")
    page.keyboard.press("Escape")
    large.wait_for(state="detached")
    page.keyboard.press("Escape")   # nothing is open: nothing happens
    assert widget.locator(".samples").count() == 1 and "waiting" not in widget.get_attribute("class")
    samples.first.focus()
    page.keyboard.press("ArrowRight")
    assert place(page) == 1
    page.keyboard.press("Enter")
    large.wait_for()
    page.keyboard.press("]")
    about.filter(has_text="query 2").wait_for()
    assert page.evaluate(CUT) == [] and page.locator(RED).count() == 0
    end_kernel(page, lab)


def test_explorer_without_a_kernel(page, lab, shots):
    """It says that nobody answers; saved and opened again, the notebook has the picture in its place."""
    lab.theme("Light")
    open_notebook(page, lab, "explore")
    run_all(page)
    widget, picture = page.locator(".dmin-explorer").first, page.locator("[data-dmin-explorer]").first
    widget.wait_for()
    assert not picture.is_visible()
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^File$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Save Notebook$")).click()
    page.locator(".jp-Notebook").first.wait_for()
    end_kernel(page, lab)
    widget.get_by_label("show").select_option("bottom")
    widget.locator(".about", has_text="no kernel answers: run the cell again").wait_for(timeout=40_000)
    page.goto(f"{lab.url}/lab/workspaces/again/tree/explore.ipynb?reset", wait_until="domcontentloaded")
    picture.wait_for()
    assert picture.locator("img").count() >= 8 and page.locator(".dmin-explorer").count() == 0
    picture.screenshot(path=shots / "explorer_without_a_kernel.png")
    end_kernel(page, lab)
