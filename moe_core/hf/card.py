"""The model card of an exported run: what its store knows, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

from moe_core import health, origin, provenance
from moe_core.config import RunConfig
from moe_core.data.source import kind_of
from moe_core.model import count_params
from moe_core.probe import Weights
from moe_core.twins import active_params

NAMES = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE", "qwen3_next": "Qwen3-Next (full attention everywhere)"}
MODEL = ("n_layer", "d_model", "n_head", "block_size", "vocab_size", "n_experts", "top_k", "norm_topk_prob",
         "skip_first_n_moe", "rope_theta")
TRAINING = ("optimizer", "learning_rate", "batch_size", "gradient_accumulation_steps", "balance", "load_balance_alpha",
            "router_z_loss_coef", "seed")
ROUTING = {"router/max_frac_max": "largest share of an expert, of the worst layer",
           "router/active_min": "experts with a token, of the worst layer",
           "router/entropy_mean": "entropy of the router's probabilities, nats",
           "router/top1_p_mean": "probability of the first choice",
           "router/balance_mean": "balance loss, 1 when even, E/K when collapsed",
           "router/drop_frac_mean": "share of assignments dropped in training",
           "router/collapsed": "collapsed (1 is yes)"}
PLACES = {"stdlib": "the source code of the Python standard library"}


def card(run, weights: Weights, form: str, has_tokenizer: bool) -> str:
    """Markdown, with the front matter of the hub, of ``run`` (or a ``Saved``) at the step of its ``weights``."""
    config, line, step = run.config, run._branch, weights.step
    written = config.replace(n_mtp=0)  # what is exported
    rows = run.store.read_steps(line.id, shares=False)
    last = {name: _newest(rows, name, step) for name in ("train/ce", "val/loss", *ROUTING)}
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- mixture-of-experts\n---",
        f"# {_code(run.store.path.name)}",
        f"A mixture-of-experts language model in the form of {NAMES[form]}: {count_params(written.model):,} "
        f"parameters, of which the matrices that are active for a token hold {active_params(written):,}.",
        _use(has_tokenizer),
        "## Training",
        _table([("data", _data(config)), ("steps", f"{step:,}"), ("branch", _code(line.name)),
                ("tokens seen", f"{step * config.tokens_per_step:,}"),
                *((name, _code(value)) for name, value in _named(config, TRAINING)),
                *((name, f"{value[1]:.4f} (step {value[0]:,})") for name, value in last.items()
                  if value is not None and name in ("train/ce", "val/loss"))]),
        "Both losses are mean cross-entropy in nats a token; `train/ce` is of one step's batch, `val/loss` of held-out "
        "text." if last["val/loss"] is not None else "`train/ce` is the mean cross-entropy of one step's batch, in "
        "nats a token.",
        *_parent(run),
        "## Model", _table([(name, _code(value)) for name, value in _named(config, MODEL)]),
        *_changes(config, weights.knobs["router_temp"]),
        "## Routing",
    ]
    shown = [(words, f"{last[name][1]:.4g}") for name, words in ROUTING.items() if last[name] is not None]
    parts += [_table(shown), f"Of the batch of step {step:,}."] if shown else ["No step was trained."]
    found = health.read(run.store, line.id, step, weights.knobs, config) if len(rows) else []
    parts += ["\n".join(f"- {finding.level}: {_plain(finding.text)}" for finding in found)] if found else []
    made = run.store.get_meta(provenance.META) or {}
    if made:
        parts += ["## Made with", _table([(f"{what}: {name}", _code(value)) for what, values in made.items()
                                          for name, value in values.items()])]
    return "\n\n".join(parts) + "\n"


def _use(has_tokenizer: bool) -> str:
    lines = ["from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else ""), "",
             'model = AutoModelForCausalLM.from_pretrained("this folder")']
    if has_tokenizer:
        lines += ['tokenizer = AutoTokenizer.from_pretrained("this folder")',
                  'ids = tokenizer("a prompt", return_tensors="pt", add_special_tokens=False)',
                  "print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))"]
    return "\n".join(["```python", *lines, "```"])


def _data(config: RunConfig) -> str:
    data = config.data
    name = data.dataset_name if kind_of(data) == "hub" else Path(data.dataset_name).name  # no place on a disk
    said = PLACES.get(data.dataset_name) or _code(name)
    said += f", {_code(data.dataset_config)}" if data.dataset_config else ""
    return said + (f", split {_code(data.split)}" if data.split != "train" else "")


def _parent(run) -> list[str]:
    parent = run.store.get_meta(origin.PARENT)
    if parent is None:
        return []
    began = "began with" if origin.words(parent).startswith("weights") else "was"
    return [f"It {began} {origin.words(parent)} {_code(Path(parent['path']).name)}{origin.at_step(parent)}."]


def _changes(config: RunConfig, temp: float) -> list[str]:
    said = []
    if temp != 1.0:
        said.append(f"- The router's temperature of {temp:g} is taken into its weight.")
    if config.model.n_mtp:
        said.append(f"- Trained with {config.model.n_mtp} heads for tokens further on, which are left out.")
    if not config.router.dropless:
        said.append(f"- In training an expert took `capacity_factor` {config.router.capacity_factor:g} times its even "
                    "share of a batch and the rest was dropped; here nothing is dropped.")
    return ["\n".join(said)] if said else []


def _named(config: RunConfig, names: tuple[str, ...]) -> list[tuple[str, object]]:
    values = config.flat()
    return [(name, values[name]) for name in names]


def _newest(rows, name: str, step: int) -> tuple[int, float] | None:
    """(step, value) of the last that was measured up to ``step``."""
    if name not in rows.names:
        return None
    known = [(at, value) for at, value in zip(rows.steps.tolist(), rows.column(name).tolist(), strict=True)
             if at <= step and not math.isnan(value)]
    return known[-1] if known else None


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _plain(text: str) -> str:
    """One line that is neither markup nor a link."""
    return "".join(f"\\{char}" if char in "\\`*[]<>|#" else char for char in " ".join(text.split()))


def _code(value) -> str:
    """A value as code in a table's cell, whatever is in it."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"
