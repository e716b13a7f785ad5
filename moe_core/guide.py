"""The router guide: rules over the stored metrics, scaled to E experts and K picks of a token.

A number whose origin is not said is from the guide to reading a router that this project's users keep, written for one
pick of 8 experts; "own choice" stands where that has words alone. What it says of one layer is asked of each layer too,
at the line of the worst one.
"""

from __future__ import annotations

import math
import re

import numpy as np

from moe_core.metrics import collapse_lines
from moe_core.rules import (
    WINDOW,
    Line,
    Reading,
    Rule,
    Shape,
    Test,
    View,
    at,
    beyond,
    change,
    down_to,
    move,
    scale,
    spike,
    streak,
    sustained,
    up_to,
    within,
)

LATE = 1000  # steps from which a router is expected to have specialised: the users' "beyond 1k steps"

# Healthy ranges, (low, high), by metric; None: no end on that side. The panel draws them as bands.
BANDS: dict[str, tuple[Line, Line]] = {
    "router/top1_p_mean": (lambda s: 1.5 / s.E, lambda s: s.peak(0.6)),
    "router/max_frac_mean": (None, lambda s: min(2 / s.E, s.share(0.35, 0.5))),
    "router/max_frac_max": (None, lambda s: s.share(0.4, 0.6)),
    "router/entropy_mean": (lambda s: s.entropy(0.2), lambda s: s.entropy(0.96)),  # 0.96: "too diffuse", users' notes
    "router/active_min": (lambda s: s.E - max(1, s.E // 8), lambda s: s.E),  # "E or E - 1", of 8
    "router/frac_srv_e*": (lambda s: 0.4 / s.E, lambda s: s.share(0.35, 0.5)),  # 5 % at E = 8; as max_frac_mean
    "router/drop_frac_mean": (None, 0.02),
    "router/collapsed": (None, 0.0),
}


def healthy_band(metric: str, n_experts: int, top_k: int = 1) -> tuple[float | None, float | None] | None:
    """(low, high) of a metric, also of one with ``/layer_{l}`` behind it; None where the guide has no range."""
    name, layer, _ = metric.partition("/layer_")
    name = re.sub(r"(frac_srv_e)\d+$", r"\1*", name)
    if layer and name == "router/max_frac_mean":
        name = "router/max_frac_max"
    if layer and name == "router/active_mean":
        name = "router/active_min"
    if name not in BANDS or not n_experts:
        return None
    low, high = (at(line, Shape(n_experts, top_k)) for line in BANDS[name])
    return low, high


def _collapsed(view: View) -> Reading | None:
    share_line, fewest = collapse_lines(view.shape.K)
    steps, top = (a[-WINDOW:] for a in view.series("router/max_frac_max"))
    bad = set(steps[~beyond(top, share_line, None)].tolist())
    for metric, line, sign in (("router/active_min", fewest, -1), ("router/collapsed", 1, 1)):
        if metric != "router/collapsed" or view.layer is None:
            at, values = (a[-WINDOW:] for a in view.series(metric))
            bad |= set(at[sign * values >= sign * line].tolist())
    if not bad:
        return None
    worst = max((float(v) for s, v in zip(steps, top, strict=True) if s in bad), default=None)
    said = "" if worst is None else f": one expert takes up to {worst:.2f} of the assignments"
    value, line = (1.0, 0.0) if view.layer is None else (worst or math.nan, share_line)
    return Reading("spike", value, int(min(bad)), int(max(bad)), high=line, words={"times": len(bad), "said": said})


def _gap(view: View) -> Reading | None:
    """Demand above served by more than a quarter of a fair share (own choice; the guide says "large")."""
    (steps, served), (_, demand) = view.series(), view.series("router/frac_dem_max")
    n, allowed = min(len(served), len(demand)), 0.25 / view.shape.E
    served, demand, steps = served[len(served) - n:], demand[len(demand) - n:], steps[len(steps) - n:]
    found = streak(steps, demand - served, None, allowed)
    if found is None:
        return None
    served, demand = float(served[-WINDOW:].mean()), float(demand[-WINDOW:].mean())
    return Reading("sustained", served, found[0], int(steps[-1]), demand - allowed, demand, words={"demand": demand})


def _entropy_falls(view: View) -> Reading | None:
    """Under 0.1 ln E (own choice; the guide says "far below 0.2 ln E"), early, and falling by more than a trifle."""
    found, values = sustained(below=lambda s: s.entropy(0.1))(view), view.series()[1]
    early = found is not None and found.last < LATE
    return found if early and change(values[-2 * WINDOW:]) < -view.shape.entropy(0.02) else None


def _aux_grows(view: View) -> Reading | None:
    """Both by more than a tenth within 100 logged steps (own choice)."""
    (steps, aux), (_, top) = view.series(), view.series("router/max_frac_mean")
    alpha = view.columns.get("router/load_balance_alpha")
    n = 2 * WINDOW
    if min(len(aux), len(top)) < n:
        return None
    grown = aux[-n:]
    if alpha is not None:  # a raised coefficient is no worse balance
        in_force = alpha[np.isin(view.steps, steps)][-n:]
        grown = grown / np.where(in_force > 0, in_force, np.nan)
    if np.isnan(grown).any() or not (change(grown) > 0.1 * grown[:WINDOW].mean()
                                     and change(top[-n:]) > 0.1 * top[-n:-WINDOW].mean()):
        return None
    return Reading("trend", float(aux[-WINDOW:].mean()), int(steps[-n]), int(steps[-1]), words={
        "before": float(aux[-n:-WINDOW].mean()), "top": float(top[-WINDOW:].mean()),
        "top_before": float(top[-n:-WINDOW].mean())})


def _starved(view: View) -> Reading | None:
    line, poor = 0.4 / view.shape.E, []
    for expert in range(view.shape.E):
        steps, values = view.series(f"router/frac_srv_e{expert}")
        if (found := streak(steps, values, line, None)) is not None:
            poor.append((found[1], expert, found[0]))
    if not poor:
        return None
    mean, expert, first = min(poor)
    more = f" (and {len(poor) - 1} more)" if len(poor) > 1 else ""
    return Reading("sustained", mean, first, int(view.steps[-1]), low=line,
                   metric=view.name(f"router/frac_srv_e{expert}"), words={"expert": expert, "more": more})


def _clipped(above: float, still: bool) -> Test:
    """Clipped in more than this part of all steps; ``still``: and the count still climbs.

    The guide's healthy end is 0.10; 0.5 for an alarm is an own choice, below the 65 to 70 % that its users judged high.
    """
    def test(view: View) -> Reading | None:
        steps, values = view.series()
        if len(values) < 2 * WINDOW:
            return None
        whole = float(values[-1] / steps[-1])
        recent = float((values[-1] - values[-WINDOW]) / (steps[-1] - steps[-WINDOW]))
        if whole <= above or (recent > 0.10) != still:
            return None
        return Reading("trend", whole, int(steps[-WINDOW]), int(steps[-1]), high=0.10, words={"recent": recent})
    return test


def _biased(test: Test) -> Test:
    """The same where a bias balances, and silence elsewhere."""
    return lambda view: test(view) if "router/bias_update_speed" in view.columns else None


UNEVEN = 0.3  # of a fair share: own choice, the guide says "high variance"


def _uneven(view: View) -> Reading | None:
    """How far the experts' shares, each its mean over the window, lie apart: what the bias should have evened out.

    Shares that scatter from step to step around the same mean are not meant: that is the batch, or a bias too fast.
    """
    names = [f"router/frac_srv_e{expert}" for expert in range(view.shape.E)]
    columns = [view.series(name) for name in names]
    n, fair = min(len(values) for _, values in columns), 1 / view.shape.E
    if n < WINDOW:
        return None
    shares_E = np.array([values[-WINDOW:].mean() for _, values in columns])
    spread, steps = float(shares_E.std()), columns[0][0]
    if spread <= UNEVEN * fair:
        return None
    return Reading("sustained", spread, int(steps[-WINDOW]), int(steps[-1]), 0.0, UNEVEN * fair,
                   metric=view.name(names[int(shares_E.argmax())]),
                   words={"least": float(shares_E.min()), "most": float(shares_E.max())})


FASTER = up_to("bias_update_speed", 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
BALANCE = (up_to("load_balance_alpha", 0.1, 0.15, 0.2), FASTER, up_to("router_z_loss_coef", 1e-3, 5e-3))
EXPLORE = (move("router_temp", 0.3), move("router_noise_std", 0.25))
SHARPEN = (down_to("router_temp", 1.25, 1.2, 1.0, 0.9), down_to("load_balance_alpha", 0.12, 0.10, 0.08),
           down_to("router_z_loss_coef", 5e-4))
RECOVER = (up_to("router_temp", 2.5), up_to("router_noise_std", 1.0), up_to("load_balance_alpha", 0.15, 0.2),
           FASTER, within("router_z_loss_coef", 1e-3, 5e-3))
ROOM = (scale("capacity_factor", 1.25), move("router_temp", 0.3))
CALM = (scale("lr_scale", 0.75), up_to("grad_clip", 1.5, 2.0))

_FLAT = "step by step back once router/max_frac_max is under {spikes:.2f} for 100 steps, or if val/loss rises"
_SHARP = "if router/max_frac_max stays above {spikes:.2f}"

# Within a level, what is said first.
RULES: list[Rule] = [
    Rule("collapsed", "router/collapsed", "alarm", _collapsed,
         "collapsed in {times} of the last {n} logged steps{said} (fair {uniform:.3f})", RECOVER,
         "step by step back once router/collapsed has been 0 for 100 steps"),
    Rule("active", "router/active_min", "alarm",
         spike(below=lambda s: max(s.K, min(max(s.K + 1, s.E // 4), s.E - 2)) + 0.5, times=3, enough=3),
         "repeated dips to {value:.0f} active experts of {E}, {times} in the last {n} logged steps: collapse begins",
         (*BALANCE, *EXPLORE), _FLAT),
    Rule("max_frac_max", "router/max_frac_max", "alarm", sustained(above=lambda s: s.share(0.5, 0.75)),
         "the fullest expert of the worst layer takes {value:.2f} sustained, above {line:.2f}: bad "
         "(fair {uniform:.3f})", (*BALANCE, *EXPLORE), _FLAT),
    Rule("max_frac_mean", "router/max_frac_mean", "alarm", sustained(above=lambda s: s.share(0.5, 0.75)),
         "the fullest expert takes {value:.2f} in the mean over layers, sustained above {line:.2f}: severe "
         "(fair {uniform:.3f})", (*BALANCE, *EXPLORE), _FLAT, layers=False),
    Rule("top1_p", "router/top1_p_mean", "alarm", sustained(above=lambda s: s.peak(0.8)),
         "too peaked, collapse likely: top-1 probability {value:.2f} sustained, above {line:.2f} "
         "(uniform {uniform:.3f})", EXPLORE, "once router/top1_p_mean is back under {peak:.2f}"),
    Rule("entropy", "router/entropy_mean", "alarm", _entropy_falls,
         "entropy {value:.2f} nats, under 0.1 ln E = {low:.2f} early and falling, is far below the healthy 0.2 ln E = "
         "{sharp:.2f}: collapse likely",
         (*EXPLORE, *BALANCE), "once router/entropy_mean is back above {sharp:.2f} nats"),
    Rule("clipping", "grad/clipped_cum", "alarm", _clipped(0.5, still=True),
         "the gradient was clipped in {value:.0%} of all steps and in {recent:.0%} of the last {n}, healthy is under "
         "5 to 10 %: look for spikes and NaN, a lower rate, a longer warmup", CALM,
         "if train/ce falls more slowly after 200 steps; go back if grad/norm spikes", layers=False),
    Rule("max_frac_max", "router/max_frac_max", "watch", sustained(above=lambda s: s.share(0.4, 0.6)),
         "the fullest expert of the worst layer takes {value:.2f} sustained, above {line:.2f} (fair {uniform:.3f})",
         (*BALANCE, *EXPLORE), _FLAT),
    Rule("max_frac_mean", "router/max_frac_mean", "watch", sustained(above=lambda s: s.share(0.35, 0.5)),
         "the fullest expert takes {value:.2f} in the mean over layers, sustained above {line:.2f} "
         "(fair {uniform:.3f})", (*BALANCE, *EXPLORE), _FLAT, layers=False),
    Rule("aux", "router/aux_mean", "watch", _aux_grows,
         "the balance loss grows ({before:.4f} to {value:.4f}) while the fullest expert's share worsens "
         "({top_before:.2f} to {top:.2f}): balancing too weak", BALANCE,
         "once router/aux_mean / alpha is back and flat for 100 steps, or if train/ce rises"),
    Rule("starved", "router/frac_srv_e*", "watch", _starved,
         "expert {expert}{more} is served {value:.1%} of the assignments sustained, under {low:.1%} "
         "(fair {uniform:.1%})", (*BALANCE, *EXPLORE), "once every expert is above its line for 100 steps"),
    Rule("starved", "router/frac_srv_e*", "alarm", _biased(_starved),
         "expert {expert}{more} is served {value:.1%} of the assignments sustained, under {low:.1%}, though a bias "
         "balances (fair {uniform:.1%})", (*BALANCE, *EXPLORE), "once every expert is above its line for 100 steps"),
    Rule("uneven", "router/frac_srv_e*", "watch", _biased(_uneven),
         "the experts' shares lie {value:.1%} apart (standard deviation; {least:.1%} to {most:.1%}), sustained above "
         "{line:.1%}: the bias follows the load too slowly", (FASTER,),
         "step by step back once the shares are even for 100 steps, or if they swing from step to step"),
    # The users' guide has 0.01 for the term at E = 8 and a coefficient of 1e-3: for the logits themselves that is 10.
    Rule("z_loss", "router/z_mean", "watch",
         _biased(sustained(above=lambda s: 10 * (s.entropy(1) / math.log(8)) ** 2)),
         "the router's logits grow: z {value:.1f} sustained, above {line:.1f} (a z-loss of 0.01 at 8 experts and a "
         "coefficient of 0.001)", (up_to("router_z_loss_coef", 1e-3, 5e-3),),
         "once router/z_mean is under {line:.1f} for 100 steps"),
    Rule("active", "router/active_min", "watch", spike(below=lambda s: s.E - max(1, s.E // 8)),
         "dips to {value:.0f} active experts of {E}, {times} in the last {n} logged steps",
         (*BALANCE, *EXPLORE), _FLAT),
    Rule("top1_p", "router/top1_p_mean", "watch", sustained(below=lambda s: 1.2 / s.E),
         "too diffuse: top-1 probability {value:.3f} sustained, under 1.2/E = {line:.3f} (uniform {uniform:.3f})",
         (move("router_temp", -0.2), scale("router_noise_std", 0.5)), _SHARP),
    Rule("entropy", "router/entropy_mean", "watch", sustained(above=lambda s: s.entropy(0.96), start=LATE),
         "under-specialised: entropy {value:.2f} nats is near ln E = {lnE:.2f} at step {last}, above 0.96 ln E "
         "= {line:.2f}", SHARPEN, _SHARP),
    Rule("entropy", "router/entropy_mean", "watch", sustained(below=lambda s: s.entropy(0.2)),
         "entropy {value:.2f} nats sustained, below 0.2 ln E = {line:.2f}: peaked", EXPLORE,
         "once router/entropy_mean is back above {sharp:.2f} nats"),
    Rule("capacity", "router/frac_srv_max", "watch", _gap,
         "demand stays above served: the fullest expert is asked for {demand:.2f} and takes {value:.2f}; capacity "
         "is too tight (or go dropless)", ROOM, "once demand and served are close for 100 steps", layers=False),
    Rule("drops", "router/drop_frac_mean", "watch", sustained(above=0.02),
         "{value:.1%} of the assignments are dropped, sustained above {line:.0%}: capacity is too tight or the "
         "router too peaked", ROOM, "once router/drop_frac_mean is under 0.01 for 100 steps"),
    Rule("clipping", "grad/clipped_cum", "watch", _clipped(0.10, still=True),
         "the gradient was clipped in {value:.0%} of all steps and in {recent:.0%} of the last {n}, healthy is under "
         "5 to 10 %", CALM, "if train/ce falls more slowly after 200 steps; go back if grad/norm spikes", layers=False),
    Rule("clipping", "grad/clipped_cum", "ok", _clipped(0.10, still=False),
         "the gradient was clipped in {value:.0%} of all steps, but only in {recent:.0%} of the last {n}: the count "
         "is flat, which is fine", layers=False),
    Rule("max_frac_max", "router/max_frac_max", "ok", spike(above=lambda s: s.share(0.4, 0.6)),
         "a spike: the fullest expert of the worst layer took up to {value:.2f} in {times} of the last {n} logged "
         "steps; above {line:.2f} it passes unless sustained"),
    Rule("max_frac_mean", "router/max_frac_mean", "ok", spike(above=lambda s: s.share(0.35, 0.5)),
         "a spike: the fullest expert took up to {value:.2f} in the mean over layers, in {times} of the last {n} "
         "logged steps; above {line:.2f} it passes unless sustained", layers=False),
]


