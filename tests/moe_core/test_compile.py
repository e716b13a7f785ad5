"""The trainer under torch.compile: what it compiles, what compiles nothing more, and what it does where it cannot."""

import functools
import os

import pytest
import torch
from small_models import TINY, batch, gradients, lively, measured, rng, total
from torch._dynamo.utils import counters

from moe_core import ConfigError
from moe_core.compiled import LONG, compiled, pays
from moe_core.model import RouterControls, draw_noise


@pytest.fixture
def make(make):
    return lambda **changes: make(**{"n_layer": 1, "eval_interval": 2, **changes})


@pytest.fixture
def backend(monkeypatch):
    """Has torch compile with another backend than its code generator, which takes minutes."""
    torch._dynamo.reset()
    counters.clear()
    return lambda chosen: monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=chosen))


def about(numbers):
    """Up to what float32 rounds: a compiled norm is composed of other operations than one that is not."""
    return pytest.approx(numbers, rel=1e-5, abs=1e-6)


def graphs():
    return counters["stats"]["unique_graphs"]


def test_turning_a_knob_recompiles_nothing():
    """One graph without breaks serves every value of every control, and gives eager's numbers and gradients."""
    config = TINY.replace(dropless=False)
    model, (tokens, targets) = lively(config, compute_dtype=torch.bfloat16), batch(config)
    noise = draw_noise("gumbel", (3, tokens.numel(), 4), rng())
    torch._dynamo.reset()
    run = torch.compile(model.compute, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for values in ((1.0, 0.0, 1.25), (1.3, 0.5, 1.0), (0.7, 2.0, 0.4)):
            controls = RouterControls.constant(*values)
            output = run(tokens, targets, controls, noise)
            eager = model.compute(tokens, targets, controls, noise)
            torch.testing.assert_close(output.losses, eager.losses)
            got, expected = (gradients(model, total(one)) for one in (output, eager))
            assert all((got[name] - expected[name]).norm() <= 0.02 * expected[name].norm() for name in expected)


def test_three_graphs_serve_every_step_knob_and_model_with_eagers_numbers(make, backend):
    """One to train, one to validate, one for Hessian passes; turned knobs, a moved balance bias and a second model
    of the same config compile nothing more, and every number is about that of a trainer without. In float32, where
    torch's own grouped product cannot be traced."""
    backend("aot_eager")
    changes = dict(compute_dtype="float32", dropless=False, balance="both", top_k=2, dropout=0.1, optimizer="sophia",
                   sophia_k=1, gradient_accumulation_steps=2, bias_update_speed=0.05)
    plain, one = make(**changes), make(compile=True, **changes)

    def turn_and_step(trainer, step):
        if step > 2:
            for name, value in (("router_temp", 1 + step / 10), ("router_noise_std", step / 5), ("lr_scale", 0.5),
                                ("capacity_factor", 0.5), ("load_balance_alpha", 0.1), ("bias_update_speed", 0.01)):
                trainer.knobs[name].turn("hold", value, None, step)
        record = trainer.step()
        assert record.alerts == ()
        return measured(record)
    for step in range(1, 5):
        assert turn_and_step(one, step) == about(turn_and_step(plain, step))
        assert graphs() == min(2 * step - 1, 3)  # from step 2 on there is a validation, and a Hessian pass
    state, another = one.state_dict(), make(compile=True, **changes)
    another.load_state_dict(state)
    assert turn_and_step(another, 5) == about(turn_and_step(plain, 5))
    assert turn_and_step(another, 6) == about(turn_and_step(plain, 6))
    assert graphs() == 3


def test_recomputed_blocks_are_part_of_the_graph(make, backend):
    """Activation checkpointing under compile: one graph, eager's numbers."""
    backend("aot_eager")
    plain, one = make(eval_interval=0), make(eval_interval=0, compile=True, activation_checkpointing=True)
    for _ in range(2):
        assert measured(one.step()) == about(measured(plain.step()))
    assert graphs() == 1


def test_where_torch_cannot_compile_the_run_goes_on_without_and_says_so(make, backend):
    """The step is taken again from the same batch and random numbers, and the alert comes once."""
    def broken(graph, inputs):
        raise RuntimeError("no compiler was found\nat all")
    backend(broken)
    plain, one = make(dropout=0.1), make(compile=True, dropout=0.1)
    records = [one.step() for _ in range(3)]
    assert [measured(record) for record in records] == [measured(plain.step()) for _ in range(3)]
    alert, = records[0].alerts
    assert alert.startswith("compile: torch could not compile the model, so it runs without: ")
    assert "no compiler was found" in alert and "\n" not in alert
    assert records[1].alerts == records[2].alerts == ()


def test_an_error_of_the_model_is_not_taken_for_the_compilers(make, backend):
    """It comes out as it is, without a second try."""
    backend("eager")
    trainer = make(compile=True)
    trainer.step()
    trainer.train.next = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.step()


def test_the_alert_reaches_the_runs_events(tiny_run, backend):
    def broken(graph, inputs):
        raise RuntimeError("no compiler was found")
    backend(broken)
    run = tiny_run(n_layer=1, compile=True)
    run.step(2)
    alert, = run.events().query("kind == 'alert'").itertuples()
    assert alert.step == 1 and "no compiler was found" in alert.text


def test_left_open_only_a_gpu_or_a_long_run_is_compiled(tiny):
    """On a CPU by the work of all steps together; the user's own word stands, and what cannot be compiled is not."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    config = tiny(max_iters=1000, lr_decay_iters=1000)
    short, long = (work / (1000 * config.tokens_per_step) for work in (0.99 * LONG, 1.01 * LONG))
    assert [pays(config, device, work) for device in (gpu, cpu) for work in (short, long)] == [True, True, False, True]
    assert pays(config.replace(compile=True), cpu, short)
    assert not pays(config.replace(compile=False), gpu, long)
    assert not pays(config.replace(experts_impl="loop"), gpu, long)
    assert not pays(config.replace(routing="expert", dropless=False, balance="none"), gpu, long)


def test_compiled_code_is_kept_where_the_user_can_write(tmp_path, monkeypatch):
    """In the cache's folder; else where torch chooses; and where the user says, whatever else."""
    blocked = tmp_path / "file"
    blocked.touch()

    def chosen(cache, said=None):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if said is not None:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", said)
        compiled(lambda x: x)
        return os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    assert chosen(tmp_path) == str(tmp_path / "moe-workbench" / "compiled")
    assert not chosen(blocked / "x").startswith(str(tmp_path))
    assert chosen(tmp_path, str(tmp_path / "mine")) == str(tmp_path / "mine")


def test_the_loop_over_experts_is_refused_under_compile(tiny):
    with pytest.raises(ConfigError, match="compile = True: must be False for experts_impl = 'loop'"):
        tiny(compile=True, experts_impl="loop")
    tiny(compile=True, experts_impl="loop", n_experts=0)


@pytest.mark.parametrize("dtype, expected", [("auto", torch.float32), ("float32", torch.float32),
                                             ("bfloat16", torch.bfloat16)])
def test_compute_dtype_is_that_of_activations_and_never_of_weights(make, dtype, expected):
    """On a CPU "auto" is float32; in bfloat16 the first loss is that of float32 within its rounding."""
    trainer = make(compute_dtype=dtype)
    out = trainer._forward(trainer.train.next()[:, :-1], controls=trainer._controls(), generator=trainer.noise)
    assert out.logits_BSV.dtype == expected
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    exact, near = make(compute_dtype="float32").step().metrics, make(compute_dtype=dtype).step().metrics
    assert near["train/ce"] == pytest.approx(exact["train/ce"], rel=5e-3)
    assert (near["train/ce"] == exact["train/ce"]) == (expected == torch.float32)
