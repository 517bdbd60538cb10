"""Runs notebooks top to bottom, each in its own folder and its own kernel, and prints what they print.

    python tools/run_notebook.py nbs/tutorials/quickstart.ipynb --output out/quickstart.ipynb
    python tools/run_notebook.py --inplace nbs            # a folder: all notebooks in it, sorted

Notebooks find the folder for what they make in the environment variable DMIN_OUT, which is the folder of
`--output` if given.
"""
import argparse
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent

WIDGET = "application/vnd.jupyter.widget-view+json"


def echo(cell, cell_index, **_):
    """Prints the standard output of a cell that has run."""
    streams = [output for output in cell.get("outputs", []) if output.output_type == "stream"]
    print(ended("".join(output.text for output in streams if output.name == "stdout")), end="", flush=True)


def ended(text: str) -> str:
    """A stream with the end of each progress bar, and none that never moved."""
    lines = [line.split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(line for line in lines if not re.search(r"\b0%\|.*\| \S+/\S+ \[", line))


def tidy(text: str) -> str:
    """Standard error as one would keep it: as `ended`, and warnings without this machine's folders."""
    return re.sub(r"(?m)^/\S*?/(ipykernel_\d+/\d+\.py:\d+: |(?=dmin/\S+\.py:\d+: ))", "", ended(text))


class Memory(threading.Thread):
    """Watches how much memory a process and those that it started hold together: `peak`, in GB."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process, self.peak, self.over = psutil.Process(pid), 0., threading.Event()

    def run(self):
        while not self.over.wait(.2): self.peak = max(self.peak, self.held())

    def held(self) -> float:
        total = 0
        try:
            for each in [self.process, *self.process.children(recursive=True)]: total += each.memory_info().rss
        except psutil.NoSuchProcess: pass   # one has just ended
        return total / 1e9


def record(name: str, **needed: float) -> None:
    """Keeps what a notebook such as "tutorials/quickstart" needed, for tools/first_cells.py."""
    path = ROOT / "results" / "needs.json"
    known = json.loads(path.read_text()) if path.exists() else {"notebooks": {}}
    known["notebooks"][name] = {what: round(x, 2) for what, x in needed.items()}
    known["notebooks"] = dict(sorted(known["notebooks"].items()))
    path.write_text(json.dumps(known, indent=1) + "\n")


def run(path: Path, output: Path, timeout: int | None, needed: dict | None = None) -> bool:
    """Whether it ran through; `needed` is given the seconds and the gigabytes that it took."""
    nb = nbformat.read(path, as_version=4)
    nb.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "python3", "language": "python"})
    nb.metadata.pop("widgets", None)
    watches = []

    def watch(notebook):
        watches.append(Memory(client.km.provisioner.pid))
        watches[0].start()

    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        store_widget_state=False,
        coalesce_streams=True,
        on_notebook_start=watch,
        on_cell_executed=echo,
        extra_arguments=["--log-level=40"],
        resources={"metadata": {"path": str(path.parent)}})
    start, error = time.perf_counter(), None
    try: client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e: error = e
    seconds = time.perf_counter() - start
    for each in watches: each.over.set()
    if needed is not None: needed.update(seconds=seconds, memory_gb=max((x.peak for x in watches), default=0.))
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        for o in cell.outputs:
            if o.output_type == "stream": o.text = tidy(o.text) if o.name == "stderr" else ended(o.text)
        cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]
        cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]   # nothing without its kernel
    if error is None or output != path:  # in place, a failed run leaves the notebook as it was
        output.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, output)
    if error: print(f"{path} failed:\n{error}", file=sys.stderr)
    else:
        print(
            f"{path} ran in {seconds:.0f} s; with its outputs it is in {output}",
            flush=True)
    return error is None


def notebooks(paths: list[Path]) -> list[Path]:
    found = [sorted(p.rglob("*.ipynb")) if p.is_dir() else [p] for p in paths]
    return [nb for nbs in found for nb in nbs if ".ipynb_checkpoints" not in nb.parts]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, help="where the one notebook goes with its outputs")
    where.add_argument("--inplace", action="store_true", help="keep the outputs in the notebooks themselves")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one cell")
    parser.add_argument(
        "--record",
        action="store_true",
        help="keep seconds and memory in results/needs.json, which the notebooks' first cells show; for the mini"
             " preset, on a machine that does nothing else",
    )
    args = parser.parse_args()
    if args.output and len(notebooks(args.paths)) != 1: parser.error("--output takes one notebook")
    if args.output: os.environ["DMIN_OUT"] = str(args.output.resolve().parent)
    ok = []
    for path in notebooks(args.paths):
        needed = {}
        ok.append(run(path, args.output or path, args.timeout, needed))
        if ok[-1] and args.record:
            record(path.resolve().relative_to(ROOT / "nbs").with_suffix("").as_posix(), **needed)
    sys.exit(0 if all(ok) else 1)
