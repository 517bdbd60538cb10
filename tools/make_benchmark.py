"""Makes a retraining benchmark, or what is missing of it.

    torchrun --nproc-per-node 2 tools/make_benchmark.py digits

An interrupted run goes on; with --pack, the models' outputs are put into one file at the end.
"""
import argparse

from dmin.reproduction.retraining_benchmark import RetrainingBenchmark, SHIPPED

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("name", choices=SHIPPED)
parser.add_argument("--pack", action="store_true", help="put the outputs into one file; alone, not among several")
options = parser.parse_args()
benchmark = RetrainingBenchmark(options.name).build()
if options.pack: benchmark.retrained.pack()
