"""Runs the notebooks of nbs/paper and sums up what each found.

python tools/run_paper.py                      # all, in the preset that DMIN_PRESET names, mini by default
python tools/run_paper.py table_2 figure_1     # some
python tools/run_paper.py --again              # also those that are done
python tools/run_paper.py --lanes 1            # one after another

D-TRAK's and K-FAC's notebooks share a model and its stores, and DMin's share others: where there is no GPU and more
than one core, the two run beside one another, with half of the cores each; what judges times runs alone, last.

Executed notebooks and summary.md go to out/paper/<preset>, numbers to out/results/<preset>, stores to out (smoke:
all in out/smoke); DMIN_OUT, if set, takes the place of out and out/smoke. The summary says which parts were judged
as in the shipped results. What is done is not done again, unless its notebook or the package has changed since; a
run that was stopped goes on with the first notebook that is not done, and that one with what it had collected.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
from filelock import FileLock

from run_notebook import record as record_needs
from run_notebook import run

ROOT = Path(__file__).resolve().parent.parent


def digest(notebook: Path) -> str:
    """Of all that a result depends on: the notebook's code, the package, and the published numbers."""
    found = hashlib.sha256()
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code": found.update(cell.source.encode() + b"\n")
    for path in sorted([*ROOT.glob("dmin/**/*.py"), *ROOT.glob("data/published/*.csv")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def shipped(name: str, preset: str) -> list[dict]:
    """A notebook's judged parts as they are shipped for a preset; none for one that has no results."""
    path = ROOT / "results" / preset / f"{name}.json"
    return json.loads(path.read_text())["result"]["claims"] if path.exists() else []


def compared(name: str, claims: list[dict], preset: str) -> list[tuple[dict, str]]:
    """A notebook's judged parts, and for each what the shipped run of this preset says of it."""
    status = {c["text"]: c["status"] for c in shipped(name, preset)}
    return [(c, status.get(c["text"], "")) for c in claims]


def summary(done: dict, preset: str, about: str) -> str:
    """Markdown: what took how long, each part of each claim, and whether it was judged as shipped."""
    lines = [f"# Paper notebooks, preset {preset}", "", about, ""]
    lines += ["| notebook | seconds | part | measured | judged | as shipped |", "|---|---|---|---|---|---|"]
    same = known = 0
    for name, entry in done.items():
        if not entry["ok"]:
            lines.append(f"| {name} | {entry['seconds']:.0f} | **failed** | | | |")
            known += len(shipped(name, preset))
        for c, before in compared(name, entry["claims"], preset):
            known, same = known + bool(before), same + (before == c["status"])
            agree = "" if not before else "yes" if before == c["status"] else f"**{before}**"
            cells = (name, f"{entry['seconds']:.0f}", c["text"], c["measured"], c["status"], agree)
            lines.append("| " + " | ".join(x.replace("|", "\\|") for x in cells) + " |")
    statuses = [c["status"] for entry in done.values() for c in entry["claims"]]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))
    minutes = sum(e["seconds"] for e in done.values()) / 60
    lines += ["", f"{len(done)} notebooks, {minutes:.0f} min of computing; {counts}"]
    if known: lines.append(f"As shipped: {same} of {known}")
    return "\n".join(lines) + "\n"


def places(preset: str, chosen: str | None) -> tuple[Path, Path]:
    """The folders for executed notebooks and for what they make; `chosen` is DMIN_OUT as the user set it."""
    if chosen: return Path(chosen).absolute() / "paper" / preset, Path(chosen).absolute()
    return ROOT / "out" / "paper" / preset, ROOT / "out" / "smoke" if preset == "smoke" else ROOT / "out"


TIMED = "table_4", "table_6"   # judge what was timed
DIGITS = "dtrak", "kfac"       # begin the names of those that share the retraining benchmark on digits


def lanes(names: list[str], most: int) -> list[list[str]]:
    """All after one another, or in three parts: two that run beside one another, as they share no stores, and
    last what must have the machine to itself.
    """
    digits = [n for n in names if n.startswith(DIGITS)]
    alone = [n for n in names if n in TIMED]
    others = [n for n in names if n not in digits and n not in alone]
    return [others, digits, alone] if most > 1 and others and digits else [names]


def beside_one_another(parts: list[list[str]], again: bool, cores: int) -> None:
    """Each in a process of its own, which a Ctrl-C reaches as it does this one."""
    threads = {"OMP_NUM_THREADS": str(max(1, cores // len(parts)))}
    python = os.environ.get("FORKED_PYTHON", sys.executable)   # where tools/forked.py runs this
    command = [python, str(Path(__file__).resolve()), "--lanes", "1", "--part", *["--again"] * again]
    running = [subprocess.Popen([*command, *names], env=threads | os.environ) for names in parts]
    try:
        for each in running: each.wait()
    except BaseException:
        for each in running: each.wait()   # each ends its notebook's kernel
        raise


def stores_gb(name: str) -> float:
    """Of all stores that notebooks of this one's lane make."""
    from dmin.core.files import folder_bytes
    from dmin.core.runtime import out_folder
    digits = name.startswith(DIGITS)
    stores = [p for p in (out_folder() / "stores").glob("*/") if p.name.startswith(("digits", "retrain")) == digits]
    return sum(map(folder_bytes, stores)) / 1e9


def run_one(name: str, folder: Path, record: Path, again: bool) -> None:
    """Runs a notebook unless that is done, and notes what it found."""
    from dmin.core.files import write_atomically
    from dmin.reproduction.results import results_folder
    notebook, result = ROOT / "nbs" / "paper" / f"{name}.ipynb", results_folder() / f"{name}.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    of, known = digest(notebook), done.get(name, {})
    if not again and known.get("of") == of and known["ok"] and result.exists():
        print(f"{name}: done already, {folder / name}.ipynb", flush=True)
        return
    print(f"\n{'=' * 20} {name}", flush=True)
    needed, before = {}, stores_gb(name)
    ok = run(notebook, folder / f"{name}.ipynb", timeout=None, needed=needed)
    needed["disk_gb"] = stores_gb(name) - before
    claims = json.loads(result.read_text())["result"]["claims"] if ok else []
    entry = {"of": of, "ok": ok, **{k: round(x, 2) for k, x in needed.items()}, "claims": claims}
    with FileLock(record.with_suffix(".lock")):   # another process notes its own
        done = json.loads(record.read_text()) if record.exists() else {}
        text = json.dumps(done | {name: entry}, indent=1)
        write_atomically(record, lambda temporary: temporary.write_text(text))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of notebooks, without .ipynb; all by default")
    parser.add_argument("--again", action="store_true", help="also run what is done")
    parser.add_argument(
        "--record-times",
        action="store_true",
        help="keep the seconds in results/times.json, which the claims table shows, and what each needs in"
             " results/needs.json; only after a run from empty folders",
    )
    parser.add_argument("--lanes", type=int, choices=(1, 2), help="notebooks at a time; by default by the machine")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)   # of a run that sums up itself
    args = parser.parse_args()

    preset = os.environ.setdefault("DMIN_PRESET", "mini")
    folder, made = places(preset, os.environ.get("DMIN_OUT"))
    os.environ["DMIN_OUT"] = str(made)
    sys.path.insert(0, str(ROOT))
    from dmin.reproduction.claims import paper_notebooks, results_root
    from dmin.core.runtime import machine
    from dmin.reproduction.results import results_folder
    names = paper_notebooks()
    if unknown := [n for n in args.names if n not in names]:
        parser.error(f"there is no notebook {unknown[0]!r} in nbs/paper; there are {', '.join(names)}")

    folder.mkdir(parents=True, exist_ok=True)
    record, m = folder / "done.json", machine()
    about = f"{m['processor']}, {m['cores']} cores, " + (m["gpu"] or "no GPU")
    wanted = args.names or names
    apart = lanes(wanted, args.lanes or (2 if m["cores"] > 1 and not m["gpu"] else 1))
    if len(apart) > 1: beside_one_another(apart[:2], args.again, m["cores"])
    for name in apart[0] if len(apart) == 1 else apart[2]: run_one(name, folder, record, args.again)
    done = json.loads(record.read_text()) if record.exists() else {}
    if args.part: return 0
    present = {n: digest(ROOT / "nbs" / "paper" / f"{n}.ipynb") for n in names}
    ordered = {n: done[n] for n in names if n in done and done[n]["of"] == present[n]}
    if old := [n for n in names if n in done and n not in ordered]:
        print(f"\nNot summed up, as notebook or package have changed since they ran: {', '.join(old)}")
    (folder / "summary.md").write_text(summary(ordered, preset, about))
    print(
        "\n"
        + summary(ordered, preset, about)
        + f"\nExecuted notebooks and this summary are in {folder}, numbers in {results_folder()}.")
    if args.record_times:
        path = results_root() / "times.json"
        times = json.loads(path.read_text()) if path.exists() else {}
        seconds = times.get(preset, {}).get("seconds", {}) | {
            n: e["seconds"] for n, e in ordered.items() if e["ok"]}
        path.write_text(json.dumps(times | {preset: {"machine": about, "seconds": seconds}}, indent=1) + "\n")
        for n in (n for n, e in ordered.items() if e["ok"] and preset == "mini"):
            record_needs(f"paper/{n}", **{x: ordered[n][x] for x in ("seconds", "memory_gb", "disk_gb")})
    return 0 if all(done.get(n, {}).get("ok") for n in wanted) else 1


if __name__ == "__main__": sys.exit(main())
