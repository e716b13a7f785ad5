"""What a report says, section by section, in the order of an experiment's notes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd

from moe_core import gates
from moe_core.inspect import Inspection
from widgets import compare, report_specialisation
from widgets.marks import KEY, say, superseded
from widgets.record import Record
from widgets.report_blocks import (
    Block,
    Bullets,
    Document,
    Entry,
    Heading,
    Note,
    Picture,
    Pictures,
    State,
    Table,
    Text,
    Tiles,
    code,
    number,
)
from widgets.report_figures import ALTS, draw
from widgets.report_setup import reproduce, setup
from widgets.report_words import and_others, assessment, is_expert, observations, span

BOOKKEEPING = ("mirror",)  # kinds of event that say nothing of the experiment
LEVEL_OF = {gates.PASSED: "ok", gates.FAILED: "alarm", gates.NOT_REACHED: "none"}
HOW_TOLD = (
    "Each turn of a knob stands at the first step that it acted on, with the metrics in which it stands out from the "
    "noise: an interrupted time series over 50 steps on either side, a smooth trend and autocorrelated noise taken "
    "into account, Holm's method over all metrics of a turn. What was turned at one step is told together. Intervals "
    "are at 95 %, widened by Holm's method.")
INTERVAL = "95 % interval (Holm)"
SNAPSHOT = ("train/loss", "train/ce", "val/loss", "val/loss_with_aux", "router/entropy_mean", "router/top1_p_mean",
            "router/max_frac_mean", "router/max_frac_max", "router/active_min", "router/aux_mean", "router/z_mean",
            "router/drop_frac_mean", "router/no_expert_mean", "router/bias_max", "grad/norm", "router/temp",
            "router/noise_std", "router/load_balance_alpha", "lr", "perf/tok_s")


def document(record: Record, answers: Sequence[gates.Answer], baselines: Sequence[Record],
             base_answers: Sequence[Sequence[gates.Answer]], snapshots: Sequence[int] | None = None,
             title: str | None = None, inspection: Inspection | None = None) -> Document:
    """The whole report. ``answers``: of the gates; ``base_answers``: the same gates' for each baseline."""
    parts = [_tiles(record, answers), *setup(record), *_snapshots(record, snapshots), *_observations(record),
             *_assessment(record), *(report_specialisation.blocks(inspection) if inspection is not None else []),
             *_timeline(record), *_recommendations(record),
             *_checklist(answers, baselines, base_answers), *_comparison(record, baselines), *reproduce(record)]
    branch = "" if record.branch == "main" else f", branch {code(record.branch)}"
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return Document(title or record.name, f"Experiment report at step {record.last_step:,}{branch}; written {written}",
                    tuple(parts))


def _tiles(record: Record, answers: Sequence[gates.Answer]) -> Tiles:
    planned = f"of {record.config.optim.max_iters:,} planned" if record.config is not None else "imported"
    tiles = [("steps", f"{record.last_step:,}", planned, "none")]
    steps, values = record.series("val/loss")
    if len(steps):
        at, best = record.best_validation()
        tiles.append(("validation loss", number(values[-1]), f"lowest {number(best)} at step {at:,}", "none"))
    if record.routed and len(record.series("router/entropy_mean")[1]):
        entropy = record.series("router/entropy_mean")[1][-1]
        tiles.append(("router entropy", number(entropy, 3),
                      f"{entropy / math.log(record.n_experts):.2f} of ln {record.n_experts}", "none"))
    if record.config is not None:
        counts = record.counted()
        worst = next(iter(counts), "ok")
        said = ", ".join(f"{n} {level}" for level, n in counts.items()) or "nothing to act on"
        tiles.append(("health", worst, said, worst))
    if answers:
        counts = {state: sum(answer.state == state for answer in answers) for state in LEVEL_OF}
        level = next(LEVEL_OF[state] for state in (gates.FAILED, gates.NOT_REACHED, gates.PASSED) if counts[state])
        said = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
        tiles.append(("acceptance", f"{counts[gates.PASSED]} of {len(answers)}", said, level))
    return Tiles(tuple(tiles))


# ---- snapshots, observations, assessment -----------------------------------------------------------------

def _snapshots(record: Record, wanted: Sequence[int] | None) -> list[Block]:
    steps = record.metrics.index.to_numpy()
    if not len(steps):
        return [Heading("Snapshots"), Text("No step is logged yet.")]
    chosen = _quarters(record) if wanted is None else sorted(dict.fromkeys(wanted))
    rows = []
    for metric in SNAPSHOT:
        logged, values = record.series(metric)
        if not len(logged):
            continue
        cells = []
        for step in chosen:
            k = int(np.searchsorted(logged, step, side="right")) - 1
            cells.append("–" if k < 0 else number(values[k]) if logged[k] == step
                         else f"{number(values[k])} (at {logged[k]})")
        rows.append((f"`{metric}`", *cells))
    return [Heading("Snapshots"), Table(("metric", *(f"step {step:,}" for step in chosen)), tuple(rows),
                                        tuple(range(1, len(chosen) + 1)))]


def _quarters(record: Record) -> list[int]:
    """The validated steps, or the logged ones, nearest to each quarter of the way."""
    logged = record.metrics.index.to_numpy()
    steps = next((s for metric in ("val/loss", "val/loss_with_aux") if len(s := record.series(metric)[0]) >= 4), logged)
    near = {int(steps[np.abs(steps - part * logged[-1]).argmin()]) for part in (0.25, 0.5, 0.75)}
    return sorted(near | {int(logged[-1])})


def _observations(record: Record) -> list[Block]:
    drawn = draw(record)
    pictures = tuple(Picture(name, drawn[name], ALTS[name], wide=name == "experts") for name in drawn)
    table = observations(record)
    key = [Text(f"{KEY}.")] if pictures and record.marks.steps else []
    return [Heading("Observations"), *([table] if table.rows else []), *key,
            *([Pictures(pictures)] if pictures else [])]


def _assessment(record: Record) -> list[Block]:
    parts: list[Block] = [Heading("Assessment")]
    for head, words, found in assessment(record):
        parts += [Heading(head, 3), *([Text(words)] if words else []), *([Bullets(found)] if found else [])]
    return parts if len(parts) > 1 else [*parts, Text("Nothing is logged that an assessment needs.")]


# ---- timeline --------------------------------------------------------------------------------------------

def _timeline(record: Record) -> list[Block]:
    parts: list[Block] = [Heading("Timeline")]
    if not record.events:
        return [*parts, Text("No knob was turned, nothing was noted.")]
    if any(event["kind"] == "knob" for event in record.events):
        parts.append(Text(HOW_TOLD))
    return parts + _entries(record.events, record.effects)


def _entries(events: Sequence[dict], effects: pd.DataFrame | None = None) -> list[Block]:
    """An entry for each event, but one for all turns at a step, with what they brought where ``effects`` tell."""
    parts: list[Block] = []
    events = [{**event["payload"], **event} for event in events]
    turns: dict[int, list[str]] = {}
    answers: dict[int, list[str]] = {}  # the words of the findings that they answer
    for event, lost in zip(events, superseded(events), strict=True):
        if event["kind"] == "knob":
            turns.setdefault(event["step"], []).append(say(event | {"superseded": lost}))
            answers.setdefault(event["step"], []).extend(
                [f"In answer to: {event['why']}."] if isinstance(event.get("why"), str) else [])
    for event in events:
        kind, at = event["kind"], f"step {event['step']:,}"
        if kind == "note":
            parts.append(Entry(at, kind, "Note", (Note(str(event.get("text", ""))),)))
        elif kind == "knob":
            if said := turns.pop(event["step"], None):
                whys = dict.fromkeys(answers[event["step"]])
                brought = () if effects is None else tuple(effect_blocks(effects, event["step"]))
                parts.append(Entry(at, kind, "; ".join(said), (*map(Text, whys), *brought)))
        elif kind == "finding":  # it came, at its level, or it went
            parts.append(Entry(at, event.get("level", "watch") if event.get("state") == "here" else "ok", say(event)))
        elif kind not in BOOKKEEPING:
            parts.append(Entry(at, kind, _happened(event)))
    return parts


def _happened(event: dict) -> str:
    """As the panel says it; what a person named, in a branch's or a checkpoint's name, is code."""
    if event["kind"] == "branch":
        return f"Branch {code(event['branch'])}, from step {event['step']:,}"
    if event["kind"] == "checkpoint" and event.get("name") not in (None, "", f"step {event['step']}"):
        return f"Checkpoint: {code(event['name'])}"
    return say(event)


def effect_blocks(effects: pd.DataFrame, step: int) -> list[Block]:
    """What the turns at a step brought, in a sentence and a table."""
    here = effects[effects["step"] == step]
    here = here[here["knob"] == here["knob"].iloc[0]] if len(here) else here
    here = _once(here)
    tested = here[here["stands_out"].notna() & ~here["said"].str.endswith("constant")]
    cut = sorted({part for said in here["said"] for part in said.split("; ")
                  if part.startswith(("before:", "after:"))})
    ends = f" ({'; '.join(cut)})" if cut else ""
    if not len(tested):
        return [Text(f"Too few steps on one side to tell what it brought{ends}.")]
    found = tested[tested["stands_out"].astype(bool)]
    if not len(found):
        return [Text(f"None of {len(tested)} metrics stands out from the noise{ends}.")]
    rows = tuple((row["metric"], number(row["before"]), number(row["after"]), _signed(row["difference"]),
                  f"{_signed(row['low'])} to {_signed(row['high'])}") for _, row in found.iterrows())
    return [Text(f"{len(found)} of {len(tested)} metrics {'stands' if len(found) == 1 else 'stand'} out{ends}."),
            Table(("metric", "mean before", "mean after", "change beside the trend", INTERVAL), rows, (1, 2, 3, 4))]


def _once(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the demand of an expert whose served share is the same."""
    if not len(rows):
        return rows
    served = rows.set_index("metric")["after"]
    same = [is_expert(m) and "_dem_" in m and served.get(m.replace("_dem_", "_srv_")) == after
            for m, after in zip(rows["metric"], rows["after"], strict=True)]
    return rows[~np.array(same)]


def _signed(value: float) -> str:
    return number(value, 3, sign=True)


# ---- recommendations, checklist, comparison --------------------------------------------------------------

def _recommendations(record: Record) -> list[Block]:
    parts: list[Block] = [Heading("Recommendations")]
    asking = [same for same in record.asking if same[0].levers]
    if not asking:
        return [*parts, Text("No finding asks for a turn." if record.config is not None else
                             "The log does not say how many experts there are, so that no range was judged.")]
    for same in asking:
        finding = same[0]
        undo = dict.fromkeys(lever.undo for lever in finding.levers)
        turns = tuple(f"{' or '.join(f'`{lever.text}`' for lever in finding.levers if lever.undo == when)}; "
                      f"watch {finding.metric}; undo: {when}" for when in undo)
        parts.append(Entry(span(finding), finding.level,
                           f"{finding.level.capitalize()}: {finding.text}{and_others(same[1:])}", (Bullets(turns),)))
    return parts


def _checklist(answers: Sequence[gates.Answer], baselines: Sequence[Record],
               base_answers: Sequence[Sequence[gates.Answer]]) -> list[Block]:
    if not answers:
        return []
    rows = []
    for k, answer in enumerate(answers):
        others = [State(theirs[k].state, LEVEL_OF[theirs[k].state]) for theirs in base_answers]
        rows.append((code(answer.gate.text), State(answer.state, LEVEL_OF[answer.state]), answer.says, *others))
    names = [code(name) for name in compare.labels(baselines)]
    return [Heading("Acceptance checklist"), Table(("gate", "state", "number", *names), tuple(rows))]


def _comparison(record: Record, baselines: Sequence[Record]) -> list[Block]:
    parts: list[Block] = []
    if len(record.branches) > 1:
        names = {branch.id: branch.name for branch in record.branches}
        rows = tuple((code(b.name), code(names[b.parent]) if b.parent else "",
                      "" if b.fork_step is None else f"{b.fork_step:,}",
                      f"{record.last_steps[b.name]:,}", "this one" if b.name == record.branch else "")
                     for b in record.branches)
        parts += [Heading("Branches", 3), Table(("branch", "from", "at step", "last step", ""), rows, (2, 3))]
        partings = {name: parting for name, *parting in record.partings}
        for branch in record.branches:
            if said := record.elsewhere.get(branch.name):
                parts += [Text(f"What was done on {code(branch.name)} alone:"), *_entries(said)]
            if branch.name in partings:
                parts += _parting(record, branch.name, *partings[branch.name])
    if baselines:
        both = [record, *baselines]
        parts += compare.blocks(both, compare.labels(both), level=3)
    return [Heading("Comparison"), *parts] if parts else []


def _parting(record: Record, name: str, common: int, upto: int, table: pd.DataFrame) -> list[Block]:
    table = table.assign(after=table["b"])
    table = _once(table)
    found = table[table["stands_out"].fillna(False).astype(bool)]
    tested, steps = int(table["stands_out"].notna().sum()), f"Over steps {common + 1} to {upto}"
    if not len(table):
        return [Text(f"{steps} {code(name)} and {code(record.branch)} are identical in every metric.")]
    said = (f"{steps}, on the same batches, {len(found)} of {tested} metrics of "
            f"{code(name)} stand out from {code(record.branch)}, step by step.")
    rows = tuple((row["metric"], number(row["a"]), number(row["b"]), _signed(row["difference"]),
                  f"{_signed(row['low'])} to {_signed(row['high'])}") for _, row in found.iterrows())
    head = ("metric", code(record.branch), code(name), "difference", INTERVAL)
    return [Text(said), *([Table(head, rows, (1, 2, 3, 4))] if rows else [])]
