"""What holds for the project as a whole: what each room may import, and what the README says."""

import ast
import graphlib
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

from moe_core.presets import PRESETS
from moe_core.run import _open_runs

ROOT = Path(__file__).parents[1]
GUESTS = {"pandas", "plotly", "ipywidgets", "anywidget", "IPython", "datasets", "transformers", "tokenizers", "tqdm",
          "safetensors", "wandb", "tensorboard", "trackio", "kaleido", "widgets"}


def top_imports(file):
    """Modules that a file imports when it is imported itself."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in ("moe_core", "widgets"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_moe_core_trains_where_there_is_only_torch_and_numpy():
    """With every other package out of reach: import, build, and take two steps on an array of tokens."""
    script = f"""
        import sys
        for name in {sorted(GUESTS)!r}:
            sys.modules[name] = None
        import numpy as np
        import moe_core as mc
        from moe_core.data import Batches
        from moe_core.knobs import Knobs
        config = mc.preset("nano", n_layer=1, d_model=32, n_head=2, expert_width=32, vocab_size=64, block_size=16,
                           device="cpu", eval_interval=0)
        tokens = np.random.default_rng(0).integers(0, 64, 4000).astype(np.uint16)
        trainer = mc.Trainer(config, Knobs(config), Batches(tokens, 16, 8, seed=0), [])
        print(trainer.step().step, trainer.step().step)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "1 2\n", done.stderr


def test_imports_point_one_way():
    """widgets -> run, session -> trainer, store, checkpoint -> model, optim, data, knobs -> config; in no circle."""
    floors = [["config"], ["model", "optim", "data", "knobs"], ["trainer", "store", "storage", "checkpoint"],
              ["session", "health"], ["run"], ["cli", "shell"]]
    floor = {name: height for height, names in enumerate(floors) for name in names}
    above = {}
    for file in (ROOT / "moe_core").rglob("*.py"):
        room = file.relative_to(ROOT / "moe_core").parts[0].removesuffix(".py")
        for module in top_imports(file):
            assert module.split(".")[0] not in GUESTS, f"{file.name} imports {module} at its top"
            for other in [module.split(".")[1]] if module.startswith("moe_core.") else []:
                if other != room and room not in ("__init__", "__main__"):
                    above.setdefault(room, set()).add(other)
                if room in floor and other in floor:
                    assert floor[other] <= floor[room], f"{room} imports {other}, which stands above it"
    for file in (ROOT / "widgets").glob("*.py"):
        if file.stem != "__init__":
            above[f"widgets.{file.stem}"] = {module for module in top_imports(file) if module.startswith("widgets.")}
    tuple(graphlib.TopologicalSorter(above).static_order())  # raises where rooms import each other in a circle


def test_versions_are_said_once():
    """conda's file installs this project with its extra, and pins nothing that pyproject.toml pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch>=2.11,<2.14" in project["dependencies"]
    lines = [line.strip() for line in (ROOT / "environment.yml").read_text().splitlines()]
    assert "- -e .[lab]" in lines and not any("torch" in line or "jupyter" in line for line in lines)


def test_the_python_of_the_readme_runs_in_its_order(tmp_path, monkeypatch, corpus):
    """Block after block in one empty folder, on the small corpus, with "nano" made smaller still."""
    small = dict(n_layer=2, d_model=32, n_head=2, expert_width=88, block_size=64, vocab_size=512, batch_size=4)
    monkeypatch.setitem(PRESETS, "nano", PRESETS["nano"] | small | {"device": "cpu", "dataset_name": str(corpus)})
    monkeypatch.chdir(tmp_path)
    blocks, names = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S), {}
    try:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
        made = {path.name for path in (tmp_path / "runs").iterdir()}
        assert made == {"first", "sharper", "tuned", "dense", "moe", "plain"}
        assert (tmp_path / "first.html").stat().st_size and (tmp_path / "exported" / "config.json").is_file()
    finally:
        for run in list(_open_runs.values()):
            run.close()
