"""Runs a notebook's code as one script, so that several processes can share its collecting:

    torchrun --nproc-per-node 2 tools/run_cells.py nbs/paper/table_2.ipynb
    accelerate launch --multi_gpu tools/run_cells.py nbs/paper/table_2.ipynb

Every process runs every cell; `collect` and `RetrainingBenchmark.build` divide their work, and the first
process writes the result.
"""
import os
import sys
from pathlib import Path

import nbformat

if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    path = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("MPLBACKEND", "agg")
    os.chdir(path.parent)
    names = {"__name__": "__main__", "display": print}
    for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code": exec(compile(cell.source, f"{path.name}, cell {i}", "exec"), names)
    print(
        f"{path.name} ran in process {int(os.environ.get('RANK', 0)) + 1} of"
        f" {os.environ.get('WORLD_SIZE', 1)}"
    )
