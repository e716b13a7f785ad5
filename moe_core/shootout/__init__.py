"""Optimizers compared on the same weights and batches: a folder of ordinary runs, peaks searched on one budget."""

from moe_core.shootout.peaks import Search
from moe_core.shootout.shootout import Shootout, shootout_from

__all__ = ["Search", "Shootout", "shootout_from"]
