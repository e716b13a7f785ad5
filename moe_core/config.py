"""What a run is: frozen dataclasses, checked field by field the moment they are made.

Every field name is unique over all of them, so a user names a field and never its dataclass:
``preset("nano", n_experts=16, learning_rate=1e-3)``. A field's meaning and range stand beside its default,
and in ``help()``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from moe_core.checked import Checked, ConfigError, documented, field_of

OPTIMIZERS = ("adamw", "muon_adamw", "muon_sophia", "sophia")
MIRRORS = ("wandb", "tensorboard", "trackio")


@documented
@dataclass(frozen=True)
class ModelConfig(Checked):
    """The architecture. ``n_experts=0`` makes every block dense."""

    vocab_size: int = field_of(32768, "rows of the embedding; with a named tokenizer, set from it", ge=2)
    n_layer: int = field_of(10, "blocks", ge=1)
    n_head: int = field_of(8, "attention heads", ge=1)
    n_kv_heads: int | None = field_of(None, "heads of keys and values; None: n_head (no GQA)", ge=1)
    d_model: int = field_of(512, "model width", ge=8)
    block_size: int = field_of(2048, "tokens in a sequence", ge=2)
    n_experts: int = field_of(8, "routed experts per block; 0: a dense model", ge=0)
    skip_first_n_moe: int = field_of(0, "dense blocks before the first routed one", ge=0)
    expert_width: int | None = field_of(
        None, "hidden width of an expert; None: 2.75 d_model, rounded up to a multiple of 8", ge=1)
    n_shared_experts: int = field_of(0, "experts of expert_width beside the routed ones, for every token", ge=0)
    mlp: str = field_of("swiglu", "MLP of a dense block", choices=("swiglu", "gelu"))
    mlp_width: int | None = field_of(
        None, "hidden width of a dense block; None: 2.75 d_model (swiglu) or 4 d_model (gelu)", ge=1)
    attn_gate: str = field_of("none", "gate on the attention output", choices=("none", "sigmoid_head"))
    qk_norm: bool = field_of(False, "RMSNorm of each head's queries and keys")
    qk_norm_eps: float = field_of(1e-6, "epsilon of that norm", gt=0)
    use_rope: bool = field_of(True, "rotary positions; False: learned positions")
    rope_theta: float = field_of(10000.0, "base of the rotary frequencies", gt=0)
    norm_eps: float = field_of(1e-6, "epsilon of every other RMSNorm", gt=0)
    dropout: float = field_of(0.0, "of the embedding and of what each block adds, in training only", ge=0, lt=1)
    bias: bool = field_of(False, "biases in every linear layer, experts included, except the router")
    n_mtp: int = field_of(0, "extra heads while training; the k-th predicts k tokens further ahead", ge=0)
    router_bias: bool = field_of(True, "bias of the router's logits; export to Hugging Face needs False")

    def _check(self):
        if self.n_experts and self.skip_first_n_moe >= self.n_layer:
            raise ConfigError(f"skip_first_n_moe = {self.skip_first_n_moe}: must be less than n_layer = {self.n_layer}")
        if self.n_mtp >= self.block_size:
            raise ConfigError(f"n_mtp = {self.n_mtp}: must be less than block_size = {self.block_size}")
        if self.n_shared_experts and not self.n_experts:
            raise ConfigError(f"n_shared_experts = {self.n_shared_experts}: must be 0 where n_experts = 0; they stand "
                              "beside experts that a router picks")
        if self.d_model % self.n_head:
            raise ConfigError(f"d_model = {self.d_model}: must be divisible by n_head = {self.n_head}")
        if self.n_head % self.kv_heads:
            raise ConfigError(f"n_kv_heads = {self.n_kv_heads}: must divide n_head = {self.n_head}")
        if self.use_rope and self.head_dim % 2:
            raise ConfigError(f"d_model = {self.d_model}: d_model / n_head must be even for rotary positions")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: ``n_kv_heads``, or as many as ``n_head``."""
        return self.n_kv_heads or self.n_head

    @property
    def n_moe_layer(self) -> int:
        """Blocks with experts, the L of shares and router metrics; layer 0 there is the first routed block."""
        return self.n_layer - self.skip_first_n_moe if self.n_experts else 0

    @property
    def ff_width(self) -> int:
        """Width of one expert, or of the MLP of a dense model."""
        if not self.n_experts:
            return self.dense_width
        return self.expert_width or math.ceil(2.75 * self.d_model / 8) * 8

    @property
    def shared_width(self) -> int:
        """Width of a layer's shared experts together, which are one MLP."""
        return self.n_shared_experts * self.ff_width

    @property
    def dense_width(self) -> int:
        """Width of the MLP of a dense block: of every block of a dense model, of the first few of a routed one."""
        return self.mlp_width or (4 * self.d_model if self.mlp == "gelu" else math.ceil(2.75 * self.d_model / 8) * 8)


@documented
@dataclass(frozen=True)
class RouterConfig(Checked):
    """How tokens choose experts, and the schedules of what a knob can turn. Unused when dense."""

    routing: str = field_of(
        "token", "who chooses: each token its experts, or each expert its tokens", choices=("token", "expert"))
    top_k: int = field_of(1, "experts per token; where experts choose, the average at capacity_factor = 1", ge=1)
    router_scores: str = field_of("softmax", "what weighs a pick", choices=("softmax", "sigmoid"))
    norm_topk_prob: bool = field_of(False, "divide the K weights by their sum (K > 1 only)")
    dropless: bool = field_of(True, "no expert ever turns a token away; False: capacity_factor limits each")
    capacity_factor: float = field_of(1.25, "room of an expert, in fair shares; unused when dropless", gt=0)
    balance: str = field_of("aux", "what keeps the load even", choices=("aux", "bias", "both", "none"))
    bias_update_speed: float = field_of(1e-3, "how far the balance bias moves per step; with 'bias' and 'both'", ge=0)
    load_balance_alpha: float = field_of(0.05, "weight of the balance loss; with 'aux' and 'both'", ge=0)
    sequence_balance_alpha: float = field_of(
        0.0, "weight of the balance loss within each sequence, with any balance", ge=0)
    router_z_loss_coef: float = field_of(1e-3, "weight of the z-loss on the raw logits", ge=0)
    router_temp_init: float = field_of(1.5, "divisor of the logits at step 1", gt=0)
    router_temp_final: float = field_of(1.0, "divisor once it is annealed", gt=0)
    router_temp_anneal_iters: int = field_of(1000, "steps from the first to the second, linearly", ge=0)
    router_noise_std_init: float = field_of(0.5, "scale of the selection noise at step 1, in tempered logits", ge=0)
    router_noise_decay_iters: int = field_of(1000, "steps until it is 0, linearly", ge=0)
    router_noise_type: str = field_of("gumbel", "distribution of the noise", choices=("gumbel", "gaussian"))

    def _check(self):
        if self.top_k == 1 and self.norm_topk_prob:
            raise ConfigError("norm_topk_prob = True: must be False when top_k = 1; a single weight divided by "
                              "itself is always 1, and the router would learn nothing from the language-model loss")
        if self.routing == "expert":
            for name, wanted, why in (("dropless", False, "each takes as many tokens as capacity_factor gives it room"),
                                      ("balance", "none", "the load is even whatever the router does"),
                                      ("norm_topk_prob", False, "a token may get any number of them")):
                if getattr(self, name) != wanted:
                    raise ConfigError(f"{name} = {getattr(self, name)!r}: must be {wanted!r} for routing = 'expert', "
                                      f"where experts choose their tokens: {why}")

    @property
    def uses_aux_loss(self) -> bool:
        """Whether alpha times the balance loss is part of what is minimised."""
        return self.balance in ("aux", "both")

    @property
    def uses_bias(self) -> bool:
        """Whether a bias that follows the load takes part in who is picked."""
        return self.balance in ("bias", "both")


@documented
@dataclass(frozen=True)
class DataConfig(Checked):
    """What is read.

    ``dataset_name``: "stdlib" (the embedded corpus), a path to text, .jsonl or .parquet, a path to an array of token
    ids (.npy, .bin), or the name of a data set on the Hugging Face hub, which is streamed.
    """

    dataset_name: str = field_of(
        "stdlib", "stdlib, a path to text or to token ids, or the name of a data set on the hub")
    dataset_config: str | None = field_of(None, "configuration of a data set on the hub")
    split: str = field_of("train", "split to train on, on the hub")
    val_split: str | None = field_of(
        None, "split to validate on, on the hub; None: documents chosen by the hash of their text")
    text_key: str = field_of("text", "column that holds the text")
    tokenizer: str | None = field_of(None, "name or folder for AutoTokenizer; None: trained on the training text")
    val_fraction: float = field_of(
        0.05, "share of the documents, or of an array's end, kept for validation", gt=0, lt=1)
    val_data: str | None = field_of(None, "array of validation ids, where dataset_name is an array; None: its end")
    token_dtype: str = field_of("uint16", "type of the ids in a .bin", choices=("uint16", "uint32", "int32", "int64"))
    shuffle_buffer: int = field_of(8192, "windows that a stream is shuffled among", ge=1)
    eval_take: int = field_of(512, "validation documents taken from a stream", ge=1)
    num_workers: int = field_of(0, "processes that tokenise a stream beside training; 0: a thread", ge=0)
    prefetch_factor: int = field_of(2, "prefetched per worker: chunks of a stream's text, or batches for a GPU", ge=1)

    def _check(self):
        for name in ("dataset_name", "text_key", "split"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name} = {getattr(self, name)!r}: must not be empty")


@documented
@dataclass(frozen=True)
class OptimConfig(Checked):
    """Optimizer, rate schedule (linear warmup, cosine to ``min_lr``) and batch. Rates are per optimizer step.

    Every group's rate is its own peak times one shape, whose floor is ``min_lr / learning_rate``. The peak is
    ``muon_lr`` for Muon's matrices and, for the rest, ``learning_rate`` under AdamW, ``sophia_lr`` under Sophia.
    """

    optimizer: str = field_of(
        "adamw", "rule of the blocks' matrices, then of the rest where they differ", choices=OPTIMIZERS)
    mtp_coef: float = field_of(0.3, "weight of the mean loss of the n_mtp heads", ge=0)
    learning_rate: float = field_of(3e-4, "peak rate under AdamW; min_lr / learning_rate is every group's floor", gt=0)
    min_lr: float = field_of(3e-5, "rate from lr_decay_iters on", ge=0)
    warmup_iters: int = field_of(500, "steps of linear warmup", ge=0)
    lr_decay_iters: int = field_of(2000, "step at which the cosine ends", ge=1)
    max_iters: int = field_of(2000, "planned steps; stepping past them goes on at min_lr", ge=1)
    weight_decay: float = field_of(0.1, "AdamW's decoupled decay; norms and biases never decay", ge=0)
    beta1: float = field_of(0.9, "AdamW's first moment", ge=0, lt=1)
    beta2: float = field_of(0.95, "AdamW's second moment", ge=0, lt=1)
    grad_clip: float = field_of(1.0, "norm to which a larger gradient is scaled down", gt=0)
    batch_size: int = field_of(8, "sequences per micro-batch", ge=1)
    gradient_accumulation_steps: int = field_of(1, "micro-batches per step", ge=1)
    embed_lr: float | None = field_of(None, "peak rate of the tied embedding; None: as the rest", gt=0)
    router_optimizer: str = field_of(
        "aux", "rule of the router's matrix beside Muon; aux: that of the rest", choices=("aux", "muon"))
    muon_lr: float = field_of(3e-2, "peak rate of Muon's matrices", gt=0)
    muon_wd: float = field_of(1e-2, "Muon's decoupled decay", ge=0)
    muon_momentum: float = field_of(0.95, "Muon's momentum", ge=0, lt=1)
    muon_scale: str = field_of(
        "original", "how Muon scales an update with a matrix's shape", choices=("original", "match_rms_adamw"))
    muon_dtype: str = field_of(
        "bfloat16", "type of the Newton-Schulz steps", choices=("bfloat16", "float32", "float64"))
    starved_experts: str = field_of(
        "reference", "what Muon does to experts without tokens; skip: leave them alone", choices=("reference", "skip"))
    sophia_lr: float = field_of(1e-3, "peak rate under Sophia", gt=0)
    sophia_wd: float = field_of(0.2, "Sophia's decoupled decay", ge=0)
    sophia_b1: float = field_of(0.965, "Sophia's momentum", ge=0, lt=1)
    sophia_b2: float = field_of(0.99, "decay of the curvature estimate", ge=0, lt=1)
    sophia_rho: float = field_of(0.1, "scales the curvature: larger clips fewer elements", gt=0)
    sophia_eps: float = field_of(1e-15, "added to the scaled curvature, which divides", gt=0)
    sophia_k: int = field_of(10, "steps between curvature estimates", ge=1)
    sophia_k_after: int | None = field_of(None, "the same after sophia_k_switch_step; None: no change", ge=1)
    sophia_k_switch_step: int | None = field_of(None, "the last step at which sophia_k holds", ge=1)

    def _check(self):
        if self.min_lr > self.learning_rate:
            raise ConfigError(f"min_lr = {self.min_lr}: must be at most learning_rate = {self.learning_rate}")
        if (self.sophia_k_after is None) != (self.sophia_k_switch_step is None):
            raise ConfigError(f"sophia_k_after = {self.sophia_k_after}: must be given together with "
                              f"sophia_k_switch_step = {self.sophia_k_switch_step}, or both left None")

    @property
    def skips_starved(self) -> bool:
        """Whether experts without tokens are left alone."""
        return self.starved_experts == "skip" and self.optimizer.startswith("muon")


@documented
@dataclass(frozen=True)
class RunConfig(Checked):
    """One experiment: its parts, and what belongs to none of them."""

    model: ModelConfig = ModelConfig()
    router: RouterConfig = RouterConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    device: str = field_of("auto", "where it trains; auto: CUDA where there is one", choices=("auto", "cpu", "cuda"))
    seed: int = field_of(1337, "of weights, data order and noise", ge=0, le=2**63 - 4)
    eval_interval: int = field_of(200, "steps between validations; 0: never", ge=0)
    eval_iters: int = field_of(50, "batches per validation", ge=1)
    save_interval: int = field_of(0, "steps between checkpoints; 0: only when training rests", ge=0)
    keep_checkpoints: int = field_of(3, "how many of those are kept, beside the last, the best and the named", ge=1)
    experts_impl: str = field_of(
        "grouped", "grouped products, or a plain loop to test against", choices=("grouped", "loop"))
    compute_dtype: str = field_of(
        "auto", "type of the matrix products; auto: bfloat16 on a GPU that has it",
        choices=("auto", "bfloat16", "float32"))
    compile: bool | None = field_of(
        None, "torch.compile the model; None: on CUDA, and on a CPU where the run is long enough")
    activation_checkpointing: bool = field_of(False, "keep only each block's input and recompute the rest: less memory")
    log_interval: int = field_of(10, "steps between two lines on a console", ge=1)
    mirrors: str = field_of("", "where metrics also go: any of wandb, tensorboard, trackio, with commas")
    wandb_project: str = field_of("moe-workbench", "project of the wandb mirror")
    wandb_run_name: str | None = field_of(None, "run name there; None: the run's directory")
    checkpoint_dir: str | None = field_of(None, "`moe train`: directory of the run")
    resume: str | None = field_of(None, "`moe train`: the run, or the checkpoint in one, to go on from")
    auto_resume: bool = field_of(False, "`moe train`: go on where checkpoint_dir already holds a run")
    opt_list: str = field_of("", "`moe shootout`: the optimizers to compare, with commas")
    csv: str | None = field_of(None, "`moe shootout`: where its table is written")

    def _check(self):
        if self.model.n_experts and self.router.top_k > self.model.n_experts:
            raise ConfigError(f"top_k = {self.router.top_k}: must be at most n_experts = {self.model.n_experts}")
        if self.model.n_experts and self.experts_impl == "grouped":
            for name, size in (("d_model", self.model.d_model), ("expert_width", self.model.ff_width)):
                if size % 8:
                    raise ConfigError(f"{name} = {size}: must be a multiple of 8 for experts_impl = 'grouped'")
        if self.compile and (obstacle := self.compile_obstacle):
            raise ConfigError(f"compile = True: must be False for {obstacle}")
        for name, known in (("mirrors", MIRRORS), ("opt_list", OPTIMIZERS)):
            object.__setattr__(self, name, ",".join(one.strip() for one in getattr(self, name).split(",")))
            for one in filter(None, getattr(self, name).split(",")):
                if one not in known:
                    raise ConfigError(f"{name} = {getattr(self, name)!r}: {one!r} must be one of {', '.join(known)}")

    @property
    def compile_obstacle(self) -> str | None:
        """What of this config keeps it from being one compiled graph, and why; None where nothing does."""
        if self.model.n_experts and self.experts_impl == "loop":
            return "experts_impl = 'loop', whose shapes follow the data; 'grouped' can be compiled"
        if self.model.n_experts and self.router.routing == "expert":
            return "routing = 'expert', whose shapes follow the knob capacity_factor"
        return None

    @property
    def tokens_per_step(self) -> int:
        """Tokens that an optimizer step learns from, over all its micro-batches."""
        return self.optim.batch_size * self.model.block_size * self.optim.gradient_accumulation_steps

    def replace(self, **changes) -> RunConfig:
        """A copy with any fields changed, each by its own name. Unknown names raise ConfigError."""
        parts: dict[str, dict] = {}
        for given, value in changes.items():
            name = ALIASES.get(given, given)
            if name not in _HOME:
                close = difflib.get_close_matches(name, [*_HOME, *ALIASES], n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ConfigError(f"{given} = {value!r}: there is no such field{hint}")
            if name in parts.get(_HOME[name], {}):
                raise ConfigError(f"{given} = {value!r}: given twice, {name} is the same field")
            parts.setdefault(_HOME[name], {})[name] = value
        own = parts.pop("", {})
        whole = {part: dataclasses.replace(getattr(self, part), **values) for part, values in parts.items()}
        return dataclasses.replace(self, **whole, **own)

    def to_dict(self) -> dict:
        """Nested plain values, fit for JSON; :meth:`from_dict` is its inverse."""
        return dataclasses.asdict(self)

    def flat(self) -> dict:
        """Every field by its own name, as :meth:`replace` takes them."""
        values = {}
        for name, value in self.to_dict().items():
            values |= value if name in _PARTS else {name: value}
        return values

    @classmethod
    def from_command(cls, command: str | Sequence[str]) -> RunConfig:
        """The config that a command line of a legacy training script means (see ``moe_core.commands``).

        ``command``: the whole line as it was pasted, or its words. Raises ConfigError.
        """
        from moe_core import commands

        return commands.parse(command)

    @classmethod
    def from_dict(cls, values: dict) -> RunConfig:
        """Fields that are absent take their defaults; fields that are unknown raise ConfigError."""
        flat = {}
        for key, value in values.items():
            flat.update(value if key in _PARTS and isinstance(value, dict) else {key: value})
        return cls().replace(**flat)


_PARTS = {f.name: type(f.default) for f in fields(RunConfig) if isinstance(f.default, Checked)}
_HOME = {f.name: part for part, cls in _PARTS.items() for f in fields(cls)}
_HOME |= {f.name: "" for f in fields(RunConfig) if f.name not in _PARTS}
ALIASES = {"max_steps": "max_iters"}
