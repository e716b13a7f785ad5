"""The page's side of the findings: rows that change in place, under a hand that is about to click."""

from __future__ import annotations

import json

import anywidget
import ipywidgets as ipw
from traitlets import Instance

SHORT = 3  # rows that are shown until more is asked for

# anywidget gives a widget two seconds to be ready, and no message ever after; a page that is loaded on a busy machine
# takes longer, and the findings would stand still. So what they say comes in a widget of ipywidgets' own, one that
# takes nothing for HTML.
_ESM = f"""
const SHORT = {SHORT};
export default {{
  async render({{ model, el }}) {{
    const said = await model.widget_manager.get_model(model.get("said").replace("IPY_MODEL_", ""));
    const head = document.createElement("div"), list = document.createElement("div");
    const more = document.createElement("button");
    head.className = "moe-findings-head"; list.className = "moe-findings-list";
    more.className = "moe-more"; more.type = "button";
    head.setAttribute("role", "status");
    el.append(head, list, more);
    let all = false, held = false;
    const put = (node, html) => {{ if (node.moeHtml !== html) node.innerHTML = node.moeHtml = html; }};
    const draw = () => {{
      if (held) return;  // a button that moves between press and release is never clicked
      const {{ rows, summary }} = JSON.parse(said.get("value")), focus = document.activeElement?.dataset?.lever;
      const old = new Map([...list.children].map((row) => [row.dataset.rule, row]));
      put(head, summary);
      rows.forEach((row, i) => {{
        let node = old.get(row.rule);
        old.delete(row.rule);
        if (!node) {{
          node = document.createElement("div");
          node.dataset.rule = row.rule;
          for (const part of ["says", "line", "levers"]) {{
            const child = document.createElement("div");
            child.className = "moe-finding-" + part;
            node.append(child);
          }}
        }}
        node.className = "moe-finding moe-" + row.level + (row.past ? " moe-past" : "");
        node.hidden = i >= SHORT && !all;
        [row.says, row.line, row.levers].forEach((html, k) => put(node.children[k], html));
        if (list.children[i] !== node) list.insertBefore(node, list.children[i] ?? null);
      }});
      old.forEach((node) => node.remove());
      more.hidden = rows.length <= SHORT;
      more.textContent = all ? "Show fewer" : `${{rows.length - SHORT}} more`;
      if (focus) [...list.querySelectorAll("[data-lever]")].find((b) => b.dataset.lever === focus)?.focus();
    }};
    const release = () => {{ if (held) setTimeout(() => {{ held = false; draw(); }}); }};  // after the click
    const press = () => {{ held = true; }};
    list.addEventListener("pointerdown", press);
    for (const end of ["pointerup", "pointercancel", "blur"]) window.addEventListener(end, release);
    list.addEventListener("click", (event) => {{
      const button = event.target.closest("button[data-lever]");
      if (!button || button.disabled) return;
      button.disabled = true;  // until the answer has redrawn it; where it was refused, for a moment
      setTimeout(() => {{ button.disabled = false; }}, 3000);
      model.send({{ lever: button.dataset.lever }});
    }});
    more.addEventListener("click", () => {{ all = !all; draw(); }});
    said.on("change:value", draw);
    draw();
    return () => {{
      for (const end of ["pointerup", "pointercancel", "blur"]) window.removeEventListener(end, release);
      said.off("change:value", draw);
    }};
  }},
}};
"""

_CSS = """
.moe-findings { font-size: var(--jp-ui-font-size1); color: var(--jp-ui-font-color1); contain: style; }
.moe-findings-bar { position: relative; }
.moe-findings-bar .moe-findings { flex: 1 1 100%; min-width: 0; }
.moe-findings-bar .widget-checkbox { position: absolute; top: 0; right: 0; width: auto; margin: 0; }
.moe-findings-head { min-height: 28px; line-height: 28px; padding-right: 130px; }
.moe-findings-head b { font-weight: 600; }
.moe-findings-head i { font-style: normal; color: var(--jp-ui-font-color2); }
.moe-findings-head span::before, .moe-finding b::before { content: ""; display: inline-block; width: 8px;
  height: 8px; border-radius: 50%; margin-right: 6px; background: #2e9e5b; }
.moe-findings-head .moe-alarm::before, .moe-alarm b::before { background: #d13438; }
.moe-findings-head .moe-watch::before, .moe-watch b::before { background: #d98200; }
.moe-findings-head span { margin-right: 12px; }
.moe-finding { display: grid; grid-template-columns: minmax(0, 1fr) 168px minmax(180px, 0.85fr); gap: 2px 14px;
  align-items: center; padding: 5px 0; border-top: 1px solid var(--jp-border-color2); }
.moe-finding[hidden], .moe-more[hidden] { display: none; }
.moe-finding-says { line-height: 1.4; overflow-wrap: anywhere; }
.moe-finding-says small { display: block; font-size: 11px; color: var(--jp-ui-font-color2); }
.moe-finding-levers { display: flex; flex-flow: row wrap; gap: 4px; }
.moe-finding-levers button, .moe-more { font: inherit; font-size: 12px; line-height: 1.4; padding: 2px 8px;
  border: 1px solid var(--jp-border-color1); border-radius: 2px; cursor: pointer; color: inherit;
  background: var(--jp-layout-color2); font-variant-numeric: tabular-nums; }
.moe-finding-levers button:hover:enabled, .moe-more:hover { background: var(--jp-layout-color3); }
.moe-finding-levers button:disabled { cursor: default; color: var(--jp-ui-font-color2); background: none; }
.moe-finding-levers button b { font-weight: 600; }
.moe-finding-levers button b::before { content: none; }
.moe-finding-levers span { font-size: 12px; color: var(--jp-ui-font-color2); }
.moe-more { margin-top: 4px; }
.moe-past { opacity: 0.6; }
.moe-spark { display: block; overflow: visible; color: var(--jp-ui-font-color2); }
.moe-alarm .moe-spark { color: #d13438; }
.moe-watch .moe-spark { color: #d98200; }
.moe-spark .moe-band { fill: #2e9e5b; opacity: 0.2; }
.moe-spark polyline { fill: none; stroke: currentColor; stroke-width: 1.3; }
.moe-spark .moe-old { stroke: #888; opacity: 0.7; }
.moe-spark circle { fill: currentColor; }
@container (max-width: 800px) {
  .moe-finding { grid-template-columns: minmax(0, 1fr) 168px; }
  .moe-finding-levers { grid-column: 1 / -1; }
}
@container (max-width: 520px) { .moe-finding { grid-template-columns: 1fr; } }
"""


class FindingsView(anywidget.AnyWidget):
    """``rows``: dicts of rule, level, past, and escaped HTML: says, line, levers; ``summary``: the line above.

    A click on a button of ``levers`` sends {"lever": its data-lever}.
    """

    _esm = _ESM
    _css = _CSS
    said = Instance(ipw.Text).tag(sync=True, **ipw.widget_serialization)

    def __init__(self):
        super().__init__(said=ipw.Text(tooltip="Findings", layout={"display": "none"}))
        self.add_class("moe-findings")
        self.say("", [])

    def say(self, summary: str, rows: list[dict]) -> None:
        """Show these."""
        self.summary, self.rows = summary, rows
        self.said.value = json.dumps({"summary": summary, "rows": rows})
