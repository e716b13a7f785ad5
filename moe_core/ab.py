"""Two choices from the same state: the same batches, the same random numbers, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_core import effects
from moe_core.checked import plain, whole
from moe_core.knobs import check_turn


def check_choices(knobs: Mapping, a: Mapping[str, float], b: Mapping[str, float], steps: int) -> int:
    """``steps`` as an int. Raises ValueError for what ``run.ab`` cannot train, before anything is done."""
    for which, choice in (("a", a), ("b", b)):
        if not isinstance(choice, Mapping):
            raise ValueError(f"{which} = {choice!r}: must be a dict of knobs and the values to hold them at")
        for name, value in choice.items():
            check_turn(knobs[name].name, "hold", plain(value))
    return whole("steps", steps)


@dataclass(frozen=True)
class AB:
    """What ``run.ab(...)`` made: two branches from ``start``, each with ``steps`` steps of its own choice."""

    run: object
    start: int
    steps: int
    a: dict[str, float]  # the knobs that branch A held
    b: dict[str, float]
    branch_a: str
    branch_b: str

    def table(self):
        """DataFrame, index metric: mean over the steps of A and of B, their difference B - A, and its spread.

        ``spread`` is the standard deviation of the step by step differences: both saw the same batch at each
        step, so what the batches do cancels. Metrics equal on every step are left out.
        """
        import pandas as pd

        a, b = (self.run.metrics(branch, since=self.start).iloc[: self.steps]
                for branch in (self.branch_a, self.branch_b))
        difference = (b - a).drop(columns=["perf/tok_s", "perf/data_wait"], errors="ignore").dropna(axis=1, how="all")
        moved = [name for name in difference if (difference[name].fillna(0) != 0).any()]
        frame = pd.DataFrame({"A": a[moved].mean(), "B": b[moved].mean(), "difference": difference[moved].mean(),
                              "spread": difference[moved].std()})
        return frame.rename_axis("metric")

    def effects(self):
        """DataFrame: what choosing B over A brought, and whether it stands out (see ``moe_core.effects``)."""
        return effects.effects_of_ab(self)

    def keep(self, which: str) -> None:
        """Go on from the end of "A" or "B"."""
        if which not in ("A", "B"):
            raise ValueError(f"which = {which!r}: must be 'A' or 'B'")
        self.run.switch(self.branch_a if which == "A" else self.branch_b)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()
