"""Whole steps on a device that the host cannot look into: torch's "meta", which has shapes and types and no numbers."""

import sys
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_core.data import Batches, load_tokens
from moe_core.knobs import Knobs
from moe_core.model import experts
from moe_core.records import OnItsWay
from moe_core.trainer import Trainer, resolve_device

META = torch.device("meta")


class WithoutGenerators(TorchFunctionMode):
    """There are none on this device, and what they would give does not matter on it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "generator"})


class OneDevice(TorchDispatchMode):
    """Refuses operators between the host's tensors and the device's; a 0-D tensor of the host's is a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs or {}))
        devices = {t.device.type for t in given if isinstance(t, torch.Tensor) and (t.ndim or t.device == META)}
        assert len(devices) < 2 or "copy" in str(func), f"{func} of {devices}"
        return func(*args, **(kwargs or {}))


class HostGenerator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@pytest.fixture
def crossed(monkeypatch):
    """Makes trainers think of a GPU; gives the shapes of what they sent to the host."""
    shapes = []

    def send(self, vector):
        assert vector.device == META and vector.dtype == torch.float32
        shapes.append(tuple(vector.shape))
        self._there, self._host = None, torch.ones(vector.shape)
    monkeypatch.setattr("moe_core.trainer.resolve_device", lambda config: META)
    monkeypatch.setattr("moe_core.trainer.resolve_dtype", lambda config, device: torch.bfloat16)
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(experts, "is_one_product", lambda rows: True)
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices",
                        lambda: ["cuda", "meta"])
    monkeypatch.setattr(OnItsWay, "__init__", send)
    with WithoutGenerators(), OneDevice():
        yield shapes


@pytest.fixture
def make(tiny, crossed):
    def trainer(**changes):
        config = tiny(eval_interval=0, **changes)
        tokens = load_tokens(config.data, config.model.vocab_size, say=lambda line: None)
        block, batch = config.model.block_size, config.optim.batch_size
        made = Trainer(config, Knobs(config, META), Batches(tokens.train, block, batch, config.seed), [])
        for group in made.optimizer.param_groups:
            group |= {"fused": True} if "fused" in group else {}  # as on a GPU
        return made
    return trainer


def test_all_threads_mean_the_gpu_that_was_present_where_a_run_was_made(tiny, monkeypatch):
    """The present GPU is each thread's own, and a new thread's the first one."""
    present = threading.local()
    present.index = 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(present, "index", 0))
    config, there = tiny(device="auto", seed=987), []
    here = resolve_device(config)
    training = threading.Thread(target=lambda: there.append(resolve_device(config)))
    training.start()
    training.join()
    assert there == [here] == [torch.device("cuda", 1)]


@pytest.mark.parametrize("changes", [
    {}, dict(dropless=False, top_k=2, n_shared_experts=1), dict(optimizer="muon_sophia", sophia_k=1),
    dict(optimizer="muon_adamw", starved_experts="skip", router_scores="sigmoid", top_k=2),
    dict(balance="both", dropout=0.1, bias=True, skip_first_n_moe=1, activation_checkpointing=True,
         gradient_accumulation_steps=2),
    dict(n_experts=0), dict(n_mtp=1), dict(attn_gate="sigmoid_head", n_kv_heads=1)])
def test_a_step_runs_where_its_tensors_are_and_only_its_report_leaves(make, crossed, changes):
    """No tensor of the host's takes part and none is looked at, whether steps are asked ahead or read one by one."""
    trainer = make(**changes)
    trainer.step()
    trainer.runs_ahead = True
    trainer.step(more=True), trainer.step()
    assert len(crossed) == 3 and len(set(crossed)) == 1
    assert all(p.device == META and p.grad.dtype == torch.float32 for p in trainer.model.parameters())


def test_what_looks_at_its_numbers_is_caught(make):
    """The loop over experts, which asks who goes where: it cannot run on such a device."""
    with pytest.raises(NotImplementedError, match="nonzero"):
        make(experts_impl="loop").step()
