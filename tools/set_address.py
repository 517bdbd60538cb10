"""Sets where the project lies and who publishes it, in every file that says so: settings.ini, the notebooks'
badges and first cells, README, CITATION, the site, the package.

python tools/set_address.py --git-url https://github.com/alice/dmin --site https://alice.github.io/dmin
python tools/set_address.py --author "Alice and others" --email alice@example.com

What is not named stays. The address that is replaced is the one in settings.ini, so it can be set again.
"""
import argparse
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from first_cells import main as write_first_cells
from first_cells import settings

ROOT = Path(__file__).resolve().parents[1]
# What each may be: it goes into TOML, YAML, INI and HTML as it is.
FORMS = {
    "git_url": (r"https?://[\w.:-]+(/[\w.-]+){2,}", "https://github.com/who/name"),
    "site": (r"https?://[\w.:-]+(/[\w.~-]+)*", "https://…, without a question mark"),
    "author": (r"[\w .,'&()-]+", "letters, spaces and . , ' & ( ) - only"),
    "email": (r"[\w.+-]+@[\w.-]+", "name@place")}


def files(root: Path) -> list[Path]:
    """Those that git tracks and that are text."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    paths = [root / name for name in names.split("\0") if name]
    return [p for p in paths if p.is_file() and b"\0" not in p.read_bytes()[:2000]]


def replacements(root: Path, git_url: str, site: str, author: str, email: str) -> dict[str, str]:
    """What stands for what: longer ones first, as they hold shorter ones."""
    s = settings(root)
    found = {}
    if git_url:
        found[s["git_url"]] = git_url
        old, new = (x.removeprefix("https://github.com/") for x in (s["git_url"], git_url))
        found[f"colab.research.google.com/github/{old}/"] = f"colab.research.google.com/github/{new}/"
        found[f"user = {s['user']}\n"] = f"user = {urlsplit(git_url).path.strip('/').split('/')[0]}\n"
    if site:
        parts = urlsplit(site)
        host, folder = f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/")
        found[f'Documentation = "{s["doc_host"]}{s["doc_baseurl"]}"'] = f'Documentation = "{host}{folder}"'
        found[f"url: {s['doc_host']}{s['doc_baseurl']}\n"] = f"url: {host}{folder}\n"   # CITATION.cff
        found[f"doc_host = {s['doc_host']}\n"] = f"doc_host = {host}\n"
        found[f"'doc_host': '{s['doc_host']}'"] = f"'doc_host': '{host}'"
        found[f"doc_baseurl = {s['doc_baseurl']}\n"] = f"doc_baseurl = {folder}\n"
        found[f"'doc_baseurl': '{s['doc_baseurl']}'"] = f"'doc_baseurl': '{folder}'"
    if author:
        found |= {f'{{ name = "{s["author"]}" }}': f'{{ name = "{author}" }}'}   # pyproject.toml
        found |= {f"author = {s['author']}\n": f"author = {author}\n"}
        found |= {f"  - name: {s['author']}\n": f"  - name: {author}\n"}           # CITATION.cff
    if email: found[s["author_email"]] = email
    return {old: new for old, new in sorted(found.items(), key=lambda x: -len(x[0])) if old != new}


def set_address(root: Path, **chosen: str) -> list[Path]:
    """Replaces everywhere; returns the files that changed."""
    known, changed = replacements(root, **chosen), []
    for path in files(root):
        text = new = path.read_text(encoding="utf-8")
        for old, value in known.items(): new = new.replace(old, value)
        if new == text: continue
        path.write_text(new, encoding="utf-8")
        changed.append(path)
    write_first_cells(root)
    return changed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--git-url", default="", help="of the repository, without .git")
    parser.add_argument("--site", default="", help="where the pages of `make docs` are served")
    parser.add_argument("--author", default="")
    parser.add_argument("--email", default="")
    args = parser.parse_args()
    if not any(vars(args).values()): parser.error("nothing to set: name one or more of the options")
    args.git_url, args.site = args.git_url.rstrip("/").removesuffix(".git"), args.site.rstrip("/")
    for name, (form, expected) in FORMS.items():
        if (value := getattr(args, name)) and not re.fullmatch(form, value):
            parser.error(f"--{name.replace('_', '-')} {value!r}: expected {expected}")
    if args.git_url and not args.git_url.startswith("https://github.com/"):
        print(f"{args.git_url} is not on GitHub, from where alone Colab opens notebooks: the badges lead nowhere")
    for path in set_address(ROOT, **vars(args)): print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__": sys.exit(main())
