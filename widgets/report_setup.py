"""With what a run was made, and how to make it again: the first and the last section of a report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moe_core import commands, origin
from moe_core.config import RunConfig
from moe_core.presets import preset
from moe_core.twins import active_params, total_params
from widgets.record import Record
from widgets.report_blocks import Block, Bullets, Code, Heading, Table, Text, code

PAGE = 84  # characters of a line of code that fit on paper


def setup(record: Record) -> list[Block]:
    parts: list[Block] = [Heading("Setup")]
    rows = [("run", code(record.name)), ("branch", code(record.branch))]
    if record.parent:
        rows.append((origin.words(record.parent), code(record.parent.get("path")) + origin.at_step(record.parent)))
    config = record.config
    if config is None:
        rows += [(str(key), code(value)) for key, value in _imported(record).items()]
        return [*parts, Text("Imported from a log: what the log does not hold is absent here."),
                Table(("", ""), tuple(rows))]
    data = config.data
    rows += [("data", code(data.dataset_name) + (f", {code(data.dataset_config)}" if data.dataset_config else "")),
             *_model(config), *_training(config, record.last_step), ("seed", str(config.seed))]
    for what, values in record.made.items():
        rows.append((what, "; ".join(f"{key} {value}" for key, value in values.items())))
    if not record.made:
        rows.append(("versions, hardware", "not recorded by this run"))
    parts += [Code(_wrapped(commands.spell(config)), "bash"), Table(("", ""), tuple(rows))]
    name, changes = commands.from_preset(config)
    theirs = preset(name).flat()
    changed = tuple((f"`{key}`", code(theirs[key]), code(value)) for key, value in changes.items())
    if not changed:
        return [*parts, Text(f"The config is the preset `{name}` itself.")]
    return [*parts, Heading(f"Where it differs from the preset {name}", 3),
            Table(("field", f"`{name}`", "here"), changed)]


def _model(config: RunConfig) -> list[tuple[str, str]]:
    m, r = config.model, config.router
    kv = "" if m.kv_heads == m.n_head else f" ({m.kv_heads} of keys and values)"
    width = f", MLP of width {m.dense_width:,}" if not m.n_experts else ""
    rows = [("model", f"{m.n_layer} layers of width {m.d_model:,}, {m.n_head} attention heads{kv}{width}, "
                      f"block of {m.block_size:,} tokens, vocabulary of {m.vocab_size:,}"),
            ("parameters", f"{total_params(config):,}, of which a token is multiplied with {active_params(config):,}")]
    if m.n_experts:
        first = f" after {m.skip_first_n_moe} dense" if m.skip_first_n_moe else ""
        shared = f", {m.n_shared_experts} shared" if m.n_shared_experts else ""
        chosen = f"experts choose tokens, {min(r.capacity_factor * r.top_k, m.n_experts):g} a token on average"
        picks = f"top {r.top_k}" if r.routing == "token" else chosen
        room = "dropless" if r.dropless else f"capacity factor {r.capacity_factor:g}"
        rows.append(("experts", f"{m.n_experts} of width {m.ff_width:,} in each of {m.n_moe_layer} layers{first}"
                                f"{shared}; {picks}; {room}; balance `{r.balance}`"))
    return rows


def _training(config: RunConfig, last: int) -> list[tuple[str, str]]:
    o, tokens = config.optim, config.tokens_per_step
    sums = f" in {o.gradient_accumulation_steps} micro-batches" if o.gradient_accumulation_steps > 1 else ""
    sequences = o.batch_size * o.gradient_accumulation_steps
    return [("batch", f"{sequences:,} sequences{sums}, {tokens:,} tokens a step"),
            ("steps", f"{last:,} of {o.max_iters:,} planned; {tokens * last:,} tokens seen"),
            ("optimizer", f"`{o.optimizer}`, learning rate {o.learning_rate:g} to {o.min_lr:g}, "
                          f"{o.warmup_iters:,} steps of warmup, decay until step {o.lr_decay_iters:,}, "
                          f"gradient clip {o.grad_clip:g}")]


def _wrapped(command: str) -> str:
    """A command line in lines that fit a page, each but the last with a backslash behind it."""
    words = re.split(r" (?=--)", command)
    return _filled(f"{words[0]} ", words[1:], " \\", "    ").rstrip()


def _filled(head: str, words: Sequence[str], end: str, indent: str) -> str:
    """The words behind ``head``, a space between them; where a line is full ``end`` closes it, ``indent`` opens one."""
    lines, fresh = [head], True
    for word in words:
        if not fresh and len(lines[-1]) + len(word) > PAGE:
            lines[-1] += end
            lines.append(indent)
            fresh = True
        lines[-1] += word if fresh else f" {word}"
        fresh = False
    return "\n".join(lines)


def _imported(record: Record) -> dict:
    """What an imported run says of where it came from."""
    source = record.raw_config["imported"]
    return {key: value for key, value in source.items() if not isinstance(value, dict | list)} \
        if isinstance(source, dict) else {"source": source}


def reproduce(record: Record) -> list[Block]:
    if record.config is None:
        return []
    begins = (("The parent's directory must still be there, and stand where it stood.",)
              if record.parent and not _from_scratch(record) else ())
    return [Heading("How to reproduce it"), Code(script(record), "python"),
            Bullets((*begins,
                     "On a CPU the same versions give the same numbers to the bit; on a GPU sums have no fixed order.",
                     "`run.replay()` takes the steps again from config, seed and events alone, and says how far off "
                     "they are."))]


def _config_in_python(config: RunConfig) -> str:
    name, changes = commands.from_preset(config)
    given = [repr(name), *(f"{key}={value!r}" for key, value in changes.items())]
    return _filled("cfg = mc.preset(", [f"{one}," for one in given[:-1]] + [f"{given[-1]})"], "", " " * 16)


def _from_scratch(record: Record) -> bool:
    """Whether the config and the turns alone lead to where the run is."""
    parent = record.parent or {}
    return record.fresh and not any(parent.get(key) for key in ("how", "changes", "first"))


def _begins(parent: Mapping) -> str:
    """What ``Run.create`` is told of the weights to begin with; "" for fresh ones."""
    how = parent.get("how")
    given = {how: parent.get("path")} if how in origin.WORDS else {}
    given |= {"keep_optimizer": True} if parent.get("optimizer") else {}
    given |= {"upcycle_noise": parent["noise"]} if "noise" in parent else {}
    return "".join(f",\n{' ' * 20}{key}={value!r}" for key, value in given.items())


def script(record: Record) -> str:
    """Python that takes the same steps with the same turns, from the weights that the run began with."""
    parent, done = record.parent or {}, 0
    lines = ["import moe_core as mc", ""]
    if _from_scratch(record) or parent.get("how") in origin.WORDS:
        begins = _begins(parent)
        lines += [_config_in_python(record.config), f'run = mc.Run.create(mc.free_path("runs/again"), cfg{begins})']
    else:  # the config alone leads there neither from fresh weights nor from its first step
        done = int(parent["step"])
        given = "".join(f", {key}={value!r}" for key, value in (parent.get("changes") or {}).items()
                        if key in record.config.flat())  # a stranger's run may say anything
        lines += [f"parent = mc.Run.open({str(parent['path'])!r})",
                  f'run = parent.fork(mc.free_path("runs/again"), step={done}{given})']
    for event in record.events:
        if event["kind"] != "knob" or not done <= event["step"] - 1 <= record.last_step:
            continue
        if event["step"] - 1 > done:
            lines.append(f"run.step({event['step'] - 1 - done})")
            done = event["step"] - 1
        turn = event["payload"]
        how = {"hold": f"hold({turn.get('value')!r})", "follow": "follow()",
               "ramp": f"ramp(to={turn.get('value')!r}, over={turn.get('over')!r})"}[turn["mode"]]
        lines.append(f"run.knobs[{turn['name']!r}].{how}")
    if record.last_step > done:
        lines.append(f"run.step({record.last_step - done})")
    return "\n".join(lines)
