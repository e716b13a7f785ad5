"""What the experts specialised in: which token of a probe went to which expert, and what that has in common.

An :class:`Inspection` is plain data, made by ``run.inspect()`` (see ``moe_core.probe``). Layers are counted as in
the metrics: 0 is the first block with experts.

L layers with experts, T tokens of the probe, E experts, K picks of a token, C token classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe_core.token_text import shown

PRIOR = 10.0  # tokens' worth of prior in a log-odds, shared out as the whole probe has its tokens
SHUFFLES = 200  # permutations behind "what chance gives"


class Coactivation(NamedTuple):
    """Experts of a layer (rows) and of the next (columns), two DataFrames [E, E]."""

    counts: object  # pairs of picks of one token: T * K * K in all; a row adds up to K times the expert's picks
    lift: object  # counts over what independent layers would give; NaN where one of the two has no token


@dataclass(frozen=True, eq=False)
class Inspection:
    """A probe through the weights after ``step``: no noise, eval mode. All arrays are read-only."""

    step: int
    n_experts: int
    token_ids: np.ndarray  # int64 [T]
    token_bytes: tuple[bytes, ...]  # what each token stands for; it may be a part of a character
    pieces: tuple[str, ...]  # what each token shows; "" where a later token completes the character
    classes: np.ndarray  # int64 [T], index into token_text.CLASSES
    documents: np.ndarray  # int64 [T], index of the document, from 0
    windows: np.ndarray  # int64 [T], which sequence of at most block_size the token was read in
    kinds: tuple[str | None, ...]  # of each document
    experts: np.ndarray  # int64 [L, T, K], first choice first
    weights: np.ndarray  # float32 [L, T, K], what each expert's output is multiplied by
    kept: np.ndarray  # bool [L, T, K], False where the expert was full; room is counted over each window
    blocks: tuple[int, ...]  # the number of each layer's block in the model

    def __repr__(self) -> str:
        n_layer, n_tokens, top_k = self.experts.shape
        return (f"Inspection(step {self.step}: {n_tokens:,} tokens of {len(self.kinds)} documents, {n_layer} layers, "
                f"{self.n_experts} experts, top-{top_k})")

    @property
    def n_layer(self) -> int:
        """Layers with experts, L."""
        return len(self.experts)

    def shares(self) -> np.ndarray:
        """Demand as shares of each layer's assignments, float64 [L, E]."""
        return np.stack([np.bincount(picks.ravel(), minlength=self.n_experts) / picks.size for picks in self.experts])

    def tokens_of(self, layer: int, expert: int, n: int = 20):
        """The ``n`` tokens most typical of an expert, most typical first. DataFrame:

        ``token`` (quoted), ``id``; ``count``: times it went here, of ``total`` in the probe; ``lift``: the share of
        it that went here over the share that the expert has of everything; ``log_odds`` of being found here and not
        elsewhere, smoothed by a prior of 10 tokens spread as the whole probe is; ``z``: log_odds over its standard
        error, by which they are sorted (Monroe, Colaresi and Quinn 2008, "Fightin' Words"). So neither a token that
        is common everywhere nor one that was seen a single time comes first. Tokens less frequent here than
        elsewhere are left out.
        """
        import pandas as pd

        picks_TK = self.experts[self._layer(layer)]
        if not isinstance(expert, int | np.integer) or not 0 <= expert < self.n_experts:
            raise ValueError(f"expert = {expert!r}: must be 0 to {self.n_experts - 1}")
        ids, first, which_T = np.unique(self.token_ids, return_index=True, return_inverse=True)
        here_T = (picks_TK == expert).sum(-1)
        here, total = (np.bincount(which_T, weights=w, minlength=len(ids)) for w in (here_T, np.ones_like(which_T)))
        elsewhere = total * picks_TK.shape[1] - here
        prior = PRIOR * total / total.sum()
        odds = [(count + prior) / (count.sum() + PRIOR - count - prior) for count in (here, elsewhere)]
        log_odds = np.log(odds[0]) - np.log(odds[1])
        z = log_odds / np.sqrt(1 / (here + prior) + 1 / (elsewhere + prior))
        order = np.argsort(-z, kind="stable")
        order = order[(z[order] > 0) & (here[order] > 0)][:n]
        lift = here / (total * picks_TK.shape[1]) / max(here.sum() / picks_TK.size, 1e-12)
        return pd.DataFrame({
            "token": [shown(self.token_bytes[first[i]]) for i in order], "id": ids[order],
            "count": here[order].astype(int), "total": total[order].astype(int), "lift": lift[order],
            "log_odds": log_odds[order], "z": z[order]})

    def mutual_information(self):
        """How much a token's expert says of what the token is. DataFrame, one row a layer and ``about``:

        ``about``: "token class" (``moe_core.token_text.CLASSES``), or "document kind" where two kinds are known.
        ``nats``: mutual information of expert and class over the probe's assignments, less what chance gives;
        ``normalised``: the same over the most it can be, 0 for a router that knows nothing of the class, 1 where one
        of the two follows from the other; NaN where nothing can be known (one expert has all, or one class is there).
        ``chance`` and ``spread``: mean and standard deviation in nats with the classes shuffled over the tokens, 200
        times: a finite sample's information is never 0, and what it is too high by depends on how rare the rare
        classes are. A value within two spreads of 0 says nothing.

        The most it can be is min(H(class), H(expert) - ln K): K different experts a token leave ln K open. All
        assignments count, kept or dropped: it is about what the router asks for. Where each kind is one document,
        its number is about those documents and not yet about the kind.
        """
        import pandas as pd

        rows = []
        for about, labels_T in self._labels():
            for layer, (nats, chance, spread, most) in enumerate(self._information(labels_T)):
                left = most - chance
                rows.append({"layer": layer, "about": about, "nats": nats - chance,
                             "normalised": (nats - chance) / left if left > 1e-6 else np.nan,
                             "chance": chance, "spread": spread})
        return pd.DataFrame(rows)

    def coactivation(self, layer: int) -> Coactivation:
        """Which expert of layer ``layer + 1`` follows which of ``layer``, for ``layer`` 0 to L - 2."""
        import pandas as pd

        if self.n_layer < 2 or self._layer(layer) == self.n_layer - 1:
            raise ValueError(f"layer = {layer}: must have a layer with experts after it; there are {self.n_layer}")
        now_TK, next_TK = self.experts[layer], self.experts[layer + 1]
        pair = now_TK[:, :, None] * self.n_experts + next_TK[:, None, :]
        counts = np.bincount(pair.ravel(), minlength=self.n_experts**2).reshape(self.n_experts, -1)
        expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / counts.sum()
        lift = np.divide(counts, expected, out=np.full(counts.shape, np.nan), where=expected > 0)
        names = (pd.RangeIndex(self.n_experts, name=f"expert in layer {at}") for at in (layer, layer + 1))
        rows, columns = names
        return Coactivation(*(pd.DataFrame(values, index=rows, columns=columns) for values in (counts, lift)))

    def changed_since(self, earlier: Inspection):
        """How the routing differs from that of another step, on the same probe. DataFrame, index layer:

        ``changed``: share of tokens whose set of experts is not the same; ``saturation``: share of picks that are in
        both sets, 1 when nothing changed (router saturation, Muennighoff et al. 2024, "OLMoE"); ``chance``: what it
        would be between two routers with these loads that know nothing of each other. Raises ValueError for another
        probe or another number of experts, layers or picks.
        """
        import pandas as pd

        if not np.array_equal(self.token_ids, earlier.token_ids) or not np.array_equal(self.windows, earlier.windows):
            raise ValueError("changed_since: the two must be of the same probe; give both the same texts")
        if self.experts.shape != earlier.experts.shape or self.n_experts != earlier.n_experts:
            raise ValueError(f"changed_since: {self!r} and {earlier!r} are of different routers")
        top_k = self.experts.shape[-1]
        shared_LT = (self.experts[..., :, None] == earlier.experts[..., None, :]).sum((-1, -2))
        chance = top_k * (self.shares() * earlier.shares()).sum(-1)
        return pd.DataFrame({"changed": (shared_LT < top_k).mean(-1), "saturation": shared_LT.mean(-1) / top_k,
                             "chance": chance}, index=pd.RangeIndex(self.n_layer, name="layer"))

    def _layer(self, layer: int) -> int:
        if not isinstance(layer, int | np.integer) or not 0 <= layer < self.n_layer:
            raise ValueError(f"layer = {layer!r}: must be 0 to {self.n_layer - 1}")
        return int(layer)

    def _labels(self) -> list[tuple[str, np.ndarray]]:
        known = sorted({kind for kind in self.kinds if kind is not None})
        if len(known) < 2 or None in self.kinds:
            return [("token class", self.classes)]
        of_document = np.array([known.index(kind) for kind in self.kinds])
        return [("token class", self.classes), ("document kind", of_document[self.documents])]

    def _information(self, labels_T: np.ndarray) -> list[tuple[float, float, float, float]]:
        """Of each layer: information in nats, its mean and spread by chance, and the most it can be."""
        rng, n_classes = np.random.default_rng(0), int(labels_T.max()) + 1
        shuffles = [labels_T, *(rng.permutation(labels_T) for _ in range(SHUFFLES))]
        found = []
        for picks_TK in self.experts:
            top_k = picks_TK.shape[1]
            # Counts of expert and class, summed over a token's K picks; a shuffle moves all K together.
            tables = [np.bincount((picks_TK * n_classes + labels[:, None]).ravel(),
                                  minlength=self.n_experts * n_classes) for labels in shuffles]
            joint = np.stack(tables).reshape(-1, self.n_experts, n_classes) / picks_TK.size
            of_expert, of_class = _entropy(joint[0].sum(-1)), _entropy(joint[0].sum(-2))
            nats = of_expert + of_class - _entropy(joint.reshape(len(joint), -1))
            found.append((float(nats[0]), float(nats[1:].mean()), float(nats[1:].std()),
                          float(min(of_class, of_expert - np.log(top_k)))))
        return found


def _entropy(shares: np.ndarray | Sequence[float]) -> np.ndarray:
    """In nats, over the last dimension; 0 ln 0 is 0."""
    shares = np.asarray(shares)
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1)
