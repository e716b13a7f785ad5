"""Models that spend as much on a token as each other, dense and MoE, coarse and finer: counted."""

import pytest

from moe_core import ConfigError, preset
from moe_core.model.size import flops_per_token
from moe_core.twins import active_params, finer, moe_twin, total_params


@pytest.mark.parametrize("name, changes", [
    ("nano", {}), ("nano", {"n_experts": 16}), ("nano", {"top_k": 2, "norm_topk_prob": True}), ("dense-107m", {}),
    ("dense-107m", {"n_experts": 32, "top_k": 4}),
    ("nano", {"n_shared_experts": 1})])
def test_a_twin_multiplies_a_token_with_as_many_weights(name, changes):
    """Within 1 % of all, and of those in the blocks alone; nothing but the MLPs differs."""
    dense = preset(name, n_experts=0, expert_width=None)
    twin = moe_twin(dense, **changes)
    assert twin.model.n_experts == changes.get("n_experts", 8)
    assert active_params(twin) == pytest.approx(active_params(dense), rel=0.01)
    head = dense.model.vocab_size * dense.model.d_model
    assert active_params(twin) - head == pytest.approx(active_params(dense) - head, rel=0.01)
    same = ("vocab_size", "n_layer", "d_model", "n_head", "block_size", "use_rope", "attn_gate")
    assert all(getattr(twin.model, field) == getattr(dense.model, field) for field in same)
    assert (twin.data, twin.optim) == (dense.data, dense.optim)


def test_active_weights_of_a_small_model_by_hand():
    """Dense: 2 layers of 4 D D + 3 D F, and V D. MoE: K of its E experts, and the router's D E."""
    dense = preset("nano", n_experts=0, n_layer=2, d_model=32, n_head=2, mlp_width=96, vocab_size=100, attn_gate="none")
    assert active_params(dense) == 2 * (4 * 32**2 + 3 * 32 * 96) + 100 * 32
    moe = dense.replace(n_experts=4, expert_width=40, top_k=2, norm_topk_prob=True)
    assert active_params(moe) == 2 * (4 * 32**2 + 2 * 3 * 32 * 40 + 32 * 4) + 100 * 32
    assert active_params(moe.replace(n_shared_experts=3)) - active_params(moe) == 2 * 3 * 3 * 32 * 40


@pytest.mark.parametrize("changes", [{}, dict(n_shared_experts=1), dict(top_k=2, norm_topk_prob=True, bias=False),
                                     dict(skip_first_n_moe=2)])
@pytest.mark.parametrize("times", [2, 4])
def test_finer_experts_hold_and_meet_as_many_weights(changes, times):
    """Counted on the models: a token meets, and the model holds, more by the router's new rows and by nothing else."""
    coarse = preset("nano", **changes)
    fine = finer(coarse, times)
    m, rows = fine.model, (times - 1) * 8 * coarse.model.d_model * coarse.model.n_moe_layer
    assert (m.n_experts, fine.router.top_k, times * m.ff_width) == (8 * times, coarse.router.top_k * times, 352)
    assert active_params(fine) - active_params(coarse) == rows
    biases = (times - 1) * 8 * coarse.model.n_moe_layer
    assert total_params(fine) - total_params(coarse) == rows + biases
    assert flops_per_token(m, fine.router.top_k) - flops_per_token(coarse.model, coarse.router.top_k) == 6 * rows


def test_what_cannot_be_made_finer_is_refused():
    for config, times, said in ((preset("nano"), 3, r"times = 3: expert_width = 352 must be a multiple of 24"),
                                (preset("nano"), True, "times = True: must be an integer"),
                                (preset("dense-107m"), 2, "n_experts = 0: must be at least 1")):
        with pytest.raises(ConfigError, match=said):
            finer(config, times)
