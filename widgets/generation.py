"""A run writes, in a notebook: each token appears in the colour of its expert as soon as it is drawn.

    from widgets.generation import Writing
    Writing(run, "def ")

The run may be training: it is a copy of its weights that writes, in a thread of its own.
"""

from __future__ import annotations

import html
import threading
import time

import ipywidgets as ipw

from moe_core.generation import Generation
from widgets.specialisation import TokenView
from widgets.token_html import STYLE, escaped, section_html, written_html
from widgets.workbench import answer_while_cells_run

SHORTEST, MAKING_SHARE = 0.15, 0.1  # seconds between two updates; of the time goes into making them
WIDE = ipw.Layout(width="auto")


class Writing(ipw.VBox):
    """A prompt, how to draw, Write and Stop, and the text, which can be looked into layer by layer once it is done.

    ``text`` is the newest :class:`~moe_core.generation.Generation`; None before there is one.
    """

    def __init__(self, run, prompt: str = "", max_new_tokens: int | None = None, *, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, seed: int = 0, layer: int = 0):
        """``run``: a run, or one that is attached to. The rest is ``Run.generate``'s, to begin with; ``layer``: whose
        experts give the colours while it is written.
        """
        answer_while_cells_run()
        self.run, self.text = run, None
        routed, size = run.config.model.n_moe_layer, run.config.model.block_size
        self.prompt = ipw.Textarea(prompt, placeholder="a prompt; empty begins a document", rows=3,
                                   continuous_update=False, layout=ipw.Layout(width="720px"))
        style = {"description_width": "initial"}

        def sized(width: int) -> dict:
            return {"style": style, "layout": ipw.Layout(width=f"{width}px")}
        self.temperature = ipw.FloatSlider(temperature, min=0.0, max=max(2.0, temperature), step=0.05,
                                           readout_format=".2f", description="temperature", style=style)
        self.top_k = ipw.BoundedIntText(top_k or 0, min=0, max=run.config.model.vocab_size,
                                        description="top k (0: all)", **sized(170))
        self.top_p = ipw.BoundedFloatText(top_p or 1.0, min=0.01, max=1.0, step=0.01, description="top p",
                                          **sized(130))
        self.tokens = ipw.BoundedIntText(max_new_tokens or 0, min=0, max=size,
                                         description="tokens (0: to the block's end)", **sized(260))
        self.seed = ipw.BoundedIntText(seed, min=0, max=2**31, description="seed", **sized(130))
        self.layer = ipw.Dropdown(options=range(max(1, routed)), value=layer, description="layer", disabled=not routed,
                                  **sized(120))
        self.write = ipw.Button(description="Write", button_style="primary", layout=ipw.Layout(width="90px"))
        self.halt = ipw.Button(description="Stop", disabled=True, layout=ipw.Layout(width="90px"))
        self.said, self.page, self.shown = ipw.HTML(), ipw.HTML(), ipw.Box(layout=WIDE)
        self.shown.children = [self.page]
        self._stop, self._thread, self._lock = threading.Event(), None, threading.Lock()
        self.write.on_click(lambda button: self.start())
        self.halt.on_click(lambda button: self.stop())
        super().__init__([
            self.prompt, ipw.HBox([self.temperature, self.top_k, self.top_p]),
            ipw.HBox([self.tokens, self.seed, self.layer, self.write, self.halt]), self.said, self.shown])

    def start(self) -> None:
        """Begin to write, in the background; nothing where it is writing already."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._stop.clear()
            # As they stand now, whatever is typed meanwhile.
            how = dict(max_new_tokens=self.tokens.value or None, temperature=self.temperature.value,
                       seed=self.seed.value, top_k=self.top_k.value or None,
                       top_p=self.top_p.value if self.top_p.value < 1 else None)
            self._thread = threading.Thread(target=self._work, args=(self.prompt.value, how), name="moe-writing",
                                            daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop after the token that is being drawn; what there is stays."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is written any more; whether that is so."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """Stop, and take the view out of the page."""
        self.stop()
        super().close()

    def _work(self, prompt: str, how: dict) -> None:
        self.write.disabled, self.halt.disabled = True, False
        self.said.value, self.page.value, self.shown.children = "", "", [self.page]
        began = due = time.monotonic()
        text = None
        try:
            for text in self.run.stream(prompt, **how):
                self.text = text
                if (now := time.monotonic()) >= due:
                    self.page.value = self._written(text)
                    due = time.monotonic() + max(SHORTEST, (time.monotonic() - now) / MAKING_SHARE)
                if self._stop.is_set():
                    break
        except Exception as error:  # what a thread raises is shown nowhere else
            self.said.value = f'<span role="alert">{html.escape(str(error))}</span>'
        if text is not None:
            self._finish(text, time.monotonic() - began)
        self.write.disabled, self.halt.disabled = False, True

    def _written(self, text: Generation) -> str:
        if not text.n_experts:
            return (f'<div class="moe-spec"><style>{STYLE}</style><div class="text">{escaped(text.text, marks=True)}'
                    '</div></div>')
        return written_html(text.inspection(), self.layer.value, text.n_prompt)

    def _finish(self, text: Generation, took: float) -> None:
        new = len(text.token_ids) - text.n_prompt
        if not self.said.value:
            self.said.value = f"{new:,} tokens in {took:.1f} s, by the weights after step {text.step:,}"
        self.page.value = self._written(text)
        if text.n_experts:
            layer = self.layer.value
            view = TokenView(html=section_html(text.inspection(), layer, typical=0, uid="moe-written"),
                             uid="moe-written", layer=layer)
            self.shown.children = [view]
