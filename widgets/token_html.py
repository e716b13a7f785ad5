"""A probe's text coloured by expert, as one piece of HTML that needs no script: it works in a page, in a notebook
without a kernel, and on paper.

Which layer is shown, and which expert is brought out, are radio buttons before the text; a rule of the style for
each of their values does the colouring. All that comes from the text is escaped. Colours are laid over the page's
own background, under the page's own letters, so that they are legible on a light page and on a dark one.
"""

from __future__ import annotations

import html
import re
import unicodedata
import uuid

from moe_core.inspect import Inspection
from moe_core.token_text import CLASSES, shown
from widgets.colors import expert_colors

TOKENS = 1500  # of the probe, from its start
PICKS = 30_000  # tokens * L * K at most, each some 45 bytes of page
RULES = 2048  # L * E at most for which an expert can be brought out: each is a rule of the style
TYPICAL = 8  # tokens shown for each expert

# What has no shape of its own, or changes how its neighbours are read, is shown by its code.
_UNSEEN = ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp")

STYLE = """
.moe-spec{padding:3px;color:inherit;font-size:13px;line-height:1.5}
.moe-spec>input{position:absolute;opacity:0;width:1px;height:1px}
.moe-spec>label{display:inline-block;min-width:1.2em;padding:0 6px;margin:0 1px 3px 0;text-align:center;cursor:pointer;
border:1px solid rgba(128,128,128,.5);border-radius:3px;font-variant-numeric:tabular-nums}
.moe-spec>label[style]{background:color-mix(in srgb,var(--c) 40%,transparent);border-bottom:3px solid var(--c)}
.moe-spec>input:checked+label{outline:2px solid currentColor;font-weight:600}
.moe-spec>input:focus-visible+label{outline:3px solid #578dff}
.moe-spec>.cap{display:inline-block;min-width:5.5em;opacity:.75}
.moe-spec .text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:460px;overflow:auto;margin:6px 0;padding:6px 8px;
border:1px solid rgba(128,128,128,.35);border-radius:3px;line-height:1.85;
font-family:var(--jp-code-font-family,ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace)}
.moe-spec .text span,.moe-spec .chip{background:color-mix(in srgb,var(--c,#888) 34%,transparent);
border-bottom:2px solid var(--s,var(--c,#888));border-radius:2px;margin-right:1px;padding:1px 0;
-webkit-box-decoration-break:clone;box-decoration-break:clone;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.moe-spec .text span:hover{outline:1px solid currentColor}
.moe-spec .text i::before{content:"\\21b5";opacity:.5;font-style:normal}
.moe-spec .text i.tab::before{content:"\\21e5"}
.moe-spec small{font-size:.75em;opacity:.8}
.moe-spec .doc{margin:8px 0 2px;font-family:system-ui,sans-serif;font-size:11px;opacity:.75;
border-top:1px solid rgba(128,128,128,.35)}
.moe-spec .doc:first-child{margin-top:0;border-top:0}
.moe-spec .typical{display:none;border-collapse:collapse;margin:6px 0;color:inherit;font-size:inherit}
.moe-spec .typical :is(td,th){padding:2px 8px 2px 0;text-align:left;vertical-align:baseline;background:none;
font-weight:normal;border:0}
.moe-spec .typical .share{text-align:right;font-variant-numeric:tabular-nums}
.moe-spec .chip{display:inline-block;white-space:pre;padding:0 4px;margin:0 4px 2px 0;
font-family:var(--jp-code-font-family,ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace)}
.moe-spec .said{opacity:.75;font-size:12px;margin:2px 0}
@media print{.moe-spec .text{max-height:none;overflow:visible}}
"""


def section_html(inspection: Inspection, layer: int = 0, tokens: int = TOKENS, typical: int = TYPICAL,
                 uid: str | None = None) -> str:
    """The text coloured by expert and each expert's most typical tokens, with a choice of layer, as inert HTML.

    ``layer``: the one shown at first. ``tokens``: at most this many from the probe's start are shown, fewer where
    layers times picks are many; what is left out is said. ``typical``: tokens shown for each expert. ``uid`` names
    the radio buttons of this piece; None finds a new one.
    """
    n_layer, n_tokens, top_k = inspection.experts.shape
    uid = uid or f"spec{uuid.uuid4().hex[:10]}"
    count = min(tokens, n_tokens, max(1, PICKS // (n_layer * top_k)))
    colors = expert_colors(inspection.n_experts)
    bring_out = n_layer * inspection.n_experts <= RULES
    palette = ";".join(f"--e{e}:{color}" for e, color in enumerate(colors))
    parts = [f'<div class="moe-spec" style="{palette}"><style>{STYLE}{_rules(inspection, bring_out)}</style>']
    parts += ['<span class="cap">layer</span>',
              *(_radio(uid, "i", at, at == layer, str(at), f"layer {at} (block {block})")
                for at, block in enumerate(inspection.blocks)), "<br>", '<span class="cap">expert</span>']
    if bring_out:
        parts.append(_radio(uid, "h", "all", True, "all", "no expert in particular"))
    for e in range(inspection.n_experts):
        style = f' style="--c:var(--e{e})"'
        parts.append(_radio(uid, "h", e, False, str(e), f"bring out expert {e}", style) if bring_out
                     else f"<label{style}>{e}</label>")
    parts.append('<div class="b">')
    parts.append(f'<p class="said">{_said(inspection, count)}</p>')
    parts.append('<div class="text" tabindex="0" role="region" aria-label="Text coloured by expert">')
    parts += _tokens(inspection, count)
    parts.append("</div>")
    parts += [_typical(inspection, at, typical) for at in range(n_layer)] if typical else []
    return "".join([*parts, "</div></div>"])


def written_html(inspection: Inspection, layer: int, n_prompt: int) -> str:
    """A text on its way, each token in the colour of its first expert in one layer, as inert HTML; the first
    ``n_prompt`` tokens, which were given, are faint. Short, to be sent again and again.
    """
    palette = ";".join(f"--e{e}:{color}" for e, color in enumerate(expert_colors(inspection.n_experts)))
    picks = inspection.experts[layer, :, 0].tolist()
    spans = [f'<span style="--c:var(--e{e}){";opacity:.6" * (at < n_prompt)}">{_piece(inspection, at)}</span>'
             for at, e in enumerate(picks)]
    return (f'<div class="moe-spec" style="{palette}"><style>{STYLE}</style><div class="text" tabindex="0" '
            f'role="region" aria-label="Text being written">{"".join(spans)}</div></div>')


def _radio(uid: str, group: str, value: int | str, checked: bool, words: str, title: str, style: str = "") -> str:
    name = f"{uid}-{group}{value}"
    data = ' data-lm-suppress-shortcuts="true"'  # JupyterLab would take their arrow keys as commands to the notebook
    data += f' data-layer="{value}"' if group == "i" else ""
    return (f'<input type="radio" class="{group}{value}" name="{uid}-{group}" id="{name}"{data}'
            f'{" checked" * checked} aria-label="{title}"><label for="{name}" title="{title}"{style}>{words}</label>')


def _rules(inspection: Inspection, bring_out: bool) -> str:
    n_layer, _, top_k = inspection.experts.shape
    rules = []
    for at in range(n_layer):
        on = f".moe-spec>.i{at}:checked"
        rules.append(f"{on}~.b .at{at}{{display:table}}{on}~.b .l{at}d{{text-decoration:line-through}}")
        for e in range(inspection.n_experts):
            rules.append(f"{on}~.b .l{at}e{e}{{--c:var(--e{e})}}")
            if top_k > 1:
                rules.append(f"{on}~.b .l{at}s{e}{{--s:var(--e{e})}}")
            if bring_out:
                rules.append(f"{on}~.h{e}:checked~.b .text span:not(.l{at}e{e}):not(.l{at}s{e}){{opacity:.22}}")
    return "".join(rules)


def _said(inspection: Inspection, count: int) -> str:
    n_tokens, top_k = inspection.experts.shape[1:]
    said = f"Step {inspection.step:,}: the first {count:,} of {n_tokens:,} tokens" if count < n_tokens else (
        f"Step {inspection.step:,}: {n_tokens:,} tokens")
    said += ", each in the colour of its expert" if top_k == 1 else (
        ", each in the colour of its first expert, underlined in that of its second")
    if not inspection.kept.all():
        said += "; struck through: dropped, its experts were full"
    return f"{said}. Hover over a token for its experts in every layer."


def _tokens(inspection: Inspection, count: int) -> list[str]:
    n_layer, _, top_k = inspection.experts.shape
    experts, weights, kept = (values[:, :count].transpose(1, 0, 2).tolist()
                              for values in (inspection.experts, inspection.weights, inspection.kept))
    parts, document = [], None
    for at in range(count):
        if inspection.documents[at] != document:
            document = int(inspection.documents[at])
            kind = inspection.kinds[document]
            parts.append(f'<div class="doc">document {document}{"" if kind is None else f" · {escaped(kind)}"}</div>')
        names, lines = [], []
        for layer in range(n_layer):
            picks = experts[at][layer]
            names.append(f"l{layer}e{picks[0]}")
            if top_k > 1:
                names.append(f"l{layer}s{picks[1]}")
            if not any(kept[at][layer]):
                names.append(f"l{layer}d")
            lines.append(f"layer {layer}: " + ", ".join(
                f"{e} ({w:.2f}{'' if in_ else ' dropped'})"
                for e, w, in_ in zip(picks, weights[at][layer], kept[at][layer], strict=True)))
        about = (shown(inspection.token_bytes[at]), f"id {inspection.token_ids[at]}", CLASSES[inspection.classes[at]])
        title = "&#10;".join(map(escaped, [" · ".join(about), *lines]))
        parts.append(f'<span class="{" ".join(names)}" title="{title}">{_piece(inspection, at)}</span>')
    return parts


def _piece(inspection: Inspection, at: int) -> str:
    """A token's text; the bytes of one that a later token completes."""
    piece = inspection.pieces[at]
    return escaped(piece, marks=True) if piece else f"<small>{inspection.token_bytes[at].hex(' ').upper()} </small>"


def escaped(text: str, marks: bool = False) -> str:
    """``text`` as HTML that cannot act, whatever is in it. With ``marks`` line ends and tabs are made visible."""
    return "".join(_char(char, marks) for char in text)


def _char(char: str, marks: bool) -> str:
    if char == "\n":
        return "<i></i>\n" if marks else "&#10;"
    if char == "\t":
        return '<i class="tab"></i>\t' if marks else "&#9;"
    if unicodedata.category(char) in _UNSEEN:
        code = f"\\u{{{ord(char):x}}}"
        return f"<small>{code}</small>" if marks else code
    return html.escape(char)


def _typical(inspection: Inspection, layer: int, n: int) -> str:
    rows = []
    for e, share in enumerate(inspection.shares()[layer]):
        table = inspection.tokens_of(layer, e, n)
        chips = "".join(
            f'<span class="chip" style="--c:var(--e{e})" title="{row.times} of {row.total}, {row.lift:.1f} times its '
            f'share, z {row.z:.1f}">{_chip(row.token)}</span>'
            for row in table.rename(columns={"count": "times"}).itertuples())
        rows.append(f'<tr><th scope="row">expert {e}</th><td class="share">{share:.1%}</td><td>{chips}</td></tr>')
    return (f'<table class="typical at{layer}"><thead><tr><th>layer {layer}</th><th class="share">demand</th>'
            f'<th>most typical tokens</th></tr></thead><tbody>{"".join(rows)}</tbody></table>')


def _chip(token: str) -> str:
    """A quoted token of a table, without its quotes where it is text, and with its spaces to be seen and counted."""
    text = token if token.startswith("b") else token[1:-1]
    return escaped(re.sub(" +", lambda run: "␣" * len(run[0]) if len(run[0]) < 4 else f"␣×{len(run[0])}", text))
