"""A step that is not finite, or does not fit, leaves the run as it was, says where, and can be followed by another."""

import copy
import math

import pytest
import torch
from small_models import measured, weights

import moe_core as mc
from moe_core.faults import memory_limit
from moe_core.trainer import MemoryLimitError, NonFiniteError

# Where: the module whose weight is spoilt, and with what; the term; the words.
SPOILT = {
    "embedding": ("embed", math.nan, "train/ce", "the embedding$"),
    "attention": ("blocks.1.attn.v_proj", math.inf, "train/ce", "block 1, attention$"),
    "attention's norm": ("blocks.1.attn_norm", math.nan, "train/ce", "block 1, attention$"),
    "router": ("blocks.1.mlp.router", math.nan, "train/ce", "block 1, router$"),
    "experts": ("blocks.1.mlp.experts.w_down", math.nan, "train/ce", "block 1, experts$"),
    "final norm": ("norm", math.inf, "train/ce", "the final norm$"),
    "learned positions": ("positions", math.nan, "train/ce", "the learned positions$"),
    "head further on": ("mtp.1.mlp.down_proj", math.nan, "train/mtp", "head 2 for tokens further on, MLP$"),
}


@pytest.mark.parametrize("path, value, term, where", SPOILT.values(), ids=SPOILT)
def test_a_step_that_is_not_finite_is_refused_and_says_where_it_began(make, path, value, term, where):
    """One weight spoilt: term and first place; weights, next batch and noise are as before, and refusals count."""
    more = {"positions": dict(use_rope=False), "mtp": dict(n_mtp=2)}.get(path.partition(".")[0], {})
    trainer, twin = make(dropout=0.1, **more), make(dropout=0.1, **more)
    trainer.step(), twin.step()
    weight = trainer.model.get_parameter(path if path.endswith("w_down") else f"{path}.weight")
    token = int(trainer.train.next()[0, 3])  # one that the next batch has
    trainer.train.load_state_dict(twin.train.state_dict())
    kept, spot = weight.detach().clone(), (token, 5) if path == "embed" else (0,) * weight.ndim
    with torch.no_grad():
        weight[spot] = value
    before = weights(trainer)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=rf"^step 2: {term} is (nan|inf); the step was not applied. "
                                                 rf"First not finite: {where}") as refused:
            trainer.step()
    assert (refused.value.step, refused.value.term) == (2, term)
    torch.testing.assert_close(weights(trainer), before, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        weight.copy_(kept)
    again = trainer.step()
    assert measured(again, "grad/skipped_cum") == measured(twin.step(), "grad/skipped_cum")
    assert again.metrics["grad/skipped_cum"] == 2


def test_of_a_dense_block_before_routed_ones_and_of_accumulated_batches_it_says_which(make):
    """Blocks count from 0 in the model; a routed one also says its layer in the metrics, and the micro-batch."""
    trainer = make(skip_first_n_moe=1, gradient_accumulation_steps=3)
    for path, words in (("blocks.1.mlp.router.weight", r"block 1 \(layer 0 of the metrics\), router"),
                        ("blocks.0.mlp.down_proj.weight", "block 0, MLP")):
        with torch.no_grad():
            trainer.model.get_parameter(path).fill_(math.nan)
        with pytest.raises(NonFiniteError, match=f"First not finite: {words}, in micro-batch 1 of 3$"):
            trainer.step()


def test_a_gradient_alone_that_overflows_is_named_by_the_first_parameter_a_backward_pass_meets(make):
    """The forward pass is finite; the gradient behind block 1's experts is not, and all before it catch it."""
    trainer, twin = make(), make()
    trainer.step(), twin.step()
    hook = trainer.model.blocks[1].mlp.experts.w_up.register_hook(lambda grad: grad * math.inf)
    other = trainer.model.blocks[0].attn.q_proj.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFiniteError, match=r"step 2: grad/norm is (nan|inf); .* the gradient of "
                                             r"blocks\.1\.mlp\.experts\.w_up$"):
        trainer.step()
    hook.remove(), other.remove()
    assert measured(trainer.step(), "grad/skipped_cum") == measured(twin.step(), "grad/skipped_cum")


def test_gradients_that_only_together_are_too_large_are_said_so(make):
    """Each finite in float32, their norm not."""
    trainer = make()
    for p in trainer.model.parameters():
        p.register_hook(lambda grad: torch.full_like(grad, 3e37))
    with pytest.raises(NonFiniteError, match="no single gradient, only the norm of all of them"):
        trainer.step()


def test_the_count_of_refusals_belongs_to_the_line_and_is_replayed(tiny_run):
    """Rows after a refusal say 1, on this line only; reopened, rewound and replayed runs say the same."""
    run = tiny_run()
    run.step(3)
    hook = run._trainer.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFiniteError):
        run.step(2)
    assert (run.session.state, run.current_step) == ("paused", 3)
    hook.remove()
    run.step(3)
    assert run.metrics()["grad/skipped_cum"].tolist() == [0, 0, 0, 1, 1, 1]
    assert (run.replay()["largest"] == 0).all()
    run.rewind(5)
    run.step(1)
    assert run.metrics()["grad/skipped_cum"].tolist() == [0, 0, 0, 1, 1, 1]
    run.rewind(3)  # before the refusal
    run.step(1)
    assert run.metrics()["grad/skipped_cum"].tolist() == [0, 0, 0, 0]
    run.switch("main")
    run._save()
    run.close()
    again = mc.Run.open(run.path)
    again.step(1)
    assert again.metrics()["grad/skipped_cum"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    again.close()


def full(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_step_that_does_not_fit_says_what_to_lower_and_gives_its_memory_back(make, tiny):
    """Everything is as before the step: the same trainer takes it later, with the numbers of one that never failed.
    What it names leaves a step its tokens.
    """
    said = str(memory_limit("step 1", tiny(batch_size=9, activation_checkpointing=True), torch.device("cpu")))
    assert "Lower batch_size = 9 to 3 with gradient_accumulation_steps = 1 raised to 3, " in said
    assert "activation_checkpointing" not in said
    trainer, twin = make(gradient_accumulation_steps=3), make(gradient_accumulation_steps=3)
    trainer.step(), twin.step()
    calls = iter(range(3))
    hook = trainer.model.blocks[1].mlp.register_forward_hook(lambda *a: full() if next(calls) == 2 else None)
    with pytest.raises(MemoryLimitError) as refused:
        trainer.step()
    assert str(refused.value) == (
        "step 2 was not applied: out of memory. Lower batch_size = 4 to 2 with gradient_accumulation_steps = 3 raised "
        "to 6, which leaves a step its tokens, or block_size = 32, or set activation_checkpointing = True; "
        "run.fork(path, batch_size=...) goes on from here")
    assert all(p.grad is None for p in trainer.model.parameters())
    assert refused.value.__cause__ is refused.value.__context__ is None  # they would hold the pass's tensors
    hook.remove()
    again = trainer.step()
    assert measured(again, "grad/skipped_cum") == measured(twin.step(), "grad/skipped_cum")
    assert again.metrics["grad/skipped_cum"] == 0  # that is of refused numbers


def test_a_smaller_batch_goes_on_in_the_same_process_from_the_same_tokens(make):
    """Half the sequences a micro-batch and twice as many of them: state and data go on; the loss is the same."""
    plain = dict(load_balance_alpha=0.0, router_noise_std_init=0.0)
    whole, smaller = make(**plain), make(**plain, batch_size=2, gradient_accumulation_steps=2)
    whole.step()
    with torch.no_grad():
        state = whole.state_dict()
        smaller.load_state_dict(state)
    a, b = whole.step().metrics, smaller.step().metrics
    for name in ("train/ce", "grad/norm", "train/tokens_b", "router/max_frac_mean"):
        assert b[name] == pytest.approx(a[name], rel=1e-5), name


def test_an_update_that_does_not_fit_sends_the_run_back_to_what_it_saved(tiny_run):
    """Its weights are half-way, so they are never stepped, saved or shown again; the chunk's start is at hand."""
    run, twin = tiny_run("run"), tiny_run("twin")
    for each in (run, twin):
        each.step(2)
    trainer = run._trainer
    trainer.optimizer.register_step_post_hook(full)
    with pytest.raises(MemoryLimitError, match="step 3 was cut short in its update: out of memory"):
        run.step(2)
    assert run.session.state == "paused" and not trainer.whole
    with pytest.raises(RuntimeError, match=r"cut short.*load a saved state"):
        trainer.step()
    trainer.load_state_dict(copy.deepcopy(twin._trainer.state_dict()))
    assert trainer.whole
    for each in (run, twin):
        each.step(2)
    assert run.branch == "main"
    assert run.metrics().filter(regex="^(?!perf/)").equals(twin.metrics().filter(regex="^(?!perf/)"))


def test_a_validation_that_does_not_fit_loses_no_row(tiny_run):
    """The step is done: its row is there without val/loss, and an alert says why, once."""
    run = tiny_run(eval_interval=2)
    run.step(1)
    run._trainer.evaluate = full
    run.step(2)
    assert run.current_step == 3 and math.isnan(run.metrics()["val/loss"][2])
    alert, = run.events().query("kind == 'alert'")["text"]
    assert alert.startswith("no val/loss: the validation after step 2 did not fit: out of memory. Lower batch_size")
