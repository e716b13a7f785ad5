"""What a knob would do, while its slider is held and before it is let go."""

from __future__ import annotations

import html
from collections.abc import Callable

import ipywidgets as ipw

from moe_core.knobs import KnobError
from moe_core.preview import Preview
from widgets.marks import KNOB_TITLES

# metric, its words, how a number of it is said, whether its highest layer is told of, or its lowest
SHOWN = (("router/entropy_mean", "entropy, nats", "{:.3f}", False),
         ("router/top1_p_mean", "top-1 probability", "{:.3f}", True),
         ("router/max_frac_mean", "largest demand", "{:.1%}", True),
         ("router/drop_frac_mean", "dropped", "{:.1%}", True))


class WhatIf:
    """Shows now -> then for the knob and value that a hand aims at. It turns nothing.

    :meth:`show` is for the panel's thread: routing the last batch again takes milliseconds, which the thread
    that hears of the hand has not.
    """

    def __init__(self, preview: Callable[..., Preview] | None):
        """``preview``: that of a run; None where there is nothing to ask, and only the value is shown."""
        self._preview, self._aimed = preview, None
        self.widget = ipw.HTML()
        self.widget.add_class("moe-what-if")

    def show(self, aim: tuple[str, float] | None) -> None:
        """``aim``: the name of a knob and the value that the hand is at, None when it has let go."""
        if aim == self._aimed:
            return
        self._aimed = aim
        self.widget.value = "" if aim is None else self._say(*aim)

    def _say(self, name: str, value: float) -> str:
        said, title = "", f"<p>{html.escape(KNOB_TITLES.get(name, name))} → <b>{value:.3g}</b></p>"
        if self._preview is not None:
            try:
                seen = self._preview(**{name: value})
            except (KnobError, RuntimeError) as error:  # before a first step there is no batch to route
                said = f"<p>{html.escape(str(error))}</p>"
            else:
                title, said = "", table(seen, name)
        return f'<div class="moe-then">{title}{said}</div>'


def table(seen: Preview, name: str) -> str:
    """The preview of a turn of knob ``name`` as HTML: of each metric the mean over layers, and its end."""
    now, then = seen.values_now[name], seen.values_then[name]
    said = (f"<p><b>What if</b> {html.escape(KNOB_TITLES.get(name, name))} {now:.3g} → <b>{then:.3g}</b>, "
            f"on the batch of step {seen.step:,}</p>")
    if any(seen.now[n] != seen.then[n] for n in seen.now if n.startswith(tuple(metric for metric, *_ in SHOWN))):
        rows = "".join(_row(seen, *shown) for shown in SHOWN if seen.now[shown[0]] or seen.then[shown[0]])
        said += f"<table><tr><th></th><th>mean of layers</th><th>lowest or highest layer</th></tr>{rows}</table>"
    return said + "".join(f"<p>{html.escape(sentence)}.</p>" for sentence in seen.unknown)


def _row(seen: Preview, metric: str, words: str, form: str, highest: bool) -> str:
    def end(values):
        layers = range(seen.shares_now.shape[1])
        return (max if highest else min)((values[f"{metric}/layer_{layer}"], layer) for layer in layers)
    (now, before), (then, after) = end(seen.now), end(seen.then)
    where = f"{'highest' if highest else 'lowest'}, layer {f'{before} → ' * (before != after)}{after}"
    mean = _change(seen.now[metric], seen.then[metric], form)
    return f"<tr><th>{words}</th><td>{mean}</td><td>{_change(now, then, form)} <i>{where}</i></td></tr>"


def _change(now: float, then: float, form: str) -> str:
    now, then = form.format(now), form.format(then)
    return f"<i>{now} → {then}</i>" if now == then else f"{now} → <b>{then}</b>"
