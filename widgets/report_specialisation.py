"""What the experts have specialised in, as a section of a report: a probe's tokens, and who took them."""

from __future__ import annotations

import pandas as pd

from moe_core.inspect import Inspection
from widgets import specialisation
from widgets.figures import figure
from widgets.report_blocks import Block, Heading, Picture, Pictures, Table, Text, code, number
from widgets.report_figures import NARROW

TOKENS = 8  # most typical ones that are shown of an expert
PAIRS = 3  # pairs of successive layers that are drawn, evenly spread


def blocks(inspection: Inspection) -> list[Block]:
    """Mutual information layer by layer, each expert's most typical tokens, and which experts follow which."""
    information = inspection.mutual_information()
    drawn = [Picture("information", figure(specialisation.information(inspection), width=NARROW),
                     "What a token's expert says of the token, layer by layer", again=False)]
    drawn += [Picture(f"coactivation-{layer}", figure(specialisation.coactivation(inspection, layer), width=NARROW),
                      f"Experts of layer {layer} against those of layer {layer + 1}", again=False)
              for layer in specialisation.pairs(inspection, PAIRS)]
    layer = _most_telling(information)
    rows = []
    for expert in range(inspection.n_experts):
        typical = inspection.tokens_of(layer, expert, TOKENS)
        said = ", ".join(f"{code(token)} {lift:.1f}×"
                         for token, lift in zip(typical["token"], typical["lift"], strict=True))
        rows.append((str(expert), f"{inspection.shares()[layer, expert]:.1%}", said or "none"))
    return [Heading("Specialisation of the experts"), Text(_sentence(inspection, information)),
            Pictures(tuple(drawn)), Heading(f"Most typical tokens in layer {layer}", 3),
            Text("How many times more often than the expert's share predicts; most significant first, not largest."),
            Table(("expert", "share", "tokens"), tuple(rows), (1,))]


def _sentence(inspection: Inspection, information: pd.DataFrame) -> str:
    said = [f"{len(inspection.token_ids):,} tokens of {len(inspection.kinds)} documents went through the weights after "
            f"step {inspection.step:,}, without noise."]
    for about, table in information.groupby("about", sort=False):
        known = table.dropna(subset="normalised")
        if not len(known):
            said.append(f"The expert tells nothing of the {about} here.")
            continue
        best = known.loc[known["normalised"].idxmax()]
        clear = int((known["nats"] > 2 * known["spread"]).sum())
        what, nats, most = about.removeprefix("token "), number(best["nats"], 3), f"{best['normalised']:.1%}"
        said.append(f"By {what}, experts specialise most in layer {best['layer']:.0f}: mutual information {nats} nats "
                    f"above chance, {most} of the maximum; {clear} of {len(table)} layers lie more than two standard "
                    "deviations above chance.")
    return " ".join(said)


def _most_telling(information: pd.DataFrame) -> int:
    """The layer whose expert says most of the token's class."""
    values = information[information["about"] == information["about"].iloc[0]]["normalised"].fillna(-1)
    return int(information.loc[values.idxmax(), "layer"])
