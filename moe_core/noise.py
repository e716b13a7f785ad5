"""Whether a number stands out from the noise of a series whose neighbouring values are alike.

Generalised least squares with unknown noise. The noise of a logged metric is a slow part that forgets itself by the
factor phi a step, an AR(1), and a fast part that each batch brings anew: its correlation between two steps d apart is
``(1 - w) phi^d``. Neither is known, and taking the likeliest for true finds effects where there are none; so every
pair on a grid is tried, and the answers are averaged by the restricted likelihood (REML) of each and a prior that
leans to long memory. Each answer is a Student t with n - C - 2 degrees of freedom, widened by a tenth
because the true noise mostly lies between those of the grid.

n values, M series, C columns of the design.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# The chance that any of the metrics tested together stands out by accident. In simulations of noise with phi up to 0.98
# and w up to 0.8, windows of 20 to 50 steps before and after a turn, it was 0.1 to 1.3 times this (1.4 times at a
# thirtieth of the level, as in Holm's method), so it stays within 5 in 100. For pairs see moe_core.effects.between.
LEVEL = 0.0375
WIDER = 1.1  # factor on the errors; without it, the chance was up to 1.8 times the level
PHI = (0.3, 0.5, 0.7, 0.8, 0.88, 0.93, 0.96, 0.98)
FAST = (0.0, 0.3, 0.6, 0.8)  # w
MANY = 400  # degrees of freedom from which Wallace's (1959) normal deviate is off by less than 2e-7
RESOLUTION = 1e-6  # metrics are kept as float32: what is smaller than this share of a value is rounding, not noise


@dataclass(frozen=True)
class Estimate:
    """One number for each of M series: a mixture of the estimates under every noise on the grid.

    ``n_effective_M``: how many independent values would give as certain a mean as the n values do under the likeliest
    noise on the grid; a rough number (for 100 independent values it is mostly 100, and in one case of seven below 10).
    ``values_GM``, ``errors_GM`` and ``weights_GM`` are of every noise on the grid.
    """

    value_M: np.ndarray
    n_effective_M: np.ndarray
    values_GM: np.ndarray
    errors_GM: np.ndarray
    weights_GM: np.ndarray
    df: int

    @property
    def p_M(self) -> np.ndarray:
        """Two-sided p-value: twice the share of the mixture on that side of 0 where less of it lies."""
        t_GM = self.values_GM / self.errors_GM
        return 2 * np.minimum(*((self.weights_GM * tail(side * t_GM, self.df)).sum(0) for side in (-1, 1)))

    def interval(self, level_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) that leave ``level_M / 2`` of the mixed distribution on either side."""
        reach = 10.0 / np.sqrt(level_M) * self.errors_GM.max(0)
        ends = []
        for side in (-1, 1):
            near = (self.values_GM * side).min(0) - reach
            far = (self.values_GM * side).max(0) + reach
            for _ in range(40):
                middle = (near + far) / 2
                t_GM = (middle - self.values_GM * side) / self.errors_GM
                outside = (self.weights_GM * tail(t_GM, self.df)).sum(0) > level_M / 2
                near, far = np.where(outside, middle, near), np.where(outside, far, middle)
            ends.append(side * far)
        return ends[0], ends[1]


def regress(steps_n: np.ndarray, values_nM: np.ndarray, design_nC: np.ndarray, contrast_C: np.ndarray,
            longest: float = PHI[-1]) -> Estimate:
    """Estimate ``contrast_C @ coefficients`` of every series at once; needs n > C + 2 and no NaN.

    ``longest``: the largest phi that is tried.
    """
    n, n_columns = design_nC.shape
    df = n - n_columns - 2  # two more for phi and w
    floor_M = n * (RESOLUTION * np.abs(values_nM).max(0)) ** 2 + 1e-300
    found, error, likely, priors, worth = [], [], [], [], []
    memories = [phi for phi in PHI if phi < longest] + [longest]
    for phi, fast in [(0.0, 0.0), *((phi, fast) for phi in memories for fast in FAST)]:
        white, root_n, independent = whitened(steps_n, np.concatenate([design_nC, values_nM], 1), phi, fast)
        q_nC, r_CC = np.linalg.qr(white[:, :n_columns])
        fitted_CM = q_nC.T @ white[:, n_columns:]
        rest_M = np.maximum(((white[:, n_columns:] - q_nC @ fitted_CM) ** 2).sum(0), floor_M)
        way_C = np.linalg.solve(r_CC.T, contrast_C)
        found.append(way_C @ fitted_CM)
        error.append(WIDER * np.sqrt(rest_M / df * (way_C @ way_C)))
        priors.append((1 + 8 * phi**4) * (1 + 3 * fast * phi))
        likely.append(-np.log(root_n).sum() - np.log(np.abs(np.diag(r_CC))).sum()
                      - (n - n_columns) / 2 * np.log(rest_M))
        worth.append(independent)
    found, error, likely = np.array(found), np.array(error), np.array(likely)
    weights = np.array(priors)[:, None] * np.exp(likely - likely.max(0))
    weights /= weights.sum(0)
    return Estimate((weights * found).sum(0), np.array(worth)[likely.argmax(0)], found, error, weights, df)


def whitened(steps_n: np.ndarray, values_nM: np.ndarray, phi: float,
             fast: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(values with the noise of each row made independent and of unit variance [n, M], what that divided each row by
    [n], how many independent values have as sure a mean).

    A Kalman filter: what the Cholesky root of the covariance gives, in time that grows with n and not with its cube.
    """
    n, echo, total = len(steps_n), 0.0, 0.0
    kept_n = float(phi) ** np.diff(steps_n, append=steps_n[-1])  # of the slow part, on the way to the next row
    root_n, gain_n, unknown = np.empty(n), np.empty(n), 1 - fast  # variance of the slow part, by the rows before
    for k, kept in enumerate(kept_n.tolist()):
        root_n[k], gain_n[k] = (unknown + fast) ** 0.5, unknown / (unknown + fast)
        unknown = kept**2 * gain_n[k] * fast + (1 - fast) * (1 - kept**2)
        total += 1 + 2 * (1 - fast) * echo  # the covariances of this row with those before it, and its variance
        echo = kept * (echo + 1)
    expected_nM, seen_nM = np.zeros_like(values_nM), (kept_n * gain_n)[:, None] * values_nM
    for k, left in enumerate((kept_n * (1 - gain_n))[:-1].tolist()):
        expected_nM[k + 1] = left * expected_nM[k] + seen_nM[k]
    return (values_nM - expected_nM) / root_n[:, None], root_n, n**2 / total


def tail(t: np.ndarray, df: int) -> np.ndarray:
    """The chance of a Student t above ``t``."""
    beyond = two_sided(t, df) / 2
    return np.where(t > 0, beyond, 1 - beyond)


def two_sided(t: np.ndarray, df: int) -> np.ndarray:
    """The chance of a Student t beyond +-t, for a whole number of degrees of freedom (Abramowitz & Stegun 26.7.3-4)."""
    if df > MANY:
        z = (8 * df + 1) / (8 * df + 3) * np.sqrt(df * np.log1p(np.square(t) / df))
        return torch.erfc(torch.from_numpy(z / np.sqrt(2))).numpy()
    angle = np.arctan(np.abs(t) / np.sqrt(df))
    square, odd = np.cos(angle) ** 2, df % 2
    total = np.ones_like(angle)
    for k in range(df - 3, odd, -2):  # by Horner's rule, in place: much of the time of run.effects() goes here
        total *= square
        total *= k / (k + 1)
        total += 1
    if odd:
        total *= np.cos(angle) * (df > 1)
    inside = 2 / np.pi * (angle + np.sin(angle) * total) if odd else np.sin(angle) * total
    return np.clip(1 - inside, 0.0, 1.0)


def holm(p_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(which stand out, the level that each was held to) by Holm's step-down method over M tests.

    :meth:`Estimate.interval` at that level leaves out 0 exactly where the test stands out.
    """
    order = np.argsort(p_M, kind="stable")
    levels = LEVEL / (len(p_M) - np.arange(len(p_M)))
    failed = np.flatnonzero(p_M[order] > levels)
    if len(failed):
        levels[failed[0]:] = levels[failed[0]]
    held_to_M = np.empty(len(p_M))
    held_to_M[order] = levels
    return p_M <= held_to_M, held_to_M
