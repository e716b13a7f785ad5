"""What a user does with a run, the same in the process that trains it and in any other: steer, and read.

Steering goes through the run's ``session``, reading through its ``store``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from moe_core import effects, frames, generation, health, probe
from moe_core.checked import is_integer, plain
from moe_core.config import RunConfig
from moe_core.handle import KnobHandle, KnobHandles
from moe_core.inspect import Inspection
from moe_core.knobs import Knobs
from moe_core.session import Command, Progress
from moe_core.store import Branch, RunStore


class Face:
    """The part of a run that needs only these, which a subclass has."""

    store: RunStore
    config: RunConfig
    session: object  # a Session, or what stands for one in another process
    _branch: Branch
    _knobs: Knobs
    _step: int

    @property
    def branch(self) -> str:
        """The name of the current branch."""
        return self._branch.name

    @property
    def current_step(self) -> int:
        """Optimizer steps done; the row of the last one has this number."""
        return self._step

    # ---- will ---------------------------------------------------------------------------------------------

    def step(self, n: int = 1) -> None:
        """Do ``n`` optimizer steps and wait for them, with a progress bar where tqdm is installed.

        An interrupt pauses at the next step boundary. Raises ValueError unless ``n`` is an integer of at least 1, and
        whatever training raises: NonFiniteError, MemoryLimitError, StoreError, DataError.
        """
        n = plain(n)
        self.session.start(n)
        try:
            with _bar(n) as show:
                while not self.session.wait(0.1):
                    show(self.session.progress())
                show(self.session.progress())
        except KeyboardInterrupt:
            self.session.pause()
            self.session.wait()
            raise

    def pause(self) -> None:
        """Stop at the next step boundary, whoever started the chunk. Returns at once.

        Raises StoreError where the run is attached and no process trains it.
        """
        self.session.pause()

    def progress(self) -> Progress:
        """State, step, and how far the present chunk is."""
        return self.session.progress()

    @property
    def knobs(self) -> KnobHandles:
        """The run's knobs by name: ``run.knobs["router_temp"].hold(1.3)``."""
        return KnobHandles((name, KnobHandle(self, name)) for name in self._knobs)

    def note(self, text: str, step: int | None = None) -> None:
        """Pin a note to ``step`` (default: the step that the run is at when it takes it).

        Raises ValueError where ``text`` says nothing or ``step`` is none of this line, StoreError where it cannot be
        written.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text = {text!r}: a note must say something")
        if step is not None:
            step = self._check_step(step)
        self.session.post(Command("note", {"text": text} if step is None else {"text": text, "at": step}))

    def checkpoint(self, name: str) -> None:
        """Save the whole state under a name; it is never pruned. While training: at the next step boundary.

        Raises ValueError where ``name`` names nothing, CheckpointError or StoreError where it cannot be written.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"name = {name!r}: a named checkpoint needs a name")
        self.session.post(Command("checkpoint", {"name": name}))

    # ---- reading ------------------------------------------------------------------------------------------

    def metrics(self, branch: str | None = None, since: int = 0, per_layer: bool = False):
        """DataFrame of every metric, index ``step``, of the steps after ``since``; NaN where a step has none.

        ``branch``: by its name, None is the current one. Raises StoreError for a name that no branch has.
        """
        return frames.metrics(self.store, self.store.branch_id(branch), since, per_layer)

    def experts(self, branch: str | None = None, since: int = 0):
        """DataFrame: step, layer, expert, demand, served (shares of the layer's assignments)."""
        return frames.experts(self.store, self.store.branch_id(branch), since)

    def events(self, branch: str | None = None):
        """DataFrame by step: step, kind, asked, applied, branch, then what each kind says (name, value, text).

        A knob's step is the first that it acted on.
        """
        return frames.events(self.store, self.store.branch_id(branch))

    def health(self) -> list[health.Finding]:
        """What the router guide's rules say of the newest steps, worst first (see ``moe_core.health``)."""
        return health.read(self.store, self._branch.id, self._step,
                           {name: knob.value for name, knob in self.knobs.items()}, self.config)

    def effects(self, window: int = effects.WINDOW):
        """DataFrame: each turn of a knob, each metric before and after it, and whether it stands out from the noise.

        ``window``: steps before the turn, and from it on. The test is described in ``moe_core.effects``.
        """
        return effects.effects(self.store, self._branch.id, window)

    def report(self, path: str | os.PathLike, *, static: bool = False, gates: Sequence[str] = (),
               baselines: Sequence = (), snapshots: Sequence[int] | None = None, title: str | None = None,
               inspection: Inspection | None = None) -> Path:
        """Write the experiment up from the store, as .html, .md or .ipynb by the suffix of ``path``; returns it.

        ``gates``: lines of :mod:`moe_core.gates`, passed or failed. ``baselines``: runs to compare with, or their
        paths. ``snapshots``: steps to show in full. ``static``: an HTML without script. ``inspection``: what
        :meth:`inspect` found. Raises what ``widgets.report.write`` does, before anything is written.
        """
        from widgets import report

        return report.write(self, path, static=static, gates=gates, baselines=baselines, snapshots=snapshots,
                            title=title, inspection=inspection)

    @property
    def _probed(self):
        """Whose weights are looked at."""
        return self

    def inspect(self, texts=None, step: int | str | None = None) -> Inspection:
        """Which expert each token of a probe goes to in each layer, without noise, in eval mode.

        ``texts``: a text, a list of them, or a mapping of kinds ("prose", "code") to those; each is a document, read
        from its start, cut into windows of block_size, 65,536 tokens in all. None: up to 4,096 tokens of the run's
        validation windows, spread evenly, the same at every call. ``step``: None is now; a step of this line whose
        state is kept, 0 is the start; or the name of a checkpoint. Router knobs have the values of the step after it.
        The run itself is not changed, and may be training. Raises ValueError where there is nothing to inspect.
        """
        return probe.inspect(self._probed, texts, step)

    def saturation(self, steps: int | str | Iterable[int | str] | None = None, texts=None):
        """How much of the present routing was already there at earlier steps, on the same probe. DataFrame: step,
        layer, then saturation, changed and chance as in :meth:`Inspection.changed_since`, and the step compared with.

        ``steps``: one or several, as ``step`` of :meth:`inspect`; None: the start, and every state that is kept.
        """
        return probe.saturation(self._probed, steps, texts)

    def generate(self, prompt, max_new_tokens: int | None = None, step: int | str | None = None, *,
                 temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0):
        """Continue a text. Returns a :class:`~moe_core.generation.Generation` (text, token ids, experts [L, T, K]), or
        for a list of prompts a list of them, each with a length of its own.

        ``prompt``: a text ("" begins a document), or token ids. ``max_new_tokens``: None is as many as block_size
        has room for; no text becomes longer. ``temperature`` 0 takes the likeliest token each time; otherwise one is
        sampled, by ``seed``, from the ``top_k`` likeliest, and from the fewest whose probabilities reach ``top_p``.
        ``step`` as in :meth:`inspect`. Router knobs have the values of the step after it, without noise; no token is
        dropped. The run itself is not changed, and may be training. Raises ValueError.
        """
        return generation.generate(self._probed, prompt, max_new_tokens, step, temperature=temperature, top_k=top_k,
                                   top_p=top_p, seed=seed)

    def stream(self, prompt, max_new_tokens: int | None = None, step: int | str | None = None,
               **how) -> Iterator[generation.Generation]:
        """Like :meth:`generate` for one prompt, but yields the text so far: after the prompt, then after each token."""
        return generation.stream(self._probed, prompt, max_new_tokens, step, **how)

    def export_hf(self, folder: str | os.PathLike, step: int | str | None = None) -> Path:
        """Write the model to ``folder``, which must not exist, as plain ``transformers`` loads it, with its tokenizer
        and a card made from the run; returns the folder. ``step`` as of :meth:`inspect`.

        The form is Mixtral, Qwen3-MoE or Qwen3-Next, by what the config needs. Raises ConfigError with the field that
        no form holds, and ExportError where it cannot be written.
        """
        from moe_core.hf.folder import export

        return export(self._probed, folder, step)

    def branches(self):
        """DataFrame: name, parent, fork_step, last_step, created, current."""
        return frames.branches(self.store, self._branch.id)

    def _other_branch(self, name: str) -> int:
        """The id of a branch that must be named."""
        if name is None:
            raise ValueError(f"branch = None: must be one of {', '.join(map(repr, self.branches()['name']))}")
        return self.store.branch_id(name)

    def _check_step(self, step: int, field: str = "step") -> int:
        """``step`` as an int. Raises ValueError, which calls it ``field``."""
        if not is_integer(step := plain(step), 0, self._step):
            raise ValueError(f"{field} = {step!r}: must be a step of this line, 0 to {self._step}")
        return step

    @staticmethod
    def _check_name(name: str | None) -> None:
        """Raise ValueError for what cannot name a new branch; None stands for a name that is found for it."""
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise ValueError(f"name = {name!r}: must be text that names the new branch, or None")


@contextlib.contextmanager
def _bar(n: int) -> Iterator[Callable[[Progress], None]]:
    """tqdm over optimizer steps where it is installed, silence where it is not."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda progress: None
        return
    with tqdm(total=n, unit="step", mininterval=0.2) as bar:
        def show(progress: Progress) -> None:
            bar.total = progress.chunk_total
            bar.update(progress.chunk_done - bar.n)
        yield show
