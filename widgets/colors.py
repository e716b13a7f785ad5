"""The colours of the charts, and one for each expert: legible on a white and on a black page."""

from __future__ import annotations

import colorsys

# Petroff, "Accessible Color Sequences for Data Visualization" (2021), the sequence of eight; its khaki and
# its pale blue are darker here: a notebook's page is white or black, and its charts cannot know which. Each further
# one is, of those legible on both, the farthest from all before it to the nearest eye, colour-blind ones included.
PALETTE = ("#1845fb", "#ff5e02", "#c91f16", "#c849a9", "#969662", "#60bcbe", "#578dff", "#6b696a",
           "#790caa", "#921831", "#86c255", "#ce9ef3", "#ff619e", "#613d61", "#e700e7", "#ff9292",
           "#557931", "#553d86", "#316d92", "#8649b6", "#9e6155", "#6100ce", "#55aa0c", "#005531",
           "#7986c2", "#86aace", "#ce6149", "#3100f3", "#619292", "#31926d", "#ff8649", "#9eb66d")
BLUE, ORANGE, MAGENTA, GREY = "#578dff", "#ff5e02", "#c849a9", "#888888"
HEALTHY = "#2e9e5b"
STARVED, FAIR, CROWDED = "#2166ac", "#dddddd", "#d6541f"
NONE, ALL = "#08306b", "#67000d"  # of a heatmap's ends, far beyond these
GREYED = "rgba(128,128,128,0.55)"  # other branches


def expert_colors(n_experts: int) -> list[str]:
    """One colour an expert: those of the palette, then the same hues in lighter and darker shades."""
    rounds = -(-n_experts // len(PALETTE))
    return [_shade(PALETTE[i % len(PALETTE)], i // len(PALETTE), rounds) for i in range(n_experts)]


def _shade(color: str, turn: int, rounds: int) -> str:
    if turn == 0:
        return color
    hue, light, strength = colorsys.rgb_to_hls(*(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)))
    room = 0.8 - light if turn % 2 else 0.25 - light  # lighter on odd rounds, darker on even ones
    light += room * ((turn + 1) // 2) / (rounds // 2 + 1)
    return "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(hue, light, strength))
