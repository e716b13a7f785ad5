"""The model room: tokens -> :class:`Output`, mixture-of-experts or dense."""

from moe_core.model.router import RouterControls, RouterStats, Routing, draw_noise
from moe_core.model.size import count_params
from moe_core.model.transformer import Output, Transformer

__all__ = ["Output", "RouterControls", "RouterStats", "Routing", "Transformer", "count_params", "draw_noise"]
