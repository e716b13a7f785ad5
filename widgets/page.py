"""The panel's side of the page: its style, its width, the focus, and the names that ipywidgets leaves out."""

from __future__ import annotations

import anywidget
from traitlets import Float, Int, List

_ESM = """
export default {
  render({ model, el }) {
    model.set("views", model.get("views") + 1);
    model.save_changes();
    let panel = null, timer = 0, gone = false;
    const say = (name, value) => {
      if (!gone && model.get(name) !== value) { model.set(name, value); model.save_changes(); }
    };
    const rows = () => [...panel.querySelectorAll(".moe-knob")];
    // Where a hand holds a slider that it has not let go of; the slider itself speaks only of where it was let go.
    const follow = (slider) => {
      const hold = slider?.noUiSlider;
      if (!hold || hold.moeFollowed) return;
      hold.moeFollowed = true;
      let held = false;
      hold.on("start.moe", () => { held = true; });
      hold.on("slide.moe", (_, __, values) => {
        const row = slider.closest(".moe-knob");
        if (!held || row === null) return;
        row.parentElement.style.setProperty("--moe-aim", `${row.offsetTop + row.offsetHeight}px`);
        say("aim", [rows().indexOf(row), values[0]]);
      });
      hold.on("end.moe", () => { held = false; say("aim", []); });
    };
    // ipywidgets builds a slider's handle without a name, anew when its range changes, and puts the tooltip
    // of a number field on a label that it hides.
    const name = () => {
      for (const label of panel.querySelectorAll(".widget-text > .widget-label[title]"))
        label.parentElement.querySelector("input")?.setAttribute("aria-label", label.title);
      for (const slider of panel.querySelectorAll(".widget-slider")) {
        slider.querySelector("[role=slider]")?.setAttribute(
          "aria-label", slider.querySelector(".widget-label").textContent);
        follow(slider.querySelector(".noUi-target"));
      }
      for (const head of panel.querySelectorAll(".jupyter-widget-Collapse-header"))  // which no key reaches either
        Object.assign(head, { tabIndex: 0, role: "button" }).dataset.lmSuppressShortcuts = "true";
      const figure = panel.querySelector(".js-plotly-plot");
      figure?.setAttribute("role", "figure");
      figure?.setAttribute("aria-label", "Charts of the run");
    };
    const names = new MutationObserver(name);
    const focusin = ({ target }) => {
      // JupyterLab would take arrows and letters that are meant for a list as commands to the notebook.
      if (target.matches("select")) target.dataset.lmSuppressShortcuts = "true";
      say("focus", rows().indexOf(target.closest(".moe-knob")));
    };
    const focusout = () => say("focus", -1);
    const keydown = (event) => {
      if (!event.target.matches(".jupyter-widget-Collapse-header") || !["Enter", " "].includes(event.key)) return;
      event.preventDefault();
      event.target.click();
    };
    // ipywidgets' word of the Enter key overtakes the last letters before a slow kernel; a click comes behind them.
    const enter = (event) => {
      if (event.key !== "Enter" || !event.target.matches(".moe-note input")) return;
      event.stopPropagation();
      event.target.dispatchEvent(new Event("change", { bubbles: true }));
      event.target.closest(".moe-note").querySelector("button").click();
    };
    // An element is placed after it is rendered; its first size says that it is in the page.
    const size = new ResizeObserver(([entry]) => {
      if (panel === null && (panel = el.closest(".moe-workbench")) !== null) {
        panel.addEventListener("focusin", focusin);
        panel.addEventListener("focusout", focusout);
        panel.addEventListener("keydown", keydown);
        panel.addEventListener("keypress", enter, true);
        for (const part of panel.querySelectorAll(".moe-knobs, .moe-charts"))
          names.observe(part, { childList: true, subtree: part.matches(".moe-knobs") });
        name();
        say("focus", -1);
        say("aim", []);
      }
      const width = 10 * Math.floor(entry.contentRect.width / 10);
      clearTimeout(timer);
      if (width > 0) timer = setTimeout(say, 150, "width", width);  // once, when a side bar has come to rest
    });
    size.observe(el);
    return () => { gone = true; clearTimeout(timer); size.disconnect(); names.disconnect(); };
  },
};
"""

_CSS = """
.moe-workbench { container-type: inline-size; gap: 8px; overflow: hidden; padding: 2px;
  scrollbar-color: var(--jp-border-color0) transparent; }  /* of the theme, where a browser's own are light */
.moe-workbench > * { margin: 0; }
.moe-workbench .jupyter-widgets-disconnected::before { content: none; }
.moe-workbench.jupyter-widgets-disconnected::before {
  content: "The kernel that drove this panel is gone. Run its cell again."; font-family: inherit; padding: 2px 0;
  color: var(--jp-error-color1, #d13438); }
.moe-workbench.jupyter-widgets-disconnected > *, .moe-workbench.moe-over > :not(.moe-run) { opacity: 0.55; }
.moe-workbench.jupyter-widgets-disconnected > * { pointer-events: none; }
.moe-charts { overflow: auto hidden; }  /* a view that is narrower than the one that the figure was laid out for */
.moe-over .moe-findings-levers { pointer-events: none; }
.moe-refused { order: 1; }  /* behind all else in its row, whose buttons stay where they are */
.moe-key { font-size: 11px; color: var(--jp-ui-font-color2); }
.moe-page { height: 0; overflow: hidden; }
.moe-workbench .widget-html-content { line-height: 1.35; }
.moe-run, .moe-branches { display: flex; flex-flow: row wrap; align-items: center; gap: 6px; }
.moe-run .widget-button, .moe-branches .widget-button, .moe-note .widget-button { width: auto; padding: 0 14px; }
.moe-run .moe-status { flex: 1 1 260px; min-width: 0; }
.moe-charts, .moe-knob-text, .moe-status { contain: layout paint style; }
.moe-status-line { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline;
  font-size: var(--jp-ui-font-size1); color: var(--jp-ui-font-color1); font-variant-numeric: tabular-nums; }
.moe-status-line .moe-muted { color: var(--jp-ui-font-color2); }
.moe-state { font-weight: 600; }
.moe-state::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 50%;
  margin-right: 6px; background: var(--jp-ui-font-color3); }
.moe-state-training::before { background: #2e9e5b; }
.moe-state-pausing::before, .moe-state-paused::before, .moe-state-moving::before { background: #d98200; }
.moe-state-failed::before { background: #d13438; }
.moe-state-gone::before { background: none; border: 2px solid #d13438; box-sizing: border-box; }
.moe-error { color: var(--jp-error-color1, #d13438); }
.moe-workbench progress { appearance: none; display: block; width: 100%; height: 4px; border: 0;
  border-radius: 2px; overflow: hidden; background: var(--jp-border-color2); }
.moe-workbench progress::-webkit-progress-bar { background: var(--jp-border-color2); }
.moe-workbench progress::-webkit-progress-value { background: #2e9e5b; }
.moe-workbench progress::-moz-progress-bar { background: #2e9e5b; }
.moe-knobs { border: solid var(--jp-border-color2); border-width: 1px 0; padding: 6px 0; overflow: visible;
  position: relative; }
.moe-what-if { position: absolute; z-index: 5; top: var(--moe-aim, 0); left: 24px; width: auto; max-width: 560px;
  margin: 0; pointer-events: none; }
.moe-what-if .widget-html-content { overflow: visible; }
.moe-then { padding: 8px 12px; border: 1px solid var(--jp-border-color1); border-radius: 3px;
  background: var(--jp-layout-color1); box-shadow: 0 3px 10px rgba(0, 0, 0, 0.25); line-height: 1.35;
  font-size: var(--jp-ui-font-size1); color: var(--jp-ui-font-color1); font-variant-numeric: tabular-nums; }
.moe-then p { margin: 0; }
.moe-then p + p, .moe-then table + p { margin-top: 3px; font-size: 11px; color: var(--jp-ui-font-color2); }
.moe-then table, .moe-groups table { border-collapse: collapse; margin: 4px 0; }
.moe-then th, .moe-then td, .moe-groups th, .moe-groups td { padding: 1px 18px 1px 0; text-align: left;
  font-weight: normal; white-space: nowrap; color: inherit; background: none; border: 0; }
.moe-then th, .moe-then i, .moe-groups tr:first-child th { color: var(--jp-ui-font-color2); font-style: normal; }
.moe-groups { font-size: var(--jp-ui-font-size1); color: var(--jp-ui-font-color1);
  font-variant-numeric: tabular-nums; }
.moe-knob { display: grid !important; align-items: center; gap: 0 10px; overflow: hidden;
  grid-template-columns: minmax(200px, 1fr) 74px 78px 70px minmax(350px, 1.1fr);
  --jp-widgets-inline-height: 24px; }
.moe-knob > * { margin: 2px 0; width: auto; min-width: 0; }
.moe-knob input:not(:hover) { -moz-appearance: textfield; }  /* the arrows take the room of two digits */
.moe-knob input:not(:hover)::-webkit-inner-spin-button { appearance: none; }
.moe-knob .widget-slider .widget-label { width: 134px; text-align: left; color: var(--jp-ui-font-color1); }
.moe-knob-says { display: grid; grid-template-columns: minmax(76px, max-content) minmax(102px, max-content) 1fr;
  gap: 0 8px;
  font-size: var(--jp-ui-font-size1); color: var(--jp-ui-font-color2); font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.moe-knob-says > span { overflow: hidden; text-overflow: ellipsis; }
.moe-knob-says b { color: var(--jp-ui-font-color1); font-weight: 600; }
.moe-knob .moe-help { grid-column: 1 / -1; margin: -2px 0 3px; font-size: 11px; line-height: 1.2;
  color: var(--jp-ui-font-color2); }
.moe-pending { color: #b86e00; font-weight: 600; }
.moe-applied { color: #268a4d; }
[data-jp-theme-light="false"] .moe-pending { color: #f0a93b; }
[data-jp-theme-light="false"] .moe-applied { color: #5ec489; }
.moe-note { display: flex; flex-flow: row wrap; gap: 6px; }
.moe-note .widget-text { flex: 1 1 240px; width: auto; margin: 2px 0; }
.moe-log { max-height: 108px; overflow-y: auto; font-family: var(--jp-code-font-family);
  font-size: 11px; line-height: 1.5; color: var(--jp-ui-font-color2); }
.moe-log div { display: grid; grid-template-columns: 64px 1fr; overflow-wrap: anywhere; }
@container (max-width: 815px) {
  .moe-knob { grid-template-columns: minmax(200px, 1fr) 74px 78px 72px; padding: 2px 0; }
  .moe-knob-text { grid-column: 1 / -1; }
  .moe-knob-says { padding-left: 132px; }
}
@container (max-width: 520px) {
  .moe-knob { grid-template-columns: 1fr 1fr 1fr; }
  .moe-knob .widget-slider { grid-column: 1 / -1; }
  .moe-knob-says { padding-left: 0; }
}
"""


class Page(anywidget.AnyWidget):
    """Lies in the panel, unseen. ``width``: the panel's, in pixels, rounded to 10; 0 until a page shows it.

    ``focus``: which knob's row has the keyboard's focus, counted from 0; -1 for none. ``aim``: the row whose slider
    a pointer holds, and the value that it is at; empty when none is held. ``views``: how many times a page has
    made the panel.
    """

    _esm = _ESM
    _css = _CSS
    width = Int(0).tag(sync=True)
    focus = Int(-1).tag(sync=True)
    aim = List(Float()).tag(sync=True)
    views = Int(0).tag(sync=True)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_class("moe-page")
