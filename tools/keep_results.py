"""Takes the results of runs over into results/: python tools/keep_results.py [names], all by default."""
import argparse
import shutil
import sys
from pathlib import Path

from dmin.reproduction.results import results_folder, shipped_results
from dmin.reproduction.presets import preset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("names", nargs="*", help="such as table_2")
wanted, folder = parser.parse_args().names, results_folder()
paths = [folder / f"{name}.json" for name in wanted] if wanted else sorted(folder.glob("*.json"))
missing = [str(path) for path in paths if not path.exists()]
if missing or not paths: sys.exit(f"nothing to keep: {', '.join(missing) or folder} is not there or empty")
for path in paths: print(shutil.copy(Path(path), shipped_results(preset().name)))
