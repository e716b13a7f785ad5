"""What each of the legacy training scripts could say: its flags, the fields they mean, and its defaults.

A row names a flag (with underscores; dashes do as well), the field of the config that it sets, and the script's own
default where that is known. A script's ``base`` is the rest: what its description says of the model that it trains.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

from moe_core.config import ALIASES, RunConfig
from moe_core.presets import preset

UNSAID = object()  # no default of the script's own is known
DATASETS = {"c4": "allenai/c4"}  # the hub's old name of it loads no longer
COMPUTE = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32", "none": "float32",
           "off": "float32"}
GROUPED = {True: "grouped", False: "loop"}
WANDB = {True: "wandb", False: ""}


class Flag(NamedTuple):
    """``--name value`` of one script: the ``field`` it sets, and how its values read there.

    ``words``: the field's value for each of the flag's. With keys True and False the flag takes no value and has
    a ``--no-name`` form, as the flag of a yes-or-no field has. ``open``: other values go through as they are.
    """

    name: str
    field: str
    default: Any = UNSAID
    words: Mapping[Any, Any] | None = None
    open: bool = False

    @property
    def is_switch(self) -> bool:
        """Whether it stands without a value."""
        return FIELDS.get(self.field) in (bool, bool | None) if self.words is None else True in self.words


@dataclass(frozen=True)
class Dialect:
    """The command line of one script. ``base``: what holds where no flag says otherwise, flag defaults included."""

    script: str
    flags: dict[str, Flag]
    base: RunConfig
    dashed: bool  # how its flags are written: --d-model or --d_model


def config_fields(part: type = RunConfig) -> dict[str, Any]:
    """Every field that a user names, with its type."""
    found = {}
    for name, hint in typing.get_type_hints(part).items():
        found |= config_fields(hint) if is_dataclass(hint) else {name: hint}
    return found


FIELDS = config_fields()


def _dialect(script: str, dashed: bool, base: RunConfig, rows: list[Flag]) -> Dialect:
    said = {row.field: row.default for row in rows if row.default is not UNSAID}
    return Dialect(script, {row.name: row for row in rows}, base.replace(**said), dashed)


def _same(name: str, default: Any = UNSAID) -> Flag:
    return Flag(name, name, default)


# The top-1 MoE. Mistral's tokenizer of 32768 tokens is that of v0.3. The old rule gave the router's matrix to Muon.
# It compiled where it was told to; here a line that says nothing of it leaves it open.
EXPERIMENTAL = _dialect("train_experimental.py", False, RunConfig().replace(
    tokenizer="mistralai/Mistral-7B-v0.3", balance="aux", top_k=1, router_optimizer="muon"), [
    _same("vocab_size", 32768), _same("n_layer", 10), _same("n_head", 8), _same("n_kv_heads", None),
    _same("d_model", 512), _same("n_experts", 4), _same("block_size", 2048), _same("dropout", 0.0),
    _same("bias", False), _same("capacity_factor", 1.25), _same("dropless", True),
    _same("load_balance_alpha", 0.05), _same("router_z_loss_coef", 0.0), _same("attn_gate", "none"),
    _same("use_rope", True), _same("rope_theta", 10000.0), _same("qk_norm", False), _same("qk_norm_eps", 1e-6),
    Flag("moe_grouped", "experts_impl", words=GROUPED),
    _same("router_temp_init", 1.5), _same("router_temp_final", 1.0), _same("router_temp_anneal_iters", 1000),
    _same("router_noise_std_init", 0.5), _same("router_noise_decay_iters", 1000),
    _same("router_noise_type", "gumbel"),
    _same("device", "cuda"), _same("batch_size", 8), _same("gradient_accumulation_steps", 1),
    _same("max_iters", 2000), _same("eval_interval", 200), _same("eval_iters", 50), _same("learning_rate", 3e-4),
    _same("min_lr", 3e-5), _same("weight_decay", 0.1), _same("beta1", 0.9), _same("beta2", 0.95),
    _same("warmup_iters", 500), _same("lr_decay_iters", 2000), _same("grad_clip", 1.0), _same("compile"),
    _same("seed", 1337),
    _same("optimizer", "adamw"), _same("muon_lr", 3e-2), _same("muon_wd", 1e-2), _same("sophia_lr", 1e-3),
    _same("sophia_b1", 0.965), _same("sophia_b2", 0.99), _same("sophia_rho", 0.1), _same("sophia_wd", 0.2),
    _same("sophia_k", 10),
    Flag("dataset_name", "dataset_name", "HuggingFaceFW/fineweb-edu", DATASETS, open=True),
    _same("dataset_config", "sample-10BT"), _same("text_key", "text"), _same("shuffle_buffer", 8192),
    _same("eval_take", 512),
    _same("checkpoint_dir", "checkpoints_moe_bf16"), _same("log_interval", 10), _same("save_interval", 0),
    _same("keep_checkpoints", 3), _same("resume"), _same("auto_resume", False),
    _same("wandb_project", "moe-bf16-experiments_v2"), _same("wandb_run_name", None)])

# The dense shoot-out. Of its defaults only those of one known command line.
DENSE = _dialect("train_dense_gpu.py", True, preset("dense-107m", router_optimizer="muon"), [
    Flag("dataset", "dataset_name", "allenai/c4", DATASETS, open=True), _same("dataset_config", "en"),
    _same("split", "train"), _same("val_split", "validation"), _same("tokenizer", "gpt2"),
    Flag("layers", "n_layer"), Flag("heads", "n_head"), _same("d_model"), _same("block_size"),
    Flag("batch", "batch_size"), Flag("grad_accum", "gradient_accumulation_steps"), Flag("steps", "max_iters"),
    Flag("ckpt", "activation_checkpointing"), _same("compile"), Flag("amp", "compute_dtype", words=COMPUTE),
    _same("opt_list"), _same("num_workers", 4), _same("prefetch_factor", 8), _same("shuffle_buffer", 4000),
    Flag("val_every", "eval_interval", 200), Flag("val_iters", "eval_iters", 50), _same("csv"), _same("qk_norm"),
    Flag("clip_grad", "grad_clip"), Flag("k_hess", "sophia_k"), Flag("k_hess_after", "sophia_k_after"),
    Flag("k_hess_switch_step", "sophia_k_switch_step")])

# The top-2 MoE, on arrays of tokens.
LAUNCH = _dialect("launch_training.py", True, preset("moe-top2", beta1=0.9, beta2=0.95), [
    _same("vocab_size", 50257), Flag("dim", "d_model", 512), Flag("n_layers", "n_layer", 8),
    Flag("n_heads", "n_head", 8), _same("n_kv_heads", 2), Flag("num_experts", "n_experts", 8), _same("top_k", 2),
    _same("skip_first_n_moe", 0), _same("batch_size", 4), _same("gradient_accumulation_steps", 16),
    Flag("max_steps", "max_iters", 10000), _same("learning_rate", 3e-4), _same("weight_decay", 0.1),
    Flag("warmup_steps", "warmup_iters", 2000), _same("grad_clip", 1.0), Flag("train_data", "dataset_name"),
    _same("val_data"), Flag("seq_len", "block_size", 512), _same("resume"),
    Flag("use_wandb", "mirrors", words=WANDB), _same("wandb_project"), _same("wandb_run_name")])

DIALECTS = {d.script: d for d in (EXPERIMENTAL, DENSE, LAUNCH)}
# A field of the config goes by its own name everywhere; so do these.
ANYWHERE = {name: Flag(name, name) for name in FIELDS}
ANYWHERE |= {name: Flag(name, field) for name, field in ALIASES.items()} | {"run": Flag("run", "checkpoint_dir")}
