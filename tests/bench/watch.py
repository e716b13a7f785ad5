"""What watching costs: steps a second of ``nano`` bare, with the panel closed, and with the panel open in a browser.

    python tests/bench/watch.py [--rounds 8] [--steps 25]

One kernel of a real JupyterLab trains in blocks. In each round every arm has its turn, in an order that
changes: ``bare`` (a run without a panel), ``null`` (the same once more: what the noise is), ``closed`` (a run
whose panel is made and open nowhere, as with the page closed or its drawing on another machine) and ``open``
(the panel in a real Chromium on the same cores). A ratio is an arm's block over the same round's bare one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import textwrap
from pathlib import Path

import nbformat
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "browser"))
from lab_server import chromium_page, jupyter_lab, open_notebook, run_all, until

CELL = """
import moe_core as mc
from widgets import Workbench
quiet = lambda line: None
bare = mc.Run.create("bare", mc.preset("nano", eval_interval=0, save_interval=0), say=quiet)
run = mc.Run.create("watched", mc.preset("nano", eval_interval=0, save_interval=0), say=quiet)
panel = Workbench(run)
panel
"""

BLOCK = """
import time
{name}.session.start(2); {name}.session.wait()
started = time.perf_counter()
{name}.session.start({steps}); {name}.session.wait()
print({steps} / (time.perf_counter() - started), panel.live.interval, panel.live.drawing)
"""


def evaluate(client, code: str) -> str:
    """What the kernel prints for ``code``."""
    said = []

    def hear(message) -> None:
        if message["msg_type"] == "error":
            raise RuntimeError("\n".join(message["content"]["traceback"]))
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])

    client.execute_interactive(textwrap.dedent(code), timeout=600, output_hook=hear)
    return "".join(said)


def connect(address: str, folder: Path, page):
    from jupyter_client import BlockingKernelClient

    session, = page.request.get(f"{address}/api/sessions").json()
    client = BlockingKernelClient()
    client.load_connection_file(str(next((folder / ".jupyter").rglob(f"kernel-{session['kernel']['id']}.json"))))
    client.start_channels()
    client.wait_for_ready(timeout=60)
    return client


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    arms = ["bare", "null", "closed", "open"]
    speeds: dict[str, list[float]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder, jupyter_lab(Path(folder)) as address, chromium_page() as page:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, Path(folder) / "watch.ipynb")
        open_notebook(page, address, "watch.ipynb")
        run_all(page)
        page.locator(".js-plotly-plot").wait_for(timeout=120_000)
        page.locator('.jp-NotebookPanel-toolbar [data-command="docmanager:save"]').click()
        client = connect(address, Path(folder), page)
        for name in ("bare", "run"):  # what is slow the first time
            evaluate(client, BLOCK.format(name=name, steps=20))
        for turn in range(rounds):
            for arm in arms[turn % 4:] + arms[: turn % 4]:
                if arm == "open":
                    page.goto(f"{address}/lab/tree/watch.ipynb")
                    page.locator(".js-plotly-plot").wait_for()
                    until(lambda: page.evaluate("document.querySelector('.js-plotly-plot').data !== undefined"), "data")
                    page.wait_for_timeout(3000)
                else:
                    page.goto("about:blank")
                    page.wait_for_timeout(1000)
                said = evaluate(client, BLOCK.format(name="run" if arm in ("closed", "open") else "bare", steps=steps))
                speeds[arm].append(float(said.split()[0]))
                print(f"round {turn + 1}: {arm:6} {said.strip()}", file=sys.stderr, flush=True)
        client.stop_channels()
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    speeds = measure(args.rounds, args.steps)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, nano, {args.rounds} rounds of "
          f"{args.steps} steps; steps a second over bare, medians (least to most)")
    for arm in ("null", "closed", "open"):
        ratios = [a / b for a, b in zip(speeds[arm], speeds["bare"], strict=True)]
        print(f"{arm:8} {statistics.median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f})")
    print(json.dumps({arm: [round(v, 3) for v in values] for arm, values in speeds.items()}))


if __name__ == "__main__":
    main()
