"""The style rules of the notebooks that a program can see: `python tools/check_style.py [notebook …]`;
without one, all of them.

Lines of at most 110 columns; export cells of at most 25 lines; nothing with `_` imported from another module;
no method attached from outside its class; `raise` on a line of its own; nothing on standard error in
committed outputs.
"""
import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, LINES = 110, 25
# Export cells that are longer, and the number of lines that each may have.
LONG = {
    # classes, which stand whole in a cell: short methods, with their docstrings
    "Objective": 95,
    "LatentObjective": 110,
    "PromptedObjective": 59,
    "StableDiffusion3Objective": 46,
    "StableDiffusionObjective": 26,
    "DDPMObjective": 32,
    "_Between": 28,
    "ModelObjective": 73,
    "PixArtObjective": 31,
    "StableDiffusionXLObjective": 38,
    "QwenImageObjective": 50,
    "ZImageObjective": 33,
    "SanaObjective": 29,
    "Flux2Objective": 46,
    "FluxObjective": 48,
    "LDMObjective": 28,
    "FlowObjective": 44,
    "DiTObjective": 29,
    "Sink": 48,
    "_Total": 31,
    "_FactoredPlaces": 27,
    "_SOURCE": 52,   # of C
    "_PARTS": 31,    # of JavaScript
    "_RENDER": 35,
    "_STYLE": 30,
    "FactoredCompressor": 51,
    "ManifestFile": 26,
    "Ranks": 65,
    "PerSampleGradients": 62,
    "Manifest": 34,
    "ShardFiles": 84,
    "ShardFolder": 194,
    "Store": 149,
    "Ranking": 80,
    "Scores": 114,
    "Groups": 83,
    "Index": 50,
    "MappedShards": 32,
    "Explorer": 65,
    "Kernel": 31,
    "Layered": 26,
    "DAS": 26,
    "TRAK": 31,
    "WhitenedDMin": 34,
    "Curvature": 36,
    "KFAC": 45,
    "Retrained": 66,
    "_Files": 29,
    "DigitClassifier": 42,
    "RetrainingBenchmark": 77,
    "KeptScores": 48,
    "_PLACES": 32,
    "Study": 52,
    "PromptedRecipe": 26,
    "StoreCache": 40,
    "_Run": 29,
    "TextToImageSetup": 56,
    "MeanGradients": 27,
    "UnconditionalSetup": 61,
    "RetrainingSetup": 72,
    # functions whose arguments are explained one a line
    "fit": 34,
    "finetune": 34,
    "generate": 26,
    "sample_gradients": 39,
    "collect": 56,
    "report": 31,
    "counterfactual": 28,
    # configurations of tiny models
    "tiny_unet": 31,
    "tiny_vae": 30,
    "tiny_sd": 26,
    "tiny_sd3": 28,
    "tiny_ldm": 35}


def code_of(source: str) -> ast.Module | None:
    """The syntax tree of a cell, without magics; None where it is no Python."""
    plain = "\n".join("" if re.match(r"\s*(%|!|\?)", line) else line for line in source.split("\n"))
    try: return ast.parse(plain)
    except SyntaxError: return None


def first_name(tree: ast.Module) -> str:
    """What a cell defines first, to call it by."""
    for node in tree.body:
        if hasattr(node, "name"): return node.name
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name): return node.targets[0].id
    return "?"


def long_lines(source: str) -> list[str]:
    """Rows of Markdown tables and addresses cannot be broken."""
    lines = [
        x
        for x in source.split("\n")
        if len(x) > COLUMNS and not x.lstrip().startswith("|") and "](http" not in x]
    return [f"a line of {len(x)} columns: {x.strip()[:60]}…" for x in lines]


def open_fences(source: str) -> list[str]:
    """Code in Markdown that does not end, or ends within a line, where nothing ends."""
    fences = [line for line in source.split("\n") if "```" in line]
    within = [line for line in fences if not line.lstrip().startswith("```")]
    return [f"``` within a line: {x[:60]}" for x in within] + ["``` that does not end"] * (len(fences) % 2)


def private_imports(tree: ast.Module) -> list[str]:
    """Names with `_` that belong to another module of the package; `__version__` is anyone's."""
    nodes = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "dmin"]
    return [
        f"imports {name.name} from {n.module}" for n in nodes for name in n.names
        if name.name.startswith("_") and not name.name.startswith("__")
    ]


def attached(tree: ast.Module) -> list[str]:
    """`Class.method = …` outside the class."""
    targets = [
        t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets for t in getattr(t, "elts", [t])]
    return [f"attaches {ast.unparse(t)} from outside" for t in targets
            if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id[:1].isupper()]


def crowded_raises(tree: ast.Module) -> list[str]:
    """`raise` behind a colon."""
    parents = [n for n in ast.walk(tree) if hasattr(n, "body") and isinstance(n.body, list)]
    return [f"line {s.lineno}: raise shares its line" for n in parents for s in n.body
            if isinstance(s, ast.Raise) and s.lineno == getattr(n, "lineno", 0)]


def faults(path: Path) -> list[str]:
    """What is wrong with a notebook, cell by cell."""
    found = []
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        here = long_lines(source)
        if cell["cell_type"] == "markdown": here += open_fences(source)
        if cell["cell_type"] == "code":
            tree = code_of(source)
            if tree is not None: here += code_faults(tree, source)
            here += ["its output has standard error"] * any(
                o.get("name") == "stderr" for o in cell["outputs"])
        found += [f"cell {i}: {what}" for what in here]
    return found


def code_faults(tree: ast.Module, source: str) -> list[str]:
    found = private_imports(tree) + attached(tree) + crowded_raises(tree)
    lines = len([x for x in source.strip().split("\n") if not x.startswith("#|")])
    imports = all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body)
    if "#| export" in source and not imports and lines > LONG.get(first_name(tree), LINES):
        found.append(f"an export cell of {lines} lines: {first_name(tree)}")
    return found


def check(paths: list[Path]) -> list[str]:
    return [f"{path.relative_to(ROOT)} {what}" for path in paths for what in faults(path)]


if __name__ == "__main__":
    given = [Path(x).resolve() for x in sys.argv[1:]]
    found = check(
        given or [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts])
    for what in found: print(what)
    if not given:
        for name, n in Counter(x.split(" ")[0] for x in found).most_common(): print(f"{n:4}  {name}")
    print(f"{len(found)} things to mend")
    sys.exit(1 if found else 0)
