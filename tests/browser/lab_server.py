"""A real JupyterLab on a folder of one's own, and a real Chromium to look at it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"

SETTINGS = {  # a page that asks nothing, saves when it is told to, and keeps every cell in the document
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}

# A browser that takes longer to read the scripts of the panel than anywidget waits for a widget, and what that says.
BUSY = """
const address = URL.createObjectURL;
URL.createObjectURL = (blob) => address.call(URL, blob.size < 2000 ? blob : new Blob(
    ["await new Promise((go) => setTimeout(go, 2500));", blob], {type: blob.type}));
"""
LATE = "[anywidget] Failed to initialize model"


def until(true: Callable, what: str, seconds: float = 60):
    """Poll until ``true()`` is truthy and return that; AssertionError with ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return value


@contextlib.contextmanager
def jupyter_lab(folder: Path, theme: str = "light") -> Iterator[str]:
    """JupyterLab serving ``folder``, without a token and on loopback alone; its address, without a last slash."""
    settings = SETTINGS | {"apputils-extension/themes": {"theme": f"JupyterLab {theme.title()}"}}
    own = folder / ".jupyter"
    for plugin, values in settings.items():
        file = own / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = {name: str(own / name.lower()) for name in (
        "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    with open(own / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=",
             f"--LabApp.user_settings_dir={own / 'settings'}", f"--LabApp.app_settings_dir={own / 'app'}",
             f"--LabApp.workspaces_dir={own / 'workspaces'}"],
            cwd=folder, env=os.environ | folders, stdout=log, stderr=log, start_new_session=True)
        try:
            def answers() -> bool:
                assert server.poll() is None, f"JupyterLab did not start:\n{(own / 'lab.log').read_text()[-2000:]}"
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    return True
                return False
            until(answers, "JupyterLab")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # its kernels too
            server.wait(30)


@contextlib.contextmanager
def chromium_page(width: int = 1440, height: int = 1000):
    """A page of a fresh Chromium (or Chrome) of the system, which reaches for nothing but what it is given."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "this needs Chromium: sudo apt-get install -y chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def open_notebook(page, address: str, notebook: str) -> None:
    """Show the notebook, and wait until its kernel is connected and idle."""
    page.goto(f"{address}/lab/tree/{notebook}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    until(lambda: [s for s in page.request.get(f"{address}/api/sessions").json()
                   if s["kernel"]["connections"] and s["kernel"]["execution_state"] == "idle"], "a kernel")
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()


def run_all(page) -> None:
    """Run, Run All Cells, as a person does."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('[data-command="runmenu:run-all"]').click()
