"""The model, the optimizers and the stepwise trainer of the MoE-router workbench."""

import os

# Idle OpenMP threads spin by default; with a browser on the same two cores a step then takes 20 times
# longer. It must be set before torch is first imported, and only where the user has not chosen.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from moe_core.config import (  # noqa: E402
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    RunConfig,
    preset,
)

__all__ = ["ConfigError", "DataConfig", "ModelConfig", "OptimConfig", "RouterConfig", "RunConfig", "preset"]
