"""The model, the optimizers and the stepwise trainer of the MoE-router workbench."""

import os

# Idle OpenMP threads spin by default; with a browser on the same two cores a step then takes 20 times
# longer. It must be set before torch is first imported, and only where the user has not chosen.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from moe_core.checkpoint import CheckpointError
from moe_core.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    RunConfig,
)
from moe_core.data import DataError
from moe_core.knobs import KnobError
from moe_core.presets import preset
from moe_core.run import Run, free_path
from moe_core.session import Command, Progress, Session
from moe_core.shootout import Search, Shootout
from moe_core.store import RunStore, StoreError
from moe_core.trainer import MemoryLimitError, NonFiniteError, StepRecord, Trainer

__all__ = [
    "CheckpointError", "Command", "ConfigError", "DataConfig", "DataError", "KnobError",
    "MemoryLimitError", "ModelConfig", "NonFiniteError", "OptimConfig", "Progress", "RouterConfig", "Run", "RunConfig",
    "RunStore", "Search", "Session", "Shootout", "StepRecord", "StoreError", "Trainer", "free_path", "preset",
]
