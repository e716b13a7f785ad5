"""Peak rates of an optimizer: which it has, how they are changed, and a small search for them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from moe_core.checked import plain, whole
from moe_core.config import ConfigError, RunConfig

# Two rates each, so that one search serves all: of the matrices in the blocks and of the rest for a mix with Muon,
# of everything but the embedding and of the embedding for the others.
RATES = {"adamw": ("learning_rate", "embed_lr"), "muon_adamw": ("muon_lr", "learning_rate"),
         "muon_sophia": ("muon_lr", "sophia_lr"), "sophia": ("sophia_lr", "embed_lr")}


def rates(config: RunConfig) -> dict[str, float]:
    """The config's peak rates by field: its optimizer's two, and an ``embed_lr`` that a mix has beside them.

    Under the others the embedding's is the second; where it is None it is the rate of the rest.
    """
    first, second = RATES[config.optim.optimizer]
    peak, embed = getattr(config.optim, first), config.optim.embed_lr
    found = {first: peak, second: getattr(config.optim, second) or peak}
    return found if embed is None else found | {"embed_lr": embed}


def with_rates(config: RunConfig, **changes) -> RunConfig:
    """The config with fields changed; ``min_lr`` keeps its ratio to ``learning_rate``, and the schedule its shape."""
    rate = changes.get("learning_rate")
    if isinstance(rate, int | float) and "min_lr" not in changes:
        changes["min_lr"] = rate * (config.optim.min_lr / config.optim.learning_rate)
    return config.replace(**changes)


def stretched(config: RunConfig, steps: int) -> RunConfig:
    """The config for ``steps`` steps: its rates' schedule stretched to them, and the last step validated.

    Where ``eval_interval`` does not divide the steps, the divisor that is nearest to it in ratio is taken.
    """
    optim, longer = config.optim, steps / config.optim.max_iters
    wanted = config.eval_interval or steps
    every = min((d for d in range(1, steps + 1) if steps % d == 0), key=lambda d: (abs(math.log(d / wanted)), d))
    return config.replace(max_iters=steps, lr_decay_iters=max(round(optim.lr_decay_iters * longer), 1),
                          warmup_iters=round(optim.warmup_iters * longer), eval_interval=every)


@dataclass(frozen=True)
class Search:
    """A search for peak rates, the same for every entry: one run for each pair of ``multipliers``.

    An entry's two rates (:data:`RATES`) are those of :meth:`centre` times the pair; the lowest last ``val/loss`` wins.
    ``steps``: the length of a run, to which its schedule is shrunk. ``seed`` None: one above those of the shoot-out.
    ``second``: the centre of the second rate over what the config gives, where it gives no ``embed_lr``. The tied
    embedding wants about ten times the rate of the matrices: around equal rates, searches on ``nano`` (AdamW, Muon +
    AdamW) and on one of half its depth and width (all four, dense and MoE) ended at the second rate's upper edge.
    """

    multipliers: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    steps: int = 100
    seed: int | None = None
    second: float = 10.0

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(map(plain, self.multipliers)))
        for name in ("steps", "seed", "second"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        numbers = [m for m in self.multipliers if isinstance(m, int | float) and 0 < m < math.inf]
        if not numbers or len(set(map(spell, numbers))) < len(self.multipliers):
            raise ConfigError(f"multipliers = {self.multipliers}: must be different numbers above 0, at least one")
        whole("steps", self.steps, ConfigError)
        if not isinstance(self.second, int | float) or not 0 < self.second < math.inf:
            raise ConfigError(f"second = {self.second!r}: must be a number above 0")

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """Every choice of two multipliers: of the first peak rate, and of the second."""
        return list(itertools.product(self.multipliers, repeat=2))

    def at_edge(self, pair: tuple[float, float]) -> bool:
        """Whether a choice lies at the edge of what was searched: the best may lie beyond."""
        return min(pair) == min(self.multipliers) or max(pair) == max(self.multipliers)

    def centre(self, config: RunConfig) -> dict[str, float]:
        """The rates that the multipliers are of, by field."""
        found, second = rates(config), RATES[config.optim.optimizer][1]
        return found | {second: found[second] * self.second} if config.optim.embed_lr is None else found

    def trial(self, config: RunConfig, pair: tuple[float, float]) -> RunConfig:
        """What one run of the search is made of."""
        first = RATES[config.optim.optimizer][0]
        scaled = {name: rate * pair[name != first] for name, rate in self.centre(config).items()}
        short = stretched(config, self.steps).replace(eval_interval=self.steps, seed=self.seed)
        return with_rates(short, **scaled)


def spell(number: float) -> str:
    return f"{number:.3g}"
