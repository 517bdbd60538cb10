"""Makes a retraining benchmark, or what is missing of it, part by part.

    torchrun --nproc-per-node 2 tools/make_benchmark.py digits            the models of all samples and of halves
    python tools/make_benchmark.py digits --scores                        every method's scores of the queries
    torchrun --nproc-per-node 2 tools/make_benchmark.py digits --without  models without a method's first samples
    python tools/make_benchmark.py digits --pack                          all outputs into a file each

An interrupted part goes on. Scores are computed and packing is done by one process; both read what came before.
"""
import argparse

from dmin.reproduction.contenders import contenders, removal_masks
from dmin.reproduction.retraining_benchmark import RetrainingBenchmark, SHIPPED
from dmin.reproduction.setups import RetrainingSetup

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("name", choices=SHIPPED)
for part in ("scores", "without", "pack"): parser.add_argument(f"--{part}", action="store_true")
options = parser.parse_args()

if options.scores:
    setting = RetrainingSetup(options.name)
    setting.bench.scores.build(contenders(setting), setting.bench.queries)
elif options.without and SHIPPED[options.name].without:
    setting = RetrainingSetup(options.name)
    setting.bench.redrawn.build(removal_masks(setting), setting.bench.redraw)
elif options.pack:
    bench = RetrainingBenchmark(options.name)
    bench.retrained.pack()
    if SHIPPED[options.name].without: bench.redrawn.pack()
elif not options.without: RetrainingBenchmark(options.name).build()
