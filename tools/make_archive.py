"""Makes a release in dist/: the repository as it was committed, the two wheels, and their checksums.

python tools/make_archive.py

    dmin-<version>.tar.gz     for an archival service; with CITATION.cff, which Zenodo reads
    dmin-<version>-….whl      the package
    dmin_data-<version>-….whl its data, models and results
    SHA256SUMS                sha256sum -c SHA256SUMS

The same commit gives the same files. Uncommitted changes are refused: they would be in the wheels alone.
"""
import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

from first_cells import ROOT, settings
from make_wheels import git, make_wheels


def archive(path: Path) -> Path:
    """The committed files; gzip without its time, so that they are the same bytes each time."""
    name = path.name.removesuffix(".tar.gz")
    tar = subprocess.run(
        ["git", "archive", f"--prefix={name}/", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed: packed.write(tar)
    return path


def checksums(paths: list[Path]) -> str:
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in paths)


def make_archive(dist: Path) -> list[Path]:
    wheels = make_wheels(dist)
    paths = [archive(dist / f"dmin-{settings()['version']}.tar.gz"), *wheels]
    (dist / "SHA256SUMS").write_text(checksums(paths))
    return paths


if __name__ == "__main__":
    if changed := git("status", "--porcelain"): sys.exit(f"commit or remove these first:\n{changed}")
    for path in make_archive(ROOT / "dist"): print(f"dist/{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    print("dist/SHA256SUMS")
