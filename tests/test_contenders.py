"""The scores that come with a retraining benchmark: what they were made with, and that they are read whole."""
import random

import pytest
import torch

from dmin.measures.retrained import Retrained
from dmin.measures.counterfactual import counterfactual, without_top
from dmin.methods.similarity import RawPixels
from dmin.reproduction.retraining_benchmark import KeptScores, RetrainingBenchmark, SHIPPED


def shipped(part): return [name for name in SHIPPED if (RetrainingBenchmark(name).folder / part).exists()]


def spearman(a, b):
    a, b = (x.argsort(1).argsort(1).double() for x in (a, b))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


@pytest.mark.parametrize("name", shipped("scores.safetensors"))
def test_shipped_scores_are_of_all_queries_and_as_their_checksums_say(name):
    import hashlib
    bench = RetrainingBenchmark(name)
    scores, about = bench.scores.read(), bench.scores.about
    assert len(scores) >= 18 and set(scores) == set(about)
    for method, x in scores.items():
        assert x.shape == (len(bench.queries), len(bench.samples)) and x.isfinite().all(), method
        assert hashlib.sha256(x.half().numpy().tobytes()).hexdigest() == about[method]["sha256"], method
        assert (x.abs().amax(1) == 1).all(), method
    again = RawPixels(bench.samples).scores(bench.queries)
    assert spearman(again, scores["Raw pixels"]).min() > 1 - 1e-3   # pixels of float16 have some ties


@pytest.mark.parametrize("name", [name for name in shipped("without/models.safetensors") if SHIPPED[name].without])
def test_shipped_counterfactual_models_are_those_of_the_shipped_scores(name):
    from dmin.reproduction.contenders import removal_scores, removals
    from dmin.reproduction.setups import RetrainingSetup
    import os
    os.environ["DMIN_PRESET"], before = "mini", os.environ.get("DMIN_PRESET")
    try:
        setting = RetrainingSetup(name)
        chosen, scores = removals(setting), removal_scores(setting)
    finally:
        os.environ.pop("DMIN_PRESET")
        if before: os.environ["DMIN_PRESET"] = before
    for n in chosen.sizes:
        table = counterfactual(scores, setting.bench.redrawn, n, chosen.queries, progress=False)
        assert set(table.values) == set(chosen.methods)
        for columns in table.values.values(): assert len(columns["loss change"]) == len(chosen.queries)


def test_any_flipped_bit_of_kept_scores_is_refused(tmp_path):
    kept, draw = KeptScores(tmp_path / "scores.safetensors"), random.Random(0)
    good = torch.randn(3, 8)
    kept.keep("a method", good, damping=.1)
    whole, refused = kept.path.read_bytes(), 0
    was = kept.read()["a method"]
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        kept.path.write_bytes(damaged)
        try: found = kept.read(["a method"])
        except (ValueError, KeyError): refused += 1
        else: assert torch.equal(found["a method"], was)
    assert refused > 40


def test_kept_scores_order_samples_as_the_scores_did(tmp_path):
    kept = KeptScores(tmp_path / "scores.safetensors")
    good = 1e-12 * torch.randn(20, 400)
    good[3] = 0
    kept.keep("tiny", good)
    found = kept.read()["tiny"]
    assert spearman(found[:3], good[:3]).min() > .99999
    assert (found[3] == 0).all()


def test_a_model_that_lacks_a_querys_image_is_named(tmp_path):
    """Two queries whose first samples are the same share a model; one that came later has no image there."""
    def redraw(rows, seed, queries):
        images = range(3) if queries is None else queries
        return {"losses": torch.zeros(3, 1)} | {f"image-{q}": torch.full((2, 2), q, dtype=torch.uint8) for q in images}
    retrained = Retrained(tmp_path / "without", {})
    same = torch.tensor([[3., 2, 1, 0]]).expand(3, 4)
    both = counterfactual({"same": same}, retrained, 2, [0, 1], redraw, progress=False)
    assert both.images["same"][:, 0, 0].tolist() == [0, 1]
    assert len(retrained.missing(without_top(same, 2)[:1])) == 0
    with pytest.raises(ValueError, match="no output 'image-2'"):
        counterfactual({"same": same}, retrained, 2, [2], redraw, progress=False)
