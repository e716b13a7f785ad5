"""What a run was made with: versions and hardware, as they were at its creation. No name of a person or a host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

META = "provenance"  # the store's meta key
DATA = "data"  # the store's meta key: the fingerprint of what it was last trained on
PACKAGES = ("moe-workbench", "torch", "numpy", "datasets", "tokenizers", "transformers")


def gather(device: torch.device) -> dict[str, dict[str, str]]:
    """``versions`` (package -> version, of those installed) and ``hardware`` of the device that trains: JSON values."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # moe_core runs without most of them
    versions["torch"] = torch.__version__  # says also what it was built for
    hardware = {"system": f"{platform.system()} {platform.machine()}", "cpu": _cpu(),
                "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        hardware |= {"gpu": card.name, "gpu memory": f"{card.total_memory / 2**30:.0f} GiB",
                     "cuda": str(torch.version.cuda)}
    return {"versions": versions, "hardware": hardware}


def same_threads(store, device: torch.device, say: Callable[[str], None]) -> None:
    """Have torch take as many threads as the run in ``store`` was begun with: on a CPU a sum depends on them."""
    begun = (store.get_meta(META) or {}).get("hardware", {}).get("threads", "")
    if device.type == "cpu" and begun.isdecimal() and int(begun) != (now := torch.get_num_threads()):
        say(f"{store.path}: was begun with {begun} thread{'s' * (begun != '1')} and goes on with as many, so that its "
            f"numbers stay the same; this process had {now}")
        torch.set_num_threads(int(begun))


def same_data(store, branch: int, step: int, fingerprint: str, say: Callable[[str], None]) -> None:
    """Say, and write down as an alert, where a run goes on from ``step`` with other data than it was trained on."""
    known = store.get_meta(DATA)
    if known == fingerprint:
        return
    if known is not None and step:
        text = (f"the training data is not what it was up to step {step}: its text, its tokenizer or the version of "
                "the tokenizers library has changed; training goes on with what is there now")
        store.log_event(branch, step, "alert", {"text": text})
        say(f"{store.path}: {text}")
    store.set_meta(DATA, fingerprint)  # of a run from before this was kept too


def _cpu() -> str:
    """The processor's name where the system tells it."""
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
