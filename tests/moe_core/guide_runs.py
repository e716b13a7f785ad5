"""Runs as the router guide would have them, to be spoiled one metric at a time."""

import math

import numpy as np
import pandas as pd

LN8 = math.log(8)
EXPERIMENT_1 = {"router_temp": 1.3, "router_noise_std": 0.3, "load_balance_alpha": 0.12, "router_z_loss_coef": 1e-3,
                "capacity_factor": 1.25, "lr_scale": 1.0, "grad_clip": 1.0}
LAYERS = ("max_frac_mean", "active_mean", "drop_frac_mean", "top1_p_mean", "entropy_mean", "aux_mean")


def healthy(n=600, E=8, K=1, L=4, seed=0):
    """The guide's own baseline, in fair shares where E is not 8, and a little scatter; no layer differs."""
    noise = np.random.default_rng(seed).normal(0, 0.01, n)
    room = 1 / K - 1 / E  # from the fair share to that of an expert which every token asks for
    values = {
        "router/max_frac_mean": min(1.28 / E, 1 / E + 0.2 * room),
        "router/max_frac_max": min(1.76 / E, 1 / E + 0.3 * room), "router/top1_p_mean": 1.25 / E,
        "router/entropy_mean": 0.95 * math.log(E), "router/aux_mean": 0.12, "router/active_min": E,
        "router/active_mean": E, "router/drop_frac_mean": 0.0, "router/collapsed": 0.0,
        "router/frac_dem_max": 1.1 / E, "router/frac_srv_max": 1.1 / E, "router/load_balance_alpha": 0.12,
        **{f"router/frac_srv_e{e}": 1 / E for e in range(E)}}
    counts = ("collapsed", "active", "drop", "alpha")
    frame = {name: np.full(n, value) * (1 + (0 if any(c in name for c in counts) else noise))
             for name, value in values.items()}
    frame |= {f"router/{name}/layer_{i}": frame[f"router/{name}"] for name in LAYERS for i in range(L)}
    frame["grad/clipped_cum"] = np.zeros(n)
    return pd.DataFrame(frame, index=pd.RangeIndex(1, n + 1, name="step"))


def put(frame, name, value, last=50):
    frame.iloc[-last:, frame.columns.get_loc(name)] = value
    return frame
