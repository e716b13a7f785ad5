"""Named starting points: ``preset("nano")``."""

from __future__ import annotations

from moe_core.config import ConfigError, RunConfig

PRESETS: dict[str, dict] = {
    # A MoE for a laptop CPU: a step takes tens of milliseconds, the 400 planned ones about a minute.
    "nano": dict(
        n_layer=4, d_model=128, n_head=4, n_experts=8, expert_width=352, block_size=128, vocab_size=4096,
        qk_norm=True, attn_gate="sigmoid_head", batch_size=8, learning_rate=3e-3, min_lr=3e-4, warmup_iters=40,
        lr_decay_iters=400, max_iters=400, load_balance_alpha=0.02, router_temp_anneal_iters=200,
        router_noise_decay_iters=200, eval_interval=25, eval_iters=8),
    # The top-1 MoE of the legacy training scripts (moe_core.dialects): temperature 2.2 to 1.3, noise 0.9, alpha 0.12.
    "moe-203m": dict(
        n_layer=10, d_model=512, n_head=8, n_experts=8, expert_width=1408, block_size=2048, vocab_size=32768,
        qk_norm=True, attn_gate="sigmoid_head", batch_size=8, gradient_accumulation_steps=8, learning_rate=8e-4,
        min_lr=3e-5, warmup_iters=1000, lr_decay_iters=8000, max_iters=8000, load_balance_alpha=0.12,
        router_z_loss_coef=1e-3, router_temp_init=2.2, router_temp_final=1.3, router_temp_anneal_iters=5000,
        router_noise_std_init=0.9, router_noise_decay_iters=5000),
    # Their small top-2 MoE, balanced by a bias instead of a loss.
    "moe-top2": dict(
        n_layer=8, d_model=512, n_head=8, n_kv_heads=2, n_experts=8, top_k=2, norm_topk_prob=True, block_size=512,
        vocab_size=50257, balance="bias", batch_size=4, gradient_accumulation_steps=16, warmup_iters=2000,
        lr_decay_iters=10000, max_iters=10000, router_temp_init=1.0, router_temp_final=1.0,
        router_noise_std_init=0.0),
    # The dense model of their optimizer comparison.
    "dense-107m": dict(
        n_layer=12, d_model=704, n_head=11, n_experts=0, mlp="gelu", block_size=1024, vocab_size=50257,
        use_rope=False, batch_size=8, gradient_accumulation_steps=2, warmup_iters=100, lr_decay_iters=500,
        max_iters=500),
}


def preset(name: str, **changes) -> RunConfig:
    """A named starting point with any fields changed: ``preset("nano", n_experts=16)``. Raises ConfigError.

    ``name``: "nano", a MoE for a laptop CPU; "moe-203m", top-1, "moe-top2", balanced by a bias, and "dense-107m", all
    three for a GPU.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset = {name!r}: must be one of {', '.join(map(repr, PRESETS))}")
    return RunConfig().replace(**PRESETS[name]).replace(**changes)
