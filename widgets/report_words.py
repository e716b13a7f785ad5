"""A run in sentences: each composed from its numbers, and saying no more than they show.

E experts, K picks of a token, L layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from moe_core.health import Finding, healthy_band
from moe_core.rules import WINDOW, change
from widgets.record import Record
from widgets.report_blocks import Spark, Table, number

TREND = 2 * WINDOW  # logged steps that a trend is read from
FEW = 20  # fewer are no trend

# What is observed, in this order, where a run has it.
OBSERVED = ("val/loss", "val/loss_with_aux", "train/ce", "train/loss", "router/entropy_mean", "router/top1_p_mean",
            "router/max_frac_mean", "router/max_frac_max", "router/frac_srv_e*", "router/active_min",
            "router/drop_frac_mean", "router/no_expert_mean", "router/aux_mean", "router/bias_max", "router/z_mean",
            "grad/norm", "grad/clipped_cum", "perf/tok_s")


def observations(record: Record) -> Table:
    """Metric by metric: value, course, trend, healthy range, read."""
    rows = []
    for metric in OBSERVED:
        if metric == "train/loss" and len(record.series("train/ce")[0]):
            continue  # its part that matters stands there already
        if metric == "router/frac_srv_e*":
            rows += [_observed(record, name, said) for name, said in _extreme_experts(record)]
        elif metric == "grad/clipped_cum":
            rows.append(_clip_row(record))
        else:
            rows.append(_observed(record, metric))
    return Table(("metric", "now", "course", "trend", "healthy", "read"), tuple(filter(None, rows)), (1,))


def _observed(record: Record, metric: str, said: str | None = None) -> tuple | None:
    steps, values = record.series(metric)
    if not len(values):
        return None
    sparse = metric.startswith("val/")
    value = float(values[-1] if sparse else values[-WINDOW:].mean())
    low, high = _band(record, metric)
    read = _inside(value, low, high)
    if sparse:
        best = int(values.argmin())
        read = (f"the lowest so far, of {len(values)} values" if best == len(values) - 1
                else f"lowest {number(values[best])} at step {steps[best]}")
    spark = Spark(steps, values, low, high, f"{metric} from {number(values[0])} to {number(values[-1])}")
    return (said or metric, number(value), spark, trend(values), _range(low, high), read)


def _extreme_experts(record: Record) -> list[tuple[str, str]]:
    """The experts that were served least and most over the last window: (metric, how it is called)."""
    names = [f"router/frac_srv_e{expert}" for expert in range(record.n_experts)]
    means = {name: record.series(name)[1][-WINDOW:].mean() for name in names if len(record.series(name)[1])}
    if not means or not record.routed:
        return []
    least, most = min(means, key=means.get), max(means, key=means.get)
    return [(least, f"{least}, the least served"), (most, f"{most}, the most served")]


def _clip_row(record: Record) -> tuple | None:
    steps, count = record.series("grad/clipped_cum")
    if len(count) < 2:
        return None
    part = count / steps
    recent = recent_clipping(record)
    read = f"{recent:.0%} of the last {min(WINDOW, len(count))}"
    return ("grad/clipped_cum / steps", f"{part[-1]:.1%}", Spark(steps, part, None, 0.10, "part of the steps clipped"),
            trend(part), "under 5 to 10 %", read)


def recent_clipping(record: Record) -> float:
    """The part of the last steps whose gradient was clipped."""
    steps, count = record.series("grad/clipped_cum")
    n = min(WINDOW, len(count))
    return float((count[-1] - count[-n]) / (steps[-1] - steps[-n])) if n > 1 else math.nan


def trend(values: np.ndarray) -> str:
    """What a line through the newest values does, in words."""
    part = values[-TREND:]
    if len(part) < FEW:
        return f"{len(part)} values, too few"
    gained = change(part)
    return f"{number(gained, 3, sign=True)} in {len(part)} steps" if gained else f"none in {len(part)} steps"


def _band(record: Record, metric: str) -> tuple[float | None, float | None]:
    return (healthy_band(metric, record.n_experts, record.top_k) if record.routed else None) or (None, None)


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if low is None:
        return f"up to {number(high, 3)}"
    return f"{number(low, 3)} to {number(high, 3)}" if high is not None else f"from {number(low, 3)}"


def _inside(value: float, low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if low is not None and value < low:
        return "below the range"
    return "above the range" if high is not None and value > high else "inside the range"


# ---- assessment ------------------------------------------------------------------------------------------

_OF = {"Balance": ("collapsed", "active", "max_frac_max", "max_frac_mean", "starved", "capacity", "drops"),
       "Specialisation": ("top1_p", "entropy"), "Regularisation": ("aux",), "Clipping": ("clipping",)}


def assessment(record: Record) -> list[tuple[str, str, tuple[str, ...]]]:
    """(head, paragraph, findings) of balance, specialisation, regularisation, clipping and what else was found."""
    own = {"Balance": _balance, "Specialisation": _specialisation, "Regularisation": _regularisation,
           "Clipping": _clipping}
    known = {rule for rules in _OF.values() for rule in rules}
    said = [*record.asking, *([finding] for finding in record.findings if finding.level == "ok")]
    parts = [(head, " ".join(sentences(record)), tuple(_sentence(same) for same in said if same[0].rule in _OF[head]))
             for head, sentences in own.items()]
    parts.append(("Other findings", "", tuple(_sentence(same) for same in said if same[0].rule not in known)))
    return [part for part in parts if part[1] or part[2]]


def _sentence(same: Sequence[Finding]) -> str:
    level = "Fine" if same[0].level == "ok" else same[0].level.capitalize()
    return f"{level}, {span(same[0])}: {same[0].text}{and_others(same[1:])}."


def and_others(findings: Sequence[Finding]) -> str:
    """Where else a rule found the same, behind the words of its worst finding."""
    where = ", ".join(f"{'all layers' if f.layer is None else f'layer {f.layer}'} ({number(f.value, 3)})"
                      for f in findings)
    return f"; also {where}" if where else ""


def span(finding) -> str:
    """The steps that a finding is about."""
    one = finding.first == finding.last
    return f"step {finding.last}" if one else f"steps {finding.first} to {finding.last}"


def _balance(record: Record) -> list[str]:
    _, mean = record.series("router/max_frac_mean")
    if not record.routed or not len(mean):
        return []
    n, fair = min(WINDOW, len(mean)), 1 / record.n_experts
    said = [f"Over the last {n} logged steps the fullest expert took {mean[-n:].mean():.1%} of a layer's assignments "
            f"in the mean over layers; a fair share is {fair:.1%}."]
    at, worst = record.series("router/max_frac_max")
    if len(worst):
        k = int(worst.argmax())
        said.append(f"The most that one expert of one layer took in any step was {worst[k]:.1%}, at step {at[k]}.")
    if record.shares is not None:
        served_E = np.nanmean(record.newest_n2LE[-n:, 1], axis=(0, 1))
        said.append(f"Served shares of the experts, means over layers and the last {n} steps, lie between "
                    f"{served_E.min():.1%} (expert {served_E.argmin()}) and {served_E.max():.1%} "
                    f"(expert {served_E.argmax()}).")
    _, active = record.series("router/active_min")
    if len(active):
        low = int(active[-n:].min())
        said.append(f"Every expert of every layer had a token in each of the last {n} steps."
                    if low >= record.n_experts else
                    f"In some of the last {n} steps a layer used only {low} of its {record.n_experts} experts.")
    at, collapsed = record.series("router/collapsed")
    if len(collapsed):
        bad = at[collapsed > 0]
        said.append("No step was collapsed." if not len(bad) else
                    f"{_count(len(bad), 'step was', 'steps were')} collapsed, the first {bad[0]}, the last {bad[-1]}.")
    _, dropped = record.series("router/drop_frac_mean")
    if len(dropped) and dropped.max() > 0:
        said.append(f"{dropped[-n:].mean():.2%} of the assignments were dropped over the last {n}.")
    return said


def _specialisation(record: Record) -> list[str]:
    _, entropy = record.series("router/entropy_mean")
    if not record.routed or not len(entropy):
        return []
    most, n = math.log(record.n_experts), min(WINDOW, max(len(entropy) // 2, 1))
    first, last = float(entropy[:n].mean()), float(entropy[-n:].mean())
    said = [f"The router's entropy was {number(first)} nats over the first {n} logged steps and {number(last)} over "
            f"the last {n}: {last / most:.2f} of ln {record.n_experts} = {number(most)}."]
    _, top = record.series("router/top1_p_mean")
    if len(top):
        said.append(f"The winner's mean probability went from {number(top[:n].mean(), 3)} to "
                    f"{number(top[-n:].mean(), 3)}; uniform is {number(1 / record.n_experts, 3)}.")
    by_layer = {layer: values[-n:].mean() for layer in range(record.newest_n2LE.shape[2])
                if len(values := record.series(f"router/entropy_mean/layer_{layer}")[1])}
    if len(by_layer) > 1:
        sharp, flat = min(by_layer, key=by_layer.get), max(by_layer, key=by_layer.get)
        said.append(f"Layer {sharp} is the most decided ({number(by_layer[sharp], 3)} nats), layer {flat} the least "
                    f"({number(by_layer[flat], 3)}).")
    return said


def _regularisation(record: Record) -> list[str]:
    _, aux = record.series("router/aux_mean")
    if not record.routed or not len(aux):
        return []
    n, said = min(WINDOW, len(aux)), []
    balance = float(aux[-n:].mean())
    alpha, coef = record.series("router/load_balance_alpha")[1], record.series("router/z_loss_coef")[1]
    z, total = record.series("router/z_mean")[1], record.series("train/loss")[1]
    if len(alpha) and alpha[-1] > 0:
        on = alpha[-n:] > 0  # it may have been turned on just now
        said.append(f"The balance term is {number(balance)} at alpha {number(alpha[-1])}, the mean of the last {n}: "
                    f"{number(float((aux[-n:][on] / alpha[-n:][on]).mean()))} before it is weighted, where "
                    f"1 is balanced and {number(record.n_experts / record.top_k)} collapsed.")
    elif len(alpha):
        said.append("The balance term has no weight: alpha is 0.")
    if len(z) and len(coef):
        weighed = float((z[-n:] * coef[-n:]).mean())
        terms = "both terms are" if len(alpha) else "that is"
        part = f"; {terms} {(balance + weighed) / total[-n:].mean():.1%} of the loss" if len(total) else ""
        said.append(f"The z-loss is {number(float(z[-n:].mean()))}, weighted {number(weighed, 3)}{part}.")
    return said


def _clipping(record: Record) -> list[str]:
    steps, count = record.series("grad/clipped_cum")
    if len(count) < 2:
        return []
    return [f"{int(count[-1])} of {steps[-1]} steps were clipped ({count[-1] / steps[-1]:.0%}), and "
            f"{recent_clipping(record):.0%} of the last {min(WINDOW, len(count))}."]


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def is_expert(metric: str) -> bool:
    """Whether a metric is of one expert alone."""
    return re.fullmatch(r"router/frac_(dem|srv)_e\d+", metric) is not None
