"""A real JupyterLab on a folder of the test's own, and a real Chromium looking at it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"

SETTINGS = {  # a page that asks nothing, saves when it is told to, and keeps every cell in the document
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}


@pytest.fixture(scope="session")
def chromium():
    """The system's Chromium or Chrome."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail("the browser tests need Chromium: sudo apt-get install -y chromium")
    return found


@pytest.fixture
def lab(tmp_path):
    """Starts JupyterLab, without a token and on loopback alone, on a copy of a notebook; gives its address."""
    servers = []

    def start(notebook: str) -> str:
        shutil.copy(NOTEBOOKS / notebook, tmp_path)
        for plugin, values in SETTINGS.items():
            file = tmp_path / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        own = {name: str(tmp_path / name.lower()) for name in (
            "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
        log = open(tmp_path / "lab.log", "w")  # noqa: SIM115 - the server writes to it until the end
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.port_retries=0", f"--ServerApp.root_dir={tmp_path}", "--IdentityProvider.token=",
             f"--LabApp.user_settings_dir={tmp_path / 'settings'}", f"--LabApp.app_settings_dir={tmp_path / 'app'}",
             f"--LabApp.workspaces_dir={tmp_path / 'workspaces'}"],
            cwd=tmp_path, env=os.environ | own, stdout=log, stderr=log, start_new_session=True)
        servers.append((server, log))
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return f"http://127.0.0.1:{port}/lab/tree/{notebook}"
            except OSError:
                if time.monotonic() > deadline or server.poll() is not None:
                    pytest.fail(f"JupyterLab did not start:\n{(tmp_path / 'lab.log').read_text()[-2000:]}")
                time.sleep(0.1)

    yield start
    for server, log in servers:
        os.killpg(server.pid, signal.SIGTERM)  # its kernels too
        server.wait(30)
        log.close()


@pytest.fixture
def page(chromium):
    """A page of a fresh Chromium, which reaches for nothing but what it is given."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"])
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()
