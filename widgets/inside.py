"""Which tokens each expert takes, in the panel: text coloured by expert, layer by layer, looked at when asked."""

from __future__ import annotations

import ipywidgets as ipw

from widgets.errand import Errand
from widgets.notes import Log
from widgets.specialisation import TokenView
from widgets.token_html import section_html


class Inside:
    """A section with a button: the run's validation text through the weights as they are, coloured by expert."""

    def __init__(self, run, log: Log):
        self._run, self._text = run, ipw.Box()
        self.errand = Errand("Look", "Read a sample of the validation text with the weights as they are now",
                             "reading …", self._look, log)
        self.widget = ipw.Accordion([ipw.VBox([ipw.HBox([self.errand.button, self.errand.says]), self._text])],
                                    titles=("Inside the experts: which tokens each one takes",), selected_index=None)

    def _look(self) -> str:
        seen = self._run.inspect()
        before, uid = self._text.children, "moe-inside"
        self._text.children = [TokenView(html=section_html(seen, uid=uid), uid=uid)]
        for view in before:
            view.close()
        told = seen.mutual_information()
        told = told[told["nats"] > 2 * told["spread"]].sort_values("normalised")
        if told.empty:
            return f"after step {seen.step:,}: no layer's experts specialise more than chance would have them"
        most = told.iloc[-1]
        return (f"after step {seen.step:,}: experts specialise most in layer {most['layer']} "
                f"({most['normalised']:.0%} of the maximum mutual information)")
