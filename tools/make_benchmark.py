"""Makes a retraining benchmark, or what is missing of it, part by part.

    torchrun --nproc-per-node 2 tools/make_benchmark.py digits            the models of all samples and of halves
    python tools/make_benchmark.py digits --scores                        every method's scores of the queries
    torchrun --nproc-per-node 2 tools/make_benchmark.py digits --without  models without a method's first samples
    python tools/make_benchmark.py digits --pack                          all outputs into a file each

An interrupted part goes on. Scores are computed and packing is done by one process; both read what came before.
"""
import argparse

from dmin.measures.counterfactual import counterfactual
from dmin.reproduction.contenders import contenders, removal_scores, removals
from dmin.reproduction.retraining_benchmark import RetrainingBenchmark, SHIPPED
from dmin.reproduction.setups import RetrainingSetup


def score(name: str) -> None:
    """Every method's scores."""
    setting = RetrainingSetup(name)
    setting.bench.scores.build(contenders(setting), setting.bench.queries)


def take_away(name: str) -> None:
    """The counterfactual models, where the benchmark has some."""
    if not SHIPPED[name].without: return
    setting = RetrainingSetup(name)
    chosen, bench, scores = removals(setting), setting.bench, removal_scores(setting)
    for n in reversed(chosen.sizes): counterfactual(scores, bench.redrawn, n, chosen.queries, bench.redraw)


def pack(name: str) -> None:
    """All outputs into a file each."""
    bench = RetrainingBenchmark(name)
    bench.retrained.pack()
    if SHIPPED[name].without: bench.redrawn.pack()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("name", choices=SHIPPED)
for part in ("scores", "without", "pack"): parser.add_argument(f"--{part}", action="store_true")
options = parser.parse_args()
if options.scores: score(options.name)
elif options.without: take_away(options.name)
elif options.pack: pack(options.name)
else: RetrainingBenchmark(options.name).build()
