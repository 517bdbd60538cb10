"""JupyterLab in a real browser: `make test-browser`. Screenshots go to out/browser."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
SHOTS = Path(os.environ.get("DMIN_OUT", ROOT / "out" / "smoke")).parent / "browser"
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def without_outputs(source: Path, target: Path) -> None:
    nb = nbformat.read(source, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
    nbformat.write(nb, target)


class Lab:
    """A running JupyterLab with the tutorials as a reader gets them, without outputs."""

    def __init__(self, folder: Path):
        self.notebooks, self.url = folder / "tutorials", f"http://127.0.0.1:{free_port()}"
        self.notebooks.mkdir()
        for path in sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb")):
            without_outputs(path, self.notebooks / path.name)
        settings = {
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "notebook-extension/tracker": {"windowingMode": "none"}}   # a test looks at all cells at once
        for name, values in settings.items(): self.set(folder / "settings", name, values)
        command = ["-m", "jupyter", "lab", "--no-browser", f"--port={self.url.split(':')[-1]}"]
        command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={self.notebooks}", "--allow-root"]
        environment = os.environ | {
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "DMIN_OUT": str(folder / "out")}
        self.log = open(folder / "lab.log", "w")
        self.process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=self.log, stderr=self.log)
        self.settings = folder / "settings"

    @staticmethod
    def set(folder: Path, name: str, values: dict) -> None:
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))

    def theme(self, name: str) -> None:
        self.set(self.settings, "apputils-extension/themes", {"theme": f"JupyterLab {name}"})

    def wait(self, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try: return urllib.request.urlopen(f"{self.url}/api", timeout=5).close()
            except OSError: time.sleep(.2)
        raise TimeoutError(f"JupyterLab does not answer: see {self.log.name}")

    def close(self) -> None:
        self.process.terminate()
        try: self.process.wait(120)
        except subprocess.TimeoutExpired: self.process.kill()   # a busy machine; the tests are done
        self.log.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.wait()
        yield lab
    finally: lab.close()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.set_default_timeout(120_000)
    yield page
    page.close()


@pytest.fixture(scope="session")
def shots():
    SHOTS.mkdir(parents=True, exist_ok=True)
    return SHOTS
