"""The table of claims: what README.md says is what results/ has, every table and figure is there, and a
stopped run of all of them goes on.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PYTHON

from dmin.reproduction.architectures import ARCHITECTURES
from dmin.reproduction.claims import Claim, claims_summary, claims_table, Comparison, paper_notebooks, published, STATUS
from dmin.pipelines import PIPELINES

ROOT = Path(__file__).parents[1]
NOT_JUDGED = ("not judged", "not judged at this size")
WANTED = {
    *(f"table_{i}" for i in range(1, 8)),
    *(f"figure_{i}" for i in (1, 3, 4, 5, 6)),
    "dtrak_tables_2_3_6",
    "dtrak_tables_7_8",
    "dtrak_figure_3",
    "dtrak_figures_5_8",
    *(f"kfac_figure_{i}" for i in (2, 3, 4, 6))}


def result(name): return json.loads((ROOT / "results" / "mini" / f"{name}.json").read_text())


def test_readme_has_the_table_that_results_make():
    assert claims_summary() in (ROOT / "README.md").read_text(), (
        "README.md is older than results/: make notebooks, or run nbs/index.ipynb in place, then make readme")


def test_table_of_claims_follows_results(tmp_path, monkeypatch):
    changed = result("table_3")
    changed["result"]["claims"][0]["measured"] = "something else"
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "table_3.json").write_text(json.dumps(changed))
    monkeypatch.setattr("dmin.reproduction.claims.results_root", lambda: tmp_path)
    assert "something else" in claims_table() and "not run" in claims_summary()


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    rows = [line for line in claims_summary().split("\n") if line in text]
    assert len(text) <= 16_000 and 20 < len(rows) <= 25, (len(text), len(rows))


def test_every_table_and_figure_has_its_notebook(): assert set(paper_notebooks()) == WANTED


@pytest.mark.parametrize("name", sorted(WANTED))
def test_committed_result_has_what_a_claim_needs(name):
    found = result(name)
    assert (
        found["preset"] == "mini"
        and found["machine"]["processor"]
        and found["machine"]["torch"]
        and found["result"]["seconds"] > 0)
    claims = found["result"]["claims"]
    assert claims and all(
        c["text"] and c["expected"] and c["measured"] and c["status"] in (*STATUS[c["kind"]], *NOT_JUDGED)
        for c in claims)
    assert all(
        c["status"]
        == Claim(**{k: c[k] for k in c if k != "status"}).status
        for c in claims)
    unclear = [c["measured"] for c in claims if c["status"] == "not judged"]
    assert all("would be seen" in words for words in unclear), "not judged, and not what would have been"


@pytest.mark.parametrize("name", sorted(WANTED))
def test_committed_notebook_was_run_whole(name):
    nb = json.loads((ROOT / "nbs" / "paper" / f"{name}.ipynb").read_text())
    outputs = [o for c in nb["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    kinds = {k for o in outputs for k in o.get("data", {})}
    assert {"image/png", "image/jpeg"} & kinds and "text/html" in kinds, "a figure and a table are wanted"
    assert not [o for o in outputs if o["output_type"] == "error"] and len(json.dumps(nb)) < 1_500_000
    text = "".join("".join(o["data"].get("text/html", "")) for o in outputs if "data" in o)
    assert all(
        c["measured"].replace("<", "&lt;").replace(">", "&gt;") in text or c["measured"] in text
        for c in result(name)["result"]["claims"]
    ), "its outputs are of another run than its result"


def test_published_numbers_are_read_as_they_stand():
    rows = published("dmin_table2_detection", model="SD 3 Medium (LoRA)", subset="flowers", k=5)
    assert {r["method"]: r["detection_rate"] for r in rows}["Ours (w/o Comp.)"] == .9128
    assert (
        published("kfac_lds_percent", dataset="CIFAR-2", method="CLIP cosine")[0]["default_damping"] is None)


def test_comparison_never_mixes_columns():
    table = Comparison({"a": {"x": 1.}}, {"b": {"x": 2.}}, "ours", "theirs")
    assert table.rows == [
        {"method": "a", "column": "x", "mean": 1.0},
        {"method": "b", "column": "x", "published": 2.0}]
    assert "ours" in table._repr_html_() and "theirs" in table._repr_html_()
    with pytest.raises(ValueError, match="no such published row"):
        Comparison({"a": {}}, {}, "", "", {"a": "c"})


def test_counted_parameters_are_the_published_storage():
    """Table 3's uncompressed bytes follow from the architectures: 4 bytes a parameter and timestep, in units
    of 2**20 and 2**30.
    """
    bytes_of = {r["model"]: r["per_sample"] for r in published("dmin_table3_storage", method="uncompressed")}
    for model, architecture in (
        ("SD 1.4 (LoRA)", "SD 1.4 (LoRA)"),
        ("SD 3 Medium (LoRA)", "SD 3 Medium (LoRA)"),
        ("SD 3 Medium (Full)", "SD 3 Medium (Full, released code)"),
    ):
        a = ARCHITECTURES[architecture]
        number, unit = bytes_of[model].split()
        assert abs(4 * a.parameters() * a.timesteps / {"MB": 2**20, "GB": 2**30}[unit] - float(number)) < .006


def test_recipes_are_table_7():
    for row in published("dmin_table7_training"):
        recipe = PIPELINES[
            {
                "SD 1.4 (LoRA)": "sd14-lora",
                "SD 3 Medium (LoRA)": "sd3-medium-lora",
                "SD 3 Medium (Full)": "sd3-medium-full",
            }[row["model"]]
        ].recipe
        assert (
            recipe.lr,
            recipe.batch_size,
            recipe.epochs,
            recipe.size,
            recipe.rank,
            recipe.alpha,
            recipe.precision,
        ) == tuple(
            row[k]
            for k in (
                "learning_rate",
                "batch_size",
                "epochs",
                "image_size",
                "lora_rank",
                "lora_alpha",
                "precision"))
        if recipe.rank: assert " ".join(recipe.targets) == row["lora_target_layers"]


def run(out, *names):
    environment = os.environ | {
        "DMIN_PRESET": "smoke",
        "DMIN_OUT": str(out),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [PYTHON, "tools/run_paper.py", *names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900)


def test_what_is_done_is_not_redone(tmp_path):
    first = run(tmp_path, "table_1", "table_7")
    assert first.returncode == 0, first.stderr[-2000:]
    folder = tmp_path / "paper" / "smoke"
    before = (folder / "table_7.ipynb").stat().st_mtime_ns
    (tmp_path / "results" / "smoke" / "table_1.json").unlink()
    again = run(tmp_path, "table_1", "table_7")
    assert (
        again.returncode == 0
        and "table_7: done already" in again.stdout
        and "table_1: done already" not in again.stdout)
    assert (folder / "table_7.ipynb").stat().st_mtime_ns == before
    assert (
        re.search(r"2 notebooks", (folder / "summary.md").read_text())
        and "reproduced" in (folder / "summary.md").read_text())
    done = json.loads((folder / "done.json").read_text())
    done["table_7"]["of"] = "of older code"
    (folder / "done.json").write_text(json.dumps(done))
    other = run(tmp_path, "table_1")
    assert "have changed since they ran: table_7" in other.stdout and "1 notebook" in (folder / "summary.md").read_text()


def test_notebooks_that_share_stores_run_after_one_another():
    sys.path.insert(0, str(ROOT / "tools"))
    from run_paper import lanes
    names = paper_notebooks()
    assert lanes(names, 1) == [names] and lanes(["table_1"], 2) == [["table_1"]]
    papers, digits, timed = lanes(names, 2)
    assert sorted(papers + digits + timed) == sorted(names) and timed == ["table_4", "table_6"]
    assert [n.startswith(("dtrak", "kfac")) for n in papers + digits] == [False] * 10 + [True] * 8


def test_two_notebooks_at_a_time(tmp_path):
    """Each by a process of its own, and both are summed up."""
    done = run(tmp_path, "--lanes", "2", "table_7", "kfac_figure_3")
    assert done.returncode == 0, done.stderr[-2000:]
    summary = (tmp_path / "paper" / "smoke" / "summary.md").read_text()
    assert "2 notebooks" in summary and "| table_7 |" in summary and "| kfac_figure_3 |" in summary


def test_unknown_notebook_is_named(tmp_path):
    done = run(tmp_path, "table_9")
    assert done.returncode == 2 and "table_9" in done.stderr and "table_2" in done.stderr


def test_two_processes_share_a_paper_notebook(tmp_path):
    environment = os.environ | {
        "DMIN_PRESET": "smoke",
        "DMIN_OUT": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            PYTHON,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "29611",
            "tools/run_cells.py",
            "nbs/paper/figure_5.ipynb"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {f"ran in process {i} of 2" in done.stdout for i in (1, 2)} == {
        True
    } and "2 processes, share of the first" in done.stderr
    assert (tmp_path / "results" / "smoke" / "figure_5.json").exists()


def test_a_notebook_that_failed_is_not_as_shipped(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from run_paper import shipped, summary
    of_1, of_2 = shipped("table_1", "mini"), shipped("table_2", "mini")
    done = {
        "table_1": {"ok": True, "seconds": 9., "claims": of_1}, "table_2": {"ok": False, "seconds": 2., "claims": []}}
    text = summary(done, "mini", "a machine")
    assert of_2 and "**failed**" in text and f"As shipped: {len(of_1)} of {len(of_1) + len(of_2)}\n" in text
