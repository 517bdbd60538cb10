"""What a user takes away: tables, pages and figures say what the scores say, and open elsewhere."""
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_pipeline
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from PIL import Image as Pictures

from dmin import collect, Scores
from dmin.methods.similarity import RawPixels
from dmin.methods.stability import collect_seeds, Repeated


@pytest.fixture(scope="module")
def named(digits):
    """The digits with a label by name, a text that needs escaping, and a column called as one of ours."""
    kinds = Features({"image": Image(), "label": ClassLabel(names=list("abcdefghij")),
                      "prompt": Value("string"), "score": Value("int64")})
    rows = [
        {"image": x["image"], "label": x["label"], "prompt": f"<b>{i}</b>, \"ä\"\n", "score": 7}
        for i, x in enumerate(digits)]
    return Dataset.from_list(rows, features=kinds)


@pytest.fixture(scope="module")
def store(named, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers") / "s"
    return collect(make_pipeline(), named, folder, v=64, timesteps=3, progress=False)


@pytest.fixture(scope="module")
def scores(store, named): return store.influence(named.select([3, 17, 5]))


def test_scores_as_people_expect(scores):
    values = scores.values
    assert len(scores) == 3 and np.array_equal(np.asarray(scores), values.numpy())
    assert np.asarray(scores, dtype=np.float64).dtype == np.float64
    assert [x.values.tolist() for x in scores] == [[row] for row in values.tolist()]
    assert torch.equal(scores[-1].values, values[2:]) and torch.equal(scores[[2, 0]].values, values[[2, 0]])
    assert torch.equal(scores[1:].values, values[1:])
    assert scores[1].queries[0]["prompt"] == scores.queries[1]["prompt"]
    assert scores[1].top(1).rows.tolist() == [[17]]
    for wrong in (3, -4):
        with pytest.raises(IndexError, match="there are 3"): scores[wrong]
    for wrong in ("first", "1", 1.7, None):
        with pytest.raises(TypeError, match="a query's number"): scores[wrong]
    mask = [True, False, True]   # not rows 1, 0 and 1
    for wrong in (mask, np.array(mask), torch.tensor(mask)):
        with pytest.raises(TypeError, match="numbers of queries are needed"): scores[wrong]
    for i in (torch.tensor(1), np.int64(1), np.array(1)): assert torch.equal(scores[i].values, values[1:2])
    with pytest.raises(ValueError, match="a copy is needed"): np.array(scores, copy=False)


def test_rankings_as_people_expect(scores):
    ranking = scores.top(4) + scores.bottom(2)
    assert len(ranking) == 3 and len(list(ranking)) == 3
    second = ranking[1]
    assert torch.equal(second.rows, ranking.rows[1:2])
    assert torch.equal(second.shown_with[0].rows, ranking.shown_with[0].rows[1:2])
    assert second.strips()[0].query_title.startswith("query 0")
    assert [r.rows[0, 0].item() for r in scores.top(1)] == [3, 17, 5]


def test_rankings_shown_together(scores):
    a, b, c = scores.top(4), scores.bottom(2), scores.top(1)
    assert [x.rows.shape[1] for x in (a + (b + c)).shown_with] == [2, 1]   # none is lost
    for wrong in (lambda: a[0] + b, lambda: a + b[0]):
        with pytest.raises(ValueError, match="queries cannot be shown together"): wrong()


def test_rankings_of_several_methods_say_whose_they_are(scores, named):
    both = scores.top(2) + RawPixels(named).influence(scores.queries).top(2)
    page = both.to_html()
    assert "<p>By" not in page
    for name in (scores.method, "Raw pixels"):
        assert f"Proponents: the most influential, by {name}" in page
    assert both.to_pandas()["ranking"].nunique() == 2
    assert [x.heading for x in (scores.top(2) + scores.bottom(2)).shown_with] == ["Opponents: the lowest scores"]


def test_the_explorer_opens_on_what_was_ranked(scores, named):
    explorer = scores.bottom(3).explore()
    assert [x["row"] for x in explorer.shown["samples"]] == scores.bottom(3).rows[0].tolist()
    few = Scores(scores.per_timestep[:, :4], scores.timesteps, scores.queries, named.select(range(4)))
    assert len(few.explore().shown["samples"]) == 4   # no more than there are
    with pytest.raises(ValueError, match="two methods are called 'DMin"): scores.explore({scores.method: scores})
    explorer = scores.explore()
    explorer.chosen = {**explorer.chosen, "large": 3}   # whose own column `score` is 7 everywhere
    facts = dict(explorer.shown["large"]["facts"])
    assert facts["sample_score"] == "7" and facts["score"] == f"{scores.values[0, 3]:+.4f}"


def test_what_is_not_finite_has_no_rank():
    parts = torch.tensor([[[1.], [float("nan")], [2.]]])
    with pytest.raises(ValueError, match="training sample 1 for query 0 has the parts .nan.: .* no rank"): Scores(parts)


def test_small_scores_keep_their_digits(named):
    scores = Scores(torch.tensor([[[3e-11], [-2e-6], [0.]]]), None, named.select([0]), named.select(range(3)))
    top = scores.top(3)
    assert "+3.0e-11" in repr(top) and "+3.0e-11" in top.body() and "-2.0e-06" in top.body()
    assert [x["score"] for x in json.loads(top.to_json())] == top.scores[0].tolist()


def test_a_table_of_a_ranking(scores, named):
    ranking = scores.top(4) + scores.bottom(2)
    found = ranking.to_pandas()
    assert len(found) == 3 * 4 + 3 * 2
    best = found[found["ranking"] == ranking.heading]
    assert best["row"].tolist() == ranking.rows.flatten().tolist()
    assert np.allclose(best["score"], ranking.scores.flatten())
    assert best["rank"].tolist() == [1, 2, 3, 4] * 3 and best["query"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert best["prompt"].tolist() == [named[i]["prompt"] for i in best["row"]]
    assert set(best["sample_score"]) == {7}   # the data set's column keeps its values
    assert best["label"].tolist() == [named.features["label"].int2str(named[i]["label"]) for i in best["row"]]


def test_text_says_what_the_table_says(scores, tmp_path):
    for answer in (scores, scores.top(3)):
        table = answer.to_pandas()
        again = pd.read_csv(io.StringIO(answer.to_csv()))
        pd.testing.assert_frame_equal(again, table, rtol=1e-6)
        assert json.loads(answer.to_json()) == table.to_dict("records")   # to the last digit
        for kind, text in (("csv", answer.to_csv()), ("json", answer.to_json()), ("html", answer.to_html())):
            path = answer.save(tmp_path / "new" / f"x.{kind}")
            assert path.read_text(encoding="utf-8") == text


def test_scores_as_a_table(scores, named):
    table = scores.to_pandas()
    assert table["row"].tolist() == list(range(len(named)))
    for q in range(3): assert np.allclose(table[f"query {q}"], scores.values[q])
    assert table["prompt"].tolist() == list(named["prompt"])


def test_ranks_of_seeds_are_in_the_table(named, tmp_path):
    stores = collect_seeds(make_pipeline(), named, tmp_path / "s", 2, v=64, timesteps=2, progress=False)
    ranking = Repeated(stores).influence(named.select([4, 9])).top(5)
    table = ranking.to_pandas()
    assert table["stable"].tolist() == ranking.stable.flatten().tolist()
    assert (table["lowest_rank"] <= table["highest_rank"]).all()
    assert torch.equal(ranking[1].ranks, ranking.ranks[1:])


def test_a_page_opens_without_anything_beside_it(scores, tmp_path):
    text = scores.top(3).to_html()
    assert text.startswith("<!doctype html>")
    for answer in (scores, scores.bottom(2), scores[0].by("label")): assert f"<p>By {scores.method}</p>" in answer.to_html()
    assert "&lt;b&gt;3&lt;/b&gt;" in text and "<b>3</b>" not in text   # a prompt is text
    assert len(re.findall(r'<img src="data:image/png;base64,', text)) == 3 * (1 + 3)
    assert not re.search(r'(src|href)="(?!data:)', text)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no browser")
def test_a_page_in_a_browser(scores, tmp_path):
    page = scores.top(3).save(tmp_path / "x.html")
    shot = tmp_path / "x.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,700"]
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=180)
    assert len(np.unique(np.asarray(Pictures.open(shot).convert("L")))) > 50   # digits are grey


@pytest.mark.parametrize("kind, begins", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures(scores, tmp_path, kind, begins):
    for answer in (scores, scores.top(2)):
        assert answer.save(tmp_path / f"x.{kind}").read_bytes().startswith(begins)


def test_what_cannot_be(scores, tmp_path):
    with pytest.raises(ValueError, match="'.doc' is not known; choose .csv, .json, .html"):
        scores.save(tmp_path / "x.doc")
    plain = Scores(torch.randn(2, 5, 1))
    assert list(plain.to_pandas().columns) == ["row", "query 0", "query 1"]
    assert "<pre>" in plain.top(2).to_html()   # no pictures are known
    with pytest.raises(ValueError, match="training images are not known"): plain.save(tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists() and not list(tmp_path.glob(".*"))


def test_the_files_of_a_folder_of_pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4): Pictures.fromarray(np.full((8, 8), 60 * i, np.uint8)).save(folder / f"mine {i}.png")
    pictures = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "c"))
    table = Scores(torch.randn(1, 4, 1), samples=pictures).top(2).to_pandas()
    assert table["file"].tolist() == [f"mine {i}.png" for i in table["row"]]


def test_pictures_of_a_folder_are_told_by_their_files(tmp_path):
    """In print, and first in captions, where one prompt is that of all."""
    for i in range(3): Pictures.effect_noise((8, 8), 60 + i).save(tmp_path / f"hill_{i}.png")
    pictures = load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    pictures = pictures.add_column("prompt", ["a photo of sks hill"] * 3)
    ranking = Scores(torch.randn(1, 3, 1, generator=torch.manual_seed(0)), None, pictures.select([0]), pictures).top(3)
    for row in range(3):
        assert f"hill_{row}.png · a photo of sks hill" in str(ranking)
        assert f"hill_{row}.png · a photo of sks hill" in ranking.to_html()
    with pytest.raises(ValueError, match="k=10: choose 1 to 3.*there are 3 training samples"): ranking.source.top(10)
